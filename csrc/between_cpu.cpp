// add_rms_norm and swiglu on the CPU and their gradients: one pass each. Semantics: star_fast/ops/add_rms_norm.py and
// swiglu.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

#include "dropout_row.h"
#include "instruction_sets.h"
#include "scalars.h"

// Vectors wider than the target's registers are passed between functions that are always inlined: no ABI is involved.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace star_fast {
namespace {

#define STAR_FAST_ROWS "between_rows.h"
#include "each_instruction_set.h"

constexpr int kEntriesWorthAThread = 65536;
constexpr int64_t kRowsAPart = 64;  // of the weight's gradient

using MaybeTensor = std::optional<at::Tensor>;

template <class Row>
void for_rows(int64_t rows, int64_t width, const Row& row) {
  at::parallel_for(0, rows, std::max<int64_t>(1, kEntriesWorthAThread / width), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) row(r);
  });
}

template <class T>
const T* row_of(const MaybeTensor& t, int64_t row, int64_t width) {
  return t ? static_cast<const T*>(t->const_data_ptr()) + row * width : nullptr;
}

template <class T>
T* row_to(const MaybeTensor& t, int64_t row, int64_t width) {
  return t ? static_cast<T*>(t->mutable_data_ptr()) + row * width : nullptr;
}

// A dropout mask: keys and limit as ops/add_rms_norm.py derives them from seed and share; scale 0: none.
struct Dropout {
  Dropout(int64_t width, int64_t row_key, int64_t column_key, int64_t limit, double scale)
      : row_key(uint32_t(row_key)), limit(int32_t(limit)), scale(float(scale)),
        column_hashes(scale == 0.0 ? 0 : width) {
    for (size_t column = 0; column < column_hashes.size(); ++column)
      column_hashes[column] = hash_of(uint32_t(column) ^ uint32_t(column_key));
  }

  DropoutRow of(int64_t row) const {
    return {column_hashes.empty() ? nullptr : column_hashes.data(), hash_of(uint32_t(row) ^ row_key), limit, scale};
  }

  uint32_t row_key;
  int32_t limit;
  float scale;
  std::vector<uint32_t> column_hashes;
};

// Calls `body` with a null pointer of the entries' type.
template <class Body>
void by_dtype(const char* name, const at::Tensor& x, const Body& body) {
  if (x.scalar_type() == at::kFloat) return body(static_cast<float*>(nullptr));
  TORCH_CHECK_TYPE(x.scalar_type() == at::kBFloat16, name, ": expected float32 or bfloat16, got ", x.scalar_type());
  body(static_cast<Bfloat16Bits*>(nullptr));
}

bool fits(const MaybeTensor& t, const at::Tensor& x) {
  return !t || (t->sizes() == x.sizes() && t->scalar_type() == x.scalar_type() && t->is_contiguous());
}

void check_norm(const at::Tensor& x, const at::Tensor& weight, std::initializer_list<const MaybeTensor*> others) {
  bool fit = x.dim() >= 1 && x.size(-1) > 0 && x.size(-1) % baseline::kLanes == 0 && x.is_contiguous() &&
             weight.is_contiguous() && weight.numel() == x.size(-1) && weight.scalar_type() == x.scalar_type();
  for (const MaybeTensor* other : others) fit = fit && fits(*other, x);
  TORCH_CHECK_VALUE(fit, "add_rms_norm: tensors do not fit together, or the width is no multiple of 16");
}

// Writes `normed`, and `sum` where there is a residual or dropout.
void add_rms_norm_cpu(const at::Tensor& x, const MaybeTensor& residual, const at::Tensor& weight, double eps,
                      int64_t row_key, int64_t column_key, int64_t limit, double scale, at::Tensor& normed,
                      const MaybeTensor& sum) {
  check_norm(x, weight, {&residual, &sum});
  TORCH_CHECK_VALUE(fits(normed, x) && sum.has_value() == (residual.has_value() || scale != 0.0),
                    "add_rms_norm: outputs do not fit");
  const int64_t width = x.size(-1);
  const Dropout dropout(width, row_key, column_key, limit, scale);
  by_dtype("add_rms_norm", x, [&](auto* entry) {
    using T = std::remove_pointer_t<decltype(entry)>;
    const auto one_row = STAR_FAST_HERE(add_rms_norm_row);
    for_rows(x.numel() / width, width, [&](int64_t row) {
      one_row(row_of<T>(x, row, width), row_of<T>(residual, row, width), row_of<T>(weight, 0, width), float(eps),
              int(width), dropout.of(row), row_to<T>(normed, row, width), row_to<T>(sum, row, width));
    });
  });
}

// Writes `dh` and `dx` where given, and dweight (D) float32.
void add_rms_norm_backward_cpu(const at::Tensor& h, const at::Tensor& weight, const MaybeTensor& dnormed,
                               const MaybeTensor& dsum, double eps, int64_t row_key, int64_t column_key, int64_t limit,
                               double scale, const MaybeTensor& dh, const MaybeTensor& dx, at::Tensor& dweight) {
  check_norm(h, weight, {&dnormed, &dsum, &dh, &dx});
  const int64_t width = h.size(-1), rows = h.numel() / width, parts = (rows + kRowsAPart - 1) / kRowsAPart;
  TORCH_CHECK_VALUE(dweight.numel() == width && dweight.scalar_type() == at::kFloat && dweight.is_contiguous(),
                    "add_rms_norm: dweight must be (D) float32");
  const Dropout dropout(width, row_key, column_key, limit, scale);
  std::vector<float> partial(parts * width, 0.0f);  // sums of a fixed number of rows: the same on any number of threads
  by_dtype("add_rms_norm", h, [&](auto* entry) {
    using T = std::remove_pointer_t<decltype(entry)>;
    const auto one_row = STAR_FAST_HERE(add_rms_norm_backward_row);
    for_rows(parts, kRowsAPart * width, [&](int64_t part) {
      for (int64_t row = part * kRowsAPart; row < std::min(rows, (part + 1) * kRowsAPart); ++row)
        one_row(row_of<T>(h, row, width), row_of<T>(weight, 0, width), row_of<T>(dnormed, row, width),
                row_of<T>(dsum, row, width), float(eps), int(width), dropout.of(row), row_to<T>(dh, row, width),
                row_to<T>(dx, row, width), partial.data() + part * width);
    });
  });
  float* total = dweight.mutable_data_ptr<float>();
  std::fill_n(total, width, 0.0f);
  for (int64_t part = 0; part < parts; ++part)
    for (int64_t e = 0; e < width; ++e) total[e] += partial[part * width + e];
}

void check_swiglu(const at::Tensor& w1w3, const at::Tensor& out) {
  TORCH_CHECK_VALUE(w1w3.dim() >= 1 && out.dim() == w1w3.dim() && out.size(-1) > 0 &&
                        out.size(-1) % baseline::kLanes == 0 && w1w3.size(-1) == 2 * out.size(-1) &&
                        w1w3.numel() == 2 * out.numel() && w1w3.is_contiguous() && out.is_contiguous() &&
                        w1w3.scalar_type() == out.scalar_type(),
                    "swiglu: tensors do not fit together, or the width is no multiple of 16");
}

void swiglu_cpu(const at::Tensor& w1w3, at::Tensor& out) {
  check_swiglu(w1w3, out);
  const int64_t width = out.size(-1);
  by_dtype("swiglu", w1w3, [&](auto* entry) {
    using T = std::remove_pointer_t<decltype(entry)>;
    const auto one_row = STAR_FAST_HERE(swiglu_row);
    for_rows(out.numel() / width, 3 * width,
             [&](int64_t row) { one_row(row_of<T>(w1w3, row, 2 * width), int(width), row_to<T>(out, row, width)); });
  });
}

void swiglu_backward_cpu(const at::Tensor& w1w3, const at::Tensor& dout, at::Tensor& dw1w3) {
  check_swiglu(w1w3, dout);
  TORCH_CHECK_VALUE(fits(dw1w3, w1w3), "swiglu: dw1w3 must be like w1w3");
  const int64_t width = dout.size(-1);
  by_dtype("swiglu", w1w3, [&](auto* entry) {
    using T = std::remove_pointer_t<decltype(entry)>;
    const auto one_row = STAR_FAST_HERE(swiglu_backward_row);
    for_rows(dout.numel() / width, 5 * width, [&](int64_t row) {
      one_row(row_of<T>(w1w3, row, 2 * width), row_of<T>(dout, row, width), int(width),
              row_to<T>(dw1w3, row, 2 * width));
    });
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(star_fast, CPU, m) {
  m.impl("add_rms_norm", &add_rms_norm_cpu);
  m.impl("add_rms_norm_backward", &add_rms_norm_backward_cpu);
  m.impl("swiglu", &swiglu_cpu);
  m.impl("swiglu_backward", &swiglu_backward_cpu);
}

}  // namespace star_fast
