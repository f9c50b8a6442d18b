// What the CUDA binding calls. Knows no torch.
#pragma once

#include <cuda_runtime.h>

#include "problem.h"

namespace star_fast {

// Launches on `stream` and returns at once. Pointers of `p` are device pointers; `bad_rows` must be set.
cudaError_t sample_tokens_cuda(const Problem& p, cudaStream_t stream);

}  // namespace star_fast
