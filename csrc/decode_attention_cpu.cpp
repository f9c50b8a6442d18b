// decode_attention on the CPU: rotary, append and attention in one pass, rows and heads over threads. Semantics:
// star_fast/ops/decode_attention.py.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#ifdef __x86_64__
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#include "decode_step.h"
#include "instruction_sets.h"
#include "scalars.h"

// Vectors wider than the target's registers are passed between functions that are always inlined: no ABI is involved.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace star_fast {
namespace {

#define STAR_FAST_ROWS "attend_row.h"
#include "each_instruction_set.h"

template <class T, class Cached>
using AttendRows = void (*)(const Step<T, Cached>&, int64_t, int64_t);

template <class T, class Cached>
AttendRows<T, Cached> attend_rows_here() {
#ifdef STAR_FAST_X86
  if (widest_set() == WidestSet::avx512) return avx512::attend_rows<T, Cached>;
  if (widest_set() == WidestSet::avx2) return avx2::attend_rows<T, Cached>;
#endif
  return baseline::attend_rows<T, Cached>;
}

template <class T, class Cached>
void attend(const at::Tensor& qkv, at::Tensor& k, at::Tensor& v, float* k_scales, float* v_scales, int64_t position,
            const float* table, at::Tensor& out) {
  Step<T, Cached> step{};
  step.qkv = static_cast<const T*>(qkv.const_data_ptr());
  step.row_stride = qkv.stride(0);
  step.part_stride = qkv.stride(1);
  step.head_stride = qkv.stride(2);
  step.heads = qkv.size(2);
  step.size = int(qkv.size(3));
  step.keys = static_cast<Cached*>(k.mutable_data_ptr());
  step.values = static_cast<Cached*>(v.mutable_data_ptr());
  step.key_scales = k_scales;
  step.value_scales = v_scales;
  step.blocks = k.size(2);
  step.position = position;
  step.angles = table ? table + position * step.size : nullptr;
  step.out = static_cast<T*>(out.mutable_data_ptr());
  const AttendRows<T, Cached> attend_rows = attend_rows_here<T, Cached>();
  const int64_t worth_a_thread = std::max<int64_t>(1, 32768 / ((position + 1) * step.size));
  at::parallel_for(0, qkv.size(0) * step.heads, worth_a_thread,
                   [&](int64_t begin, int64_t end) { attend_rows(step, begin, end); });
}

template <class Cached>
void check_layout(const at::Tensor& qkv, const at::Tensor& k, const at::Tensor& v) {
  using At = Layout<Cached>;
  const int64_t rows = qkv.size(0), heads = qkv.size(2), blocks = k.dim() == 6 ? k.size(2) : 0;
  const int size = int(qkv.size(3));
  const int64_t keys[] = {rows, heads, blocks, rounded_up(size, At::kGroup) / At::kGroup, kBlock, At::kGroup};
  const int64_t values[] = {rows, heads, blocks * kBlock / At::kTogether, At::width(size), At::kTogether};
  TORCH_CHECK_VALUE(k.sizes() == at::IntArrayRef(keys) && v.sizes() == at::IntArrayRef(values) && k.is_contiguous() &&
                        v.is_contiguous(),
                    "decode_attention: a blocked cache for qkv ", qkv.sizes(), " has k ", at::IntArrayRef(keys),
                    " and v ", at::IntArrayRef(values), ", got ", k.sizes(), " and ", v.sizes());
}

void decode_attention_cpu(const at::Tensor& qkv, at::Tensor& k, at::Tensor& v, const std::optional<at::Tensor>& k_scale,
                          const std::optional<at::Tensor>& v_scale, int64_t position,
                          const std::optional<at::Tensor>& rotary, at::Tensor& out) {
  // The public function has checked all this and says it in better words; these checks keep the loops inside their
  // memory whoever calls.
  TORCH_CHECK_VALUE(qkv.dim() == 4 && qkv.size(1) == 3 && qkv.stride(3) == 1 && qkv.size(3) % 2 == 0 &&
                        qkv.size(3) <= baseline::kExactSum,
                    "decode_attention: qkv must be (R, 3, H, E), E even and at most ", baseline::kExactSum, ", got ",
                    qkv.sizes());
  const bool eight_bit = k.scalar_type() == at::kChar;
  TORCH_CHECK_TYPE((eight_bit || k.scalar_type() == qkv.scalar_type()) && v.scalar_type() == k.scalar_type(),
                   "decode_attention: a cache of ", k.scalar_type(), " and ", v.scalar_type(), " with qkv of ",
                   qkv.scalar_type());
  if (eight_bit) check_layout<int8_t>(qkv, k, v);
  else if (k.scalar_type() == at::kBFloat16) check_layout<Bfloat16Bits>(qkv, k, v);
  else check_layout<float>(qkv, k, v);
  TORCH_CHECK_VALUE(position >= 0 && position < k.size(2) * kBlock, "decode_attention: position ", position,
                    " is outside the cache ", k.sizes());
  TORCH_CHECK_VALUE(out.dim() == 3 && out.size(0) == qkv.size(0) && out.size(1) == qkv.size(2) &&
                        out.size(2) == qkv.size(3) && out.is_contiguous() && out.scalar_type() == qkv.scalar_type(),
                    "decode_attention: out ", out.sizes(), " does not fit qkv ", qkv.sizes());
  const auto scales = [&](const std::optional<at::Tensor>& scale) -> float* {
    if (!eight_bit) return nullptr;
    TORCH_CHECK_VALUE(scale && scale->scalar_type() == at::kFloat && scale->is_contiguous() &&
                          scale->numel() == qkv.size(0) * qkv.size(2) * k.size(2) * kBlock,
                      "decode_attention: an int8 cache needs float32 scales, one for each row, head and position");
    return scale->mutable_data_ptr<float>();
  };
  float *k_scales = scales(k_scale), *v_scales = scales(v_scale);
  if (rotary) {
    TORCH_CHECK_VALUE(rotary->scalar_type() == at::kFloat && rotary->is_contiguous() &&
                          rotary->numel() >= (position + 1) * qkv.size(3),
                      "decode_attention: rotary must be float32 (T, E/2, 2), contiguous");
  }
  const float* table = rotary ? rotary->const_data_ptr<float>() : nullptr;
  if (qkv.scalar_type() == at::kFloat) {
    return eight_bit ? attend<float, int8_t>(qkv, k, v, k_scales, v_scales, position, table, out)
                     : attend<float, float>(qkv, k, v, k_scales, v_scales, position, table, out);
  }
  TORCH_CHECK_TYPE(qkv.scalar_type() == at::kBFloat16, "decode_attention: qkv must be float32 or bfloat16, got ",
                   qkv.scalar_type());
  return eight_bit ? attend<Bfloat16Bits, int8_t>(qkv, k, v, k_scales, v_scales, position, table, out)
                   : attend<Bfloat16Bits, Bfloat16Bits>(qkv, k, v, k_scales, v_scales, position, table, out);
}

}  // namespace

TORCH_LIBRARY_IMPL(star_fast, CPU, m) { m.impl("decode_attention_blocks", &decode_attention_cpu); }

}  // namespace star_fast
