// sample_tokens on the CPU: rows over threads, each row by the widest instruction set that PyTorch itself uses here
// (ATEN_CPU_CAPABILITY lowers it).
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "binding.h"
#include "instruction_sets.h"
#include "token_choice.h"

namespace star_fast {
namespace {

// The macro, since g++ sets its own (__AVX2__ ...) for a target pragma only when all preprocessing is over.
#define STAR_FAST_VECTOR_BITS 0
namespace baseline {
#include "sample_row.h"
}
#undef STAR_FAST_VECTOR_BITS

#ifdef STAR_FAST_X86
#define STAR_FAST_VECTOR_BITS 256
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,lzcnt")
namespace avx2 {
#include "sample_row.h"
}
#pragma GCC pop_options
#undef STAR_FAST_VECTOR_BITS
#define STAR_FAST_VECTOR_BITS 512
#pragma GCC push_options
#pragma GCC target("avx2,bmi,bmi2,lzcnt,avx512f,avx512bw,avx512dq,avx512vl,prefer-vector-width=512")
namespace avx512 {
#include "sample_row.h"
}
#pragma GCC pop_options
#undef STAR_FAST_VECTOR_BITS
#endif

// Rows begin ... end-1. Leaves the lowest row that cannot be drawn from in `bad`, if it is lower than what is there.
template <class T, class Scratch, class SampleRow>
void sample_rows(const Problem& p, int64_t begin, int64_t end, std::atomic<int64_t>& bad, const SampleRow& sample_row) {
  static thread_local Scratch scratch;
  const uint64_t seed = uint64_t(p.seed_at ? *p.seed_at : p.seed);
  const uint32_t position = uint32_t(p.position_at ? *p.position_at : p.position);
  for (int64_t row = begin; row < end; ++row) {
    const T* cond = static_cast<const T*>(p.logits) + row * p.logits_row_stride;
    const T* uncond = p.uncond ? static_cast<const T*>(p.uncond) + row * p.uncond_row_stride : nullptr;
    const int token =
        sample_row(cond, uncond, p.vocab, p.settings, uniform64(seed, uint64_t(p.image_index[row]), position), scratch);
    p.out[row] = token < 0 ? 0 : token;
    if (token < 0) {
      int64_t lowest = bad.load();
      while (row < lowest && !bad.compare_exchange_weak(lowest, row)) {}
    }
  }
}

template <class T>
void sample_rows_here(const Problem& p, int64_t begin, int64_t end, std::atomic<int64_t>& bad) {
  switch (widest_set()) {
#ifdef STAR_FAST_X86
    case WidestSet::avx512: return sample_rows<T, avx512::Scratch>(p, begin, end, bad, avx512::sample_row<T>);
    case WidestSet::avx2: return sample_rows<T, avx2::Scratch>(p, begin, end, bad, avx2::sample_row<T>);
#endif
    default: return sample_rows<T, baseline::Scratch>(p, begin, end, bad, baseline::sample_row<T>);
  }
}

void sample_tokens_cpu(const at::Tensor& logits, const std::optional<at::Tensor>& uncond, const at::Tensor& image_index,
                       const std::optional<at::Tensor>& seed_at, int64_t seed,
                       const std::optional<at::Tensor>& position_at, int64_t position, double temperature,
                       int64_t top_k, double top_p, double guidance, at::Tensor& out,
                       const std::optional<at::Tensor>& bad_rows) {
  const Problem p = make_problem(logits, uncond, image_index, seed_at, seed, position_at, position, temperature, top_k,
                                 top_p, guidance, out, bad_rows);
  std::atomic<int64_t> bad{p.rows};
  const int64_t rows_worth_a_thread = std::max<int64_t>(1, 8192 / p.vocab);
  at::parallel_for(0, p.rows, rows_worth_a_thread, [&](int64_t begin, int64_t end) {
    switch (p.type) {
      case LogitType::float32: return sample_rows_here<float>(p, begin, end, bad);
      case LogitType::bfloat16: return sample_rows_here<Bfloat16>(p, begin, end, bad);
      case LogitType::float16: return sample_rows_here<Float16>(p, begin, end, bad);
    }
  });
  TORCH_CHECK_VALUE(bad.load() == p.rows, "sample_tokens: row ", bad.load(),
                    " of the (guided) logits holds NaN or +inf, or nothing but -inf; ",
                    "every row needs a finite logit, and -inf only for excluded tokens");
}

}  // namespace

TORCH_LIBRARY_IMPL(star_fast, CPU, m) { m.impl("sample_tokens", &sample_tokens_cpu); }

}  // namespace star_fast
