// sample_tokens on CUDA: from torch arguments to the launch in sample_cuda.cu, on PyTorch's current stream.
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "binding.h"
#include "sample_cuda.h"

namespace star_fast {
namespace {

void sample_tokens_on_cuda(const at::Tensor& logits, const std::optional<at::Tensor>& uncond,
                           const at::Tensor& image_index, const std::optional<at::Tensor>& seed_at, int64_t seed,
                           const std::optional<at::Tensor>& position_at, int64_t position, double temperature,
                           int64_t top_k, double top_p, double guidance, at::Tensor& out,
                           const std::optional<at::Tensor>& bad_rows) {
  TORCH_CHECK_VALUE(bad_rows.has_value(), "sample_tokens: on CUDA bad_rows must be a tensor, got None");
  const Problem p = make_problem(logits, uncond, image_index, seed_at, seed, position_at, position, temperature, top_k,
                                 top_p, guidance, out, bad_rows);
  const c10::cuda::CUDAGuard on_device(logits.device());
  C10_CUDA_CHECK(sample_tokens_cuda(p, c10::cuda::getCurrentCUDAStream()));
}

}  // namespace

TORCH_LIBRARY_IMPL(star_fast, CUDA, m) { m.impl("sample_tokens", &sample_tokens_on_cuda); }

}  // namespace star_fast
