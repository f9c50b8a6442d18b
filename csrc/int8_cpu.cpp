// A matrix product in 8 bits on the CPU: rows rounded, multiplied by packed weights, scaled back. Semantics:
// star_fast/ops/int8_linear.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/Utils.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "instruction_sets.h"
#include "int8_product.h"
#include "scalars.h"
#ifdef __x86_64__
#include <immintrin.h>
#endif

// Vectors wider than the target's registers are passed between functions that are always inlined: no ABI is involved.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace star_fast {
namespace {

#include "int8_each_set.h"

constexpr int64_t kEntriesWorthAThread = 16384;
constexpr int64_t kWeightsWorthAThread = 131072;

// What this machine multiplies 8 bits with.
enum class Dot { baseline, avx2, avx512, vnni, amx };

Dot widest_dot() {
  static const Dot widest = [] {
    if (widest_set() != WidestSet::avx512) return widest_set() == WidestSet::avx2 ? Dot::avx2 : Dot::baseline;
    if (!at::cpu::is_avx512_vnni_supported()) return Dot::avx512;
    return at::cpu::init_amx() ? Dot::amx : Dot::vnni;  // asks the kernel for the right to use it
  }();
  return widest;
}

#ifdef STAR_FAST_X86
#define STAR_FAST_HERE(function)                        \
  (widest_dot() == Dot::amx      ? &amx::function<T>    \
   : widest_dot() == Dot::vnni   ? &vnni::function<T>   \
   : widest_dot() == Dot::avx512 ? &avx512::function<T> \
   : widest_dot() == Dot::avx2   ? &avx2::function<T>   \
                                 : &baseline::function<T>)
#else
#define STAR_FAST_HERE(function) (&baseline::function<T>)
#endif

template <class T>
at::Tensor int8_linear_of(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& weight_scale,
                          const at::Tensor& correction, int64_t columns) {
  const int64_t rows = x.size(0), width = x.size(1);
  const at::Tensor out = at::empty({rows, columns}, x.options());
  Int8Product p{};
  p.weights = packed.const_data_ptr<int8_t>();
  p.weight_scale = weight_scale.const_data_ptr<float>();
  p.correction = correction.const_data_ptr<int32_t>();
  p.rows = rows;
  p.columns = columns;
  p.blocks = packed.size(1) * 4 / kBlock;
  const int64_t block_stride = p.padded_rows() * kBlock;
  const at::Tensor codes = at::empty({p.blocks, block_stride}, x.options().dtype(at::kByte));
  std::vector<float> scale(rows);
  const T* from = static_cast<const T*>(x.const_data_ptr());
  uint8_t* to = codes.mutable_data_ptr<uint8_t>();
  const auto round_row = STAR_FAST_HERE(round_row);
  at::parallel_for(0, rows, std::max<int64_t>(1, kEntriesWorthAThread / width), [&](int64_t begin, int64_t end) {
    std::vector<float> rotated(p.blocks * kBlock);
    for (int64_t row = begin; row < end; ++row)
      scale[row] = round_row(from + row * width, int(width), to + row * kBlock, block_stride, rotated.data());
  });
  p.codes = to;
  p.scale = scale.data();
  T* results = static_cast<T*>(out.mutable_data_ptr());
  const auto product_tiles = STAR_FAST_HERE(product_tiles);
  at::parallel_for(0, p.tiles(), std::max<int64_t>(1, kWeightsWorthAThread / (p.blocks * kBlock * kTile)),
                   [&](int64_t begin, int64_t end) { product_tiles(p, begin, end, results); });
  return out;
}

at::Tensor int8_linear_cpu(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& weight_scale,
                           const at::Tensor& correction, int64_t columns) {
  TORCH_CHECK_VALUE(packed.dim() == 4 && packed.size(2) == kTile && packed.size(3) == 4 &&
                        packed.size(1) % (kGroup / 4) == 0 && packed.is_contiguous() &&
                        packed.scalar_type() == at::kChar && x.dim() == 2 && x.numel() > 0 && x.is_contiguous() &&
                        (x.size(1) + kGroup - 1) / kGroup * kGroup == packed.size(1) * 4,
                    "int8_linear: x ", x.sizes(), " and packed weights ", packed.sizes(), " do not fit together");
  const int64_t padded = packed.size(0) * kTile;
  TORCH_CHECK_VALUE(
      columns > padded - kTile && columns <= padded && weight_scale.numel() == padded && weight_scale.is_contiguous() &&
          weight_scale.scalar_type() == at::kFloat && correction.numel() == padded && correction.is_contiguous() &&
          correction.scalar_type() == at::kInt,
      "int8_linear: ", columns, " columns, and scales and corrections of the padded ", padded, " are needed");
  if (x.scalar_type() == at::kFloat) return int8_linear_of<float>(x, packed, weight_scale, correction, columns);
  TORCH_CHECK_TYPE(x.scalar_type() == at::kBFloat16, "int8_linear: expected float32 or bfloat16, got ",
                   x.scalar_type());
  return int8_linear_of<Bfloat16Bits>(x, packed, weight_scale, correction, columns);
}

}  // namespace

TORCH_LIBRARY_IMPL(star_fast, CPU, m) { m.impl("int8_linear", &int8_linear_cpu); }

}  // namespace star_fast
