// The maths of one token's choice: guidance, weight, order, cut and draw (star_fast/ops/sample_tokens.py states the
// five steps). Host and device; knows no torch. Every function gives the same bits everywhere: float operations are
// rounded one by one (device intrinsics that the compiler may not fuse; the host compiles with -ffp-contract=off), and
// everything that is summed is an integer, so that no order can matter.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "philox.h"

namespace star_fast {

constexpr int kMaxVocab = 65536;    // 2^16 weights of at most 2^40: every sum stays below 2^57
constexpr int kWeightBits = 40;     // the largest logit weighs 2^40
constexpr int kBinsPerOctave = 48;  // bins of weights for the search of a cut: a factor 2^(1/48) each
constexpr int kBins = 2048;  // 42.7 octaves; all that is lighter than 2^-42 falls into the last bin, and weighs 0

// What the caller asked for, in the numbers that the rows need.
struct Settings {
  float guidance;       // acts where a row without the condition is given
  float scale;          // log2(e) / temperature
  bool greedy;          // temperature 0: the largest logit
  bool restrict_count;  // top-k is on ...
  uint32_t top_k;       // ... and keeps so many
  bool restrict_mass;   // top-p is on ...
  uint64_t top_p;       // ... and keeps this share, in units of 2^-64
};

inline Settings make_settings(double temperature, int64_t top_k, double top_p, double guidance, int64_t vocab) {
  Settings s{};
  s.guidance = float(guidance);
  s.greedy = temperature == 0;
  s.scale = s.greedy ? 0.0f : float(1.4426950408889634 / temperature);
  s.restrict_count = top_k > 0 && top_k < vocab;
  s.top_k = s.restrict_count ? uint32_t(top_k) : 0;
  s.restrict_mass = top_p < 1;
  s.top_p = s.restrict_mass ? uint64_t(std::ldexp(top_p, 64)) : 0;
  return s;
}

STAR_FAST_BOTH uint32_t bits_of(float x) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(x);
#else
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

STAR_FAST_BOTH float float_of(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

// One rounding each, never fused.
STAR_FAST_BOTH float times(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

STAR_FAST_BOTH float plus(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

// Logits as they lie in memory, and as float32 (exact for all three).
struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

STAR_FAST_BOTH float to_float(float x) { return x; }

STAR_FAST_BOTH float to_float(Bfloat16 x) { return float_of(uint32_t{x.bits} << 16); }

STAR_FAST_BOTH float to_float(Float16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  const uint32_t normal = (magnitude << 13) + (112u << 23);  // exponent bias 127 instead of 15
  const uint32_t special = (magnitude << 13) | 0x7f800000u;  // infinities and NaN
  const uint32_t subnormal = bits_of(times(float(int(magnitude)), 0x1p-24f));
  const uint32_t bits = magnitude >= 0x7c00u ? special : magnitude < 0x0400u ? subnormal : normal;
  return float_of(bits | sign);
}

// Classifier-free guidance; a token without a chance under the condition keeps none (and makes no NaN of two
// infinities).
STAR_FAST_BOTH float guide(float cond, float uncond, float guidance) {
  const float mixed = plus(uncond, times(guidance, plus(cond, -uncond)));
  return cond == -INFINITY ? cond : mixed;
}

// log2 of a weight relative to the largest, at most 0; at and below -64 nothing changes any more.
STAR_FAST_BOTH float exponent(float logit, float largest, float scale) {
  const float z = times(plus(logit, -largest), scale);
  return z > -64.0f ? z : -64.0f;
}

// 2^(z + 40) in float32, -64 <= z <= 0: 2^n from the exponent bits times a polynomial in f = z - n of relative error
// 2e-7 (ops/sample_tokens.py, `weights`).
STAR_FAST_BOTH float power(float z) {
  const float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it leaves no bits below 1
  const float shifted = plus(z, to_integer);
  const float f = plus(z, -plus(shifted, -to_integer));
  float p = 0.001326472731307149f;
  p = plus(times(p, f), 0.009671512991189957f);
  p = plus(times(p, f), 0.05550733581185341f);
  p = plus(times(p, f), 0.24022242426872253f);
  p = plus(times(p, f), 0.6931470036506653f);
  p = plus(times(p, f), 1.0f);
  const uint32_t n = bits_of(shifted) - bits_of(to_integer);
  return times(p, float_of((n + (kWeightBits + 127)) << 23));
}

// Rounded to the nearest integer, ties to even.
STAR_FAST_BOTH uint64_t rounded(float x) {
#if defined(__CUDA_ARCH__)
  return __float2ull_rn(x);
#else
  const double shifted = double(x) + 0x1p52;  // leaves no bits below 1; unlike a conversion this vectorises everywhere
  uint64_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  return bits - 0x4330000000000000u;
#endif
}

// Step 2, the integer weight of a token.
STAR_FAST_BOTH uint64_t weight(float z) { return rounded(power(z)); }

// Which of the kBins a token falls into; never falls as the logit falls.
STAR_FAST_BOTH int32_t bin_of(float z) {
  const int32_t bin = int32_t(times(z, -float(kBinsPerOctave)));
  return bin < kBins - 1 ? bin : kBins - 1;
}

// An unsigned key in the order of the logits; both zeros have the same key.
STAR_FAST_BOTH uint32_t key_of(float logit) {
  const uint32_t bits = bits_of(plus(logit, 0.0f));
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// floor(fraction * total / 2^64).
STAR_FAST_BOTH uint64_t multiply_high(uint64_t fraction, uint64_t total) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(fraction, total);
#else
  return uint64_t((static_cast<unsigned __int128>(fraction) * total) >> 64);
#endif
}

}  // namespace star_fast
