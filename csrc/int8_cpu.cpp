// A matrix product in 8 bits on the CPU: rows rounded, PyTorch's oneDNN operator, rows scaled back. Semantics: star_fast/ops/int8_linear.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

#include "instruction_sets.h"
#include "scalars.h"

// Vectors wider than the target's registers are passed between functions that are always inlined: no ABI is involved.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace star_fast {
namespace {

namespace baseline {
#include "lanes.h"
#include "int8_rows.h"
}

#ifdef STAR_FAST_X86
#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace avx2 {
#include "lanes.h"
#include "int8_rows.h"
}
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
namespace avx512 {
#include "lanes.h"
#include "int8_rows.h"
}
#pragma GCC pop_options
#endif

constexpr int64_t kEntriesWorthAThread = 16384;
constexpr int64_t kColumnsTogether = 64;  // a multiple of kLanes

// The function of this name for this machine's instructions.
#ifdef STAR_FAST_X86
#define STAR_FAST_HERE(function) \
  (widest_set() == WidestSet::avx512 ? &avx512::function<T> : widest_set() == WidestSet::avx2 ? &avx2::function<T> : &baseline::function<T>)
#else
#define STAR_FAST_HERE(function) (&baseline::function<T>)
#endif

template <class Row>
void for_rows(int64_t rows, int64_t width, const Row& row) {
  at::parallel_for(0, rows, std::max<int64_t>(1, kEntriesWorthAThread / width), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) row(r);
  });
}

// Calls `part` with (row, first column, number of columns). Threads share out the columns, as the product's own do: what a core reads is in its cache.
template <class Part>
void for_columns(int64_t rows, int64_t width, const Part& part) {
  const int64_t groups = (width + kColumnsTogether - 1) / kColumnsTogether;
  const int64_t grain = std::max<int64_t>(1, kEntriesWorthAThread / (rows * kColumnsTogether));
  at::parallel_for(0, groups, grain, [&](int64_t begin, int64_t end) {
    const int64_t column = begin * kColumnsTogether, count = std::min(width, end * kColumnsTogether) - column;
    for (int64_t row = 0; row < rows; ++row) part(row, column, int(count));
  });
}

// codes (R, K) uint8 times packed weights -> (R, N) float32, each column times its weight_scale, the rows' own scale left out. Called by name: the
// operator has no header.
at::Tensor product_of(const at::Tensor& codes, const at::Tensor& packed, const at::Tensor& weight_scale, const at::Tensor& weight_zero_point) {
  static const c10::OperatorHandle qlinear = c10::Dispatcher::singleton().findSchemaOrThrow("onednn::qlinear_pointwise", "");
  static const c10::List<std::optional<at::Scalar>> no_arguments;
  torch::jit::Stack stack;
  torch::jit::push(stack, codes, 1.0, int64_t(baseline::kZeroPoint), packed, weight_scale, weight_zero_point, c10::IValue(), 1.0, int64_t(0),
                   int64_t(at::kFloat), "none", no_arguments, "");
  qlinear.callBoxed(stack);
  return std::move(stack.front()).toTensor();
}

template <class T>
at::Tensor int8_linear_of(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& weight_scale, const at::Tensor& weight_zero_point) {
  const int64_t rows = x.size(0), width = x.size(1), outputs = weight_scale.numel();
  const at::Tensor codes = at::empty({rows, width}, x.options().dtype(at::kByte));
  std::vector<float> scale(rows);
  const T* from = static_cast<const T*>(x.const_data_ptr());
  uint8_t* to = codes.mutable_data_ptr<uint8_t>();
  const auto round_row = STAR_FAST_HERE(round_row);
  for_rows(rows, width, [&](int64_t row) { scale[row] = round_row(from + row * width, int(width), to + row * width); });

  const at::Tensor product = product_of(codes, packed, weight_scale, weight_zero_point);
  const bool in_place = x.scalar_type() == at::kFloat;
  const at::Tensor out = in_place ? product : at::empty({rows, outputs}, x.options());
  const float* sums = product.const_data_ptr<float>();
  T* scaled = static_cast<T*>(out.mutable_data_ptr());
  const auto scale_row = STAR_FAST_HERE(scale_row);
  for_columns(rows, outputs, [&](int64_t row, int64_t column, int count) {
    scale_row(sums + row * outputs + column, scale[row], count, scaled + row * outputs + column);
  });
  return out;
}

at::Tensor int8_linear_cpu(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& weight_scale, const at::Tensor& weight_zero_point) {
  TORCH_CHECK_VALUE(x.dim() == 2 && x.numel() > 0 && x.is_contiguous() && packed.dim() == 2 && packed.size(0) == x.size(1) &&
                        weight_scale.numel() == packed.size(1) && weight_zero_point.numel() == packed.size(1),
                    "int8_linear: x ", x.sizes(), " must be contiguous (R, K) beside packed weights (K, N) ", packed.sizes());
  if (x.scalar_type() == at::kFloat) return int8_linear_of<float>(x, packed, weight_scale, weight_zero_point);
  TORCH_CHECK_TYPE(x.scalar_type() == at::kBFloat16, "int8_linear: expected float32 or bfloat16, got ", x.scalar_type());
  return int8_linear_of<Bfloat16Bits>(x, packed, weight_scale, weight_zero_point);
}

}  // namespace

// The packed weights are an MKLDNN tensor, so the call arrives there.
TORCH_LIBRARY_IMPL(star_fast, CPU, m) { m.impl("int8_linear", &int8_linear_cpu); }
TORCH_LIBRARY_IMPL(star_fast, MkldnnCPU, m) { m.impl("int8_linear", &int8_linear_cpu); }

}  // namespace star_fast
