// From torch arguments to a Problem. The public function (star_fast/ops/sample_tokens.py) has checked the values and
// says so in better words; what is checked here keeps the kernels inside their memory whoever calls.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <optional>

#include "problem.h"

namespace star_fast {

inline Problem make_problem(const at::Tensor& logits, const std::optional<at::Tensor>& uncond,
                            const at::Tensor& image_index, const std::optional<at::Tensor>& seed_at, int64_t seed,
                            const std::optional<at::Tensor>& position_at, int64_t position, double temperature,
                            int64_t top_k, double top_p, double guidance, const at::Tensor& out,
                            const std::optional<at::Tensor>& bad_rows) {
  const auto vector_of = [&](const at::Tensor& t, at::ScalarType type, int64_t numel, const char* name) {
    TORCH_CHECK_VALUE(
        t.scalar_type() == type && t.numel() == numel && t.is_contiguous() && t.device() == logits.device(),
        "sample_tokens: ", name, " must be contiguous ", type, " with ", numel, " entries on ", logits.device(),
        ", got ", t.scalar_type(), " of shape ", t.sizes(), " on ", t.device());
  };
  TORCH_CHECK_VALUE(logits.dim() == 2 && logits.size(1) >= 1 && logits.size(1) <= kMaxVocab && logits.stride(1) == 1,
                    "sample_tokens: logits must be (B, V), 1 <= V <= ", kMaxVocab,
                    ", with unit stride inside a row, got shape ", logits.sizes(), " with strides ", logits.strides());
  Problem p{};
  switch (logits.scalar_type()) {
    case at::kFloat: p.type = LogitType::float32; break;
    case at::kBFloat16: p.type = LogitType::bfloat16; break;
    case at::kHalf: p.type = LogitType::float16; break;
    default:
      TORCH_CHECK_TYPE(false, "sample_tokens: logits must be float32, bfloat16 or float16, got ", logits.scalar_type());
  }
  p.rows = logits.size(0);
  p.vocab = int32_t(logits.size(1));
  p.logits = logits.const_data_ptr();
  p.logits_row_stride = logits.stride(0);
  if (uncond) {
    TORCH_CHECK_VALUE(uncond->sizes() == logits.sizes() && uncond->scalar_type() == logits.scalar_type() &&
                          uncond->device() == logits.device() && uncond->stride(1) == 1,
                      "sample_tokens: uncond must match logits, with unit stride inside a row");
    p.uncond = uncond->const_data_ptr();
    p.uncond_row_stride = uncond->stride(0);
  }
  vector_of(image_index, at::kLong, p.rows, "image_index");
  p.image_index = image_index.const_data_ptr<int64_t>();
  if (seed_at) {
    vector_of(*seed_at, at::kLong, 1, "seed");
    p.seed_at = seed_at->const_data_ptr<int64_t>();
  }
  if (position_at) {
    vector_of(*position_at, at::kLong, 1, "position");
    p.position_at = position_at->const_data_ptr<int64_t>();
  }
  p.seed = seed;
  p.position = position;
  TORCH_CHECK_VALUE(temperature >= 0 && top_k >= 0 && top_p >= 0 && top_p <= 1,
                    "sample_tokens: temperature, top_k or top_p out of range");
  p.settings = make_settings(temperature, top_k, top_p, guidance, p.vocab);
  vector_of(out, at::kLong, p.rows, "out");
  p.out = out.mutable_data_ptr<int64_t>();
  if (bad_rows) {
    vector_of(*bad_rows, at::kInt, 1, "bad_rows");
    p.bad_rows = bad_rows->mutable_data_ptr<int32_t>();
  }
  return p;
}

}  // namespace star_fast
