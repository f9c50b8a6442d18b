// add_rms_norm and swiglu on the CPU for decoding: one pass each, no gradient. Semantics: star_fast/ops/add_rms_norm.py and swiglu.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>

#include "instruction_sets.h"
#include "scalars.h"

// Vectors wider than the target's registers are passed between functions that are always inlined: no ABI is involved.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace star_fast {
namespace {

namespace baseline {
#include "lanes.h"
#include "between_rows.h"
}

#ifdef STAR_FAST_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#include "lanes.h"
#include "between_rows.h"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
namespace avx512 {
#include "lanes.h"
#include "between_rows.h"
}
#pragma GCC pop_options
#endif

constexpr int kEntriesWorthAThread = 65536;

template <class T>
auto add_rms_norm_row_here() {
#ifdef STAR_FAST_X86
  if (widest_set() == WidestSet::avx512) return &avx512::add_rms_norm_row<T>;
  if (widest_set() == WidestSet::avx2) return &avx2::add_rms_norm_row<T>;
#endif
  return &baseline::add_rms_norm_row<T>;
}

template <class T>
auto swiglu_row_here() {
#ifdef STAR_FAST_X86
  if (widest_set() == WidestSet::avx512) return &avx512::swiglu_row<T>;
  if (widest_set() == WidestSet::avx2) return &avx2::swiglu_row<T>;
#endif
  return &baseline::swiglu_row<T>;
}

template <class Row>
void for_rows(int64_t rows, int64_t width, const Row& row) {
  at::parallel_for(0, rows, std::max<int64_t>(1, kEntriesWorthAThread / width), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) row(r);
  });
}

template <class T>
void add_rms_norm_typed(const at::Tensor& x, const std::optional<at::Tensor>& residual, const at::Tensor& weight, double eps, at::Tensor& normed,
                        const std::optional<at::Tensor>& sum) {
  const int64_t width = x.size(-1);
  const auto at_row = [&](const at::Tensor& t, int64_t row) { return static_cast<const T*>(t.const_data_ptr()) + row * width; };
  T* normed_rows = static_cast<T*>(normed.mutable_data_ptr());
  T* sum_rows = sum ? static_cast<T*>(sum->mutable_data_ptr()) : nullptr;
  const auto one_row = add_rms_norm_row_here<T>();
  for_rows(x.numel() / width, width, [&](int64_t row) {
    one_row(at_row(x, row), residual ? at_row(*residual, row) : nullptr, at_row(weight, 0), float(eps), int(width), normed_rows + row * width,
            sum_rows ? sum_rows + row * width : nullptr);
  });
}

// Writes `normed`, and `sum` where there is a residual.
void add_rms_norm_cpu(const at::Tensor& x, const std::optional<at::Tensor>& residual, const at::Tensor& weight, double eps, at::Tensor& normed,
                      const std::optional<at::Tensor>& sum) {
  const auto like_x = [&](const at::Tensor& t) { return t.sizes() == x.sizes() && t.scalar_type() == x.scalar_type() && t.is_contiguous(); };
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.size(-1) > 0 && x.size(-1) % baseline::kLanes == 0 && like_x(x) && like_x(normed) && weight.is_contiguous() &&
                        weight.numel() == x.size(-1) && weight.scalar_type() == x.scalar_type() && residual.has_value() == sum.has_value() &&
                        (!residual || (like_x(*residual) && like_x(*sum))), "add_rms_norm: tensors do not fit together, or the width is no multiple of 16");
  if (x.scalar_type() == at::kFloat) return add_rms_norm_typed<float>(x, residual, weight, eps, normed, sum);
  TORCH_CHECK_TYPE(x.scalar_type() == at::kBFloat16, "add_rms_norm: x must be float32 or bfloat16, got ", x.scalar_type());
  add_rms_norm_typed<Bfloat16Bits>(x, residual, weight, eps, normed, sum);
}

template <class T>
void swiglu_typed(const at::Tensor& w1w3, at::Tensor& out) {
  const int64_t width = out.size(-1);
  const T* rows = static_cast<const T*>(w1w3.const_data_ptr());
  T* result = static_cast<T*>(out.mutable_data_ptr());
  const auto one_row = swiglu_row_here<T>();
  for_rows(out.numel() / width, 3 * width, [&](int64_t row) { one_row(rows + row * 2 * width, int(width), result + row * width); });
}

void swiglu_cpu(const at::Tensor& w1w3, at::Tensor& out) {
  TORCH_CHECK_VALUE(w1w3.dim() >= 1 && out.dim() == w1w3.dim() && out.size(-1) > 0 && out.size(-1) % baseline::kLanes == 0 &&
                        w1w3.size(-1) == 2 * out.size(-1) && w1w3.numel() == 2 * out.numel() && w1w3.is_contiguous() && out.is_contiguous() &&
                        w1w3.scalar_type() == out.scalar_type(), "swiglu: tensors do not fit together, or the width is no multiple of 16");
  if (w1w3.scalar_type() == at::kFloat) return swiglu_typed<float>(w1w3, out);
  TORCH_CHECK_TYPE(w1w3.scalar_type() == at::kBFloat16, "swiglu: w1w3 must be float32 or bfloat16, got ", w1w3.scalar_type());
  swiglu_typed<Bfloat16Bits>(w1w3, out);
}

}  // namespace

TORCH_LIBRARY_IMPL(star_fast, CPU, m) {
  m.impl("add_rms_norm", &add_rms_norm_cpu);
  m.impl("swiglu", &swiglu_cpu);
}

}  // namespace star_fast
