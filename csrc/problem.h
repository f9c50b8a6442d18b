// One call of sample_tokens as plain pointers and numbers: what the bindings fill in and the kernels read. Knows no
// torch.
#pragma once

#include <cstdint>

#include "token_choice.h"

namespace star_fast {

enum class LogitType { float32, bfloat16, float16 };

struct Problem {
  const void* logits;         // (rows, vocab), unit stride inside a row
  const void* uncond;         // the same without the condition, or null: no guidance
  int64_t logits_row_stride;  // in elements
  int64_t uncond_row_stride;
  LogitType type;
  int64_t rows;
  int32_t vocab;
  const int64_t* image_index;  // (rows)
  const int64_t* seed_at;      // where the seed lies, or null: it is `seed`
  int64_t seed;
  const int64_t* position_at;  // where the position lies, or null: it is `position`
  int64_t position;
  Settings settings;
  int64_t* out;       // (rows)
  int32_t* bad_rows;  // CUDA: set to 1 if a row cannot be drawn from
};

}  // namespace star_fast
