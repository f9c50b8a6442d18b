// Sixteen floats at a time, written once for every instruction set: GCC and Clang turn these vectors into what the
// target has. Included inside a namespace per instruction set (hence no #pragma once and no includes), after scalars.h.
// Knows no torch.

constexpr int kLanes = 16;  // floats handled together

typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef float HalfLanes __attribute__((vector_size(2 * kLanes)));
typedef float QuarterLanes __attribute__((vector_size(kLanes)));
typedef int32_t IntLanes __attribute__((vector_size(4 * kLanes)));

#define STAR_FAST_INLINE static inline __attribute__((always_inline))

template <class To, class From>
STAR_FAST_INLINE To same_bits(const From& from) {
  To to;
  static_assert(sizeof(to) == sizeof(from));
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

STAR_FAST_INLINE Lanes load(const float* at) {
  Lanes lanes;
  std::memcpy(&lanes, at, sizeof(lanes));
  return lanes;
}

STAR_FAST_INLINE Lanes load(const Bfloat16Bits* at) {
  typedef uint16_t Raw __attribute__((vector_size(2 * kLanes)));
  typedef uint32_t Wide __attribute__((vector_size(4 * kLanes)));
  Raw raw;
  std::memcpy(&raw, at, sizeof(raw));
  return same_bits<Lanes>(__builtin_convertvector(raw, Wide) << 16);
}

STAR_FAST_INLINE Lanes load(const int8_t* at) {
  typedef int8_t Raw __attribute__((vector_size(kLanes)));
  // In two steps: GCC 12 takes one step of four times the width entry by entry.
  typedef int16_t Wide __attribute__((vector_size(2 * kLanes)));
  Raw raw;
  std::memcpy(&raw, at, sizeof(raw));
  return __builtin_convertvector(__builtin_convertvector(__builtin_convertvector(raw, Wide), IntLanes), Lanes);
}

STAR_FAST_INLINE float sum_of(const Lanes& lanes) {
  HalfLanes halves[2];
  std::memcpy(halves, &lanes, sizeof(lanes));
  const HalfLanes half = halves[0] + halves[1];
  QuarterLanes quarters[2];
  std::memcpy(quarters, &half, sizeof(half));
  const QuarterLanes quarter = quarters[0] + quarters[1];
  return (quarter[0] + quarter[1]) + (quarter[2] + quarter[3]);
}

// 2^f on [-1/2, 1/2], by its Taylor series.
STAR_FAST_INLINE Lanes power_of_two(const Lanes& f) {
  Lanes power = f * 1.52527338e-5f + 1.54035304e-4f;
  power = power * f + 1.33335581e-3f;
  power = power * f + 9.61812911e-3f;
  power = power * f + 5.55041087e-2f;
  power = power * f + 2.40226507e-1f;
  power = power * f + 6.93147181e-1f;
  power = power * f + 1.0f;
  return power;
}

// e^x for x <= 0, relative error 1e-7; below -87 about 1e-38. NaN stays NaN.
STAR_FAST_INLINE Lanes exp_of(const Lanes& exponent) {
  const Lanes x = exponent < -87.0f ? Lanes{} - 87.0f : exponent;
  const Lanes z = x * 1.44269504f;
  const IntLanes n = __builtin_convertvector(z - 0.5f, IntLanes);  // cut towards 0: the nearest whole number, as z <= 0
  const Lanes f = z - __builtin_convertvector(n, Lanes);
  const Lanes power = power_of_two(f);
  return power * same_bits<Lanes>((n + 127) << 23);
}

// To nearest, ties to even.
STAR_FAST_INLINE void store(const Lanes& lanes, float* at) { std::memcpy(at, &lanes, sizeof(lanes)); }

STAR_FAST_INLINE void store(const Lanes& lanes, Bfloat16Bits* at) {
  typedef uint16_t Raw __attribute__((vector_size(2 * kLanes)));
  typedef uint32_t Wide __attribute__((vector_size(4 * kLanes)));
  const Wide bits = same_bits<Wide>(lanes);
  const Wide rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Wide kept = lanes != lanes ? (bits & 0u) + 0x7fc0u : rounded;
  const Raw raw = __builtin_convertvector(kept, Raw);
  std::memcpy(at, &raw, sizeof(raw));
}

STAR_FAST_INLINE void store(const IntLanes& lanes, int8_t* at) {
  typedef int16_t Narrow __attribute__((vector_size(2 * kLanes)));
  typedef int8_t Raw __attribute__((vector_size(kLanes)));
  const Raw raw = __builtin_convertvector(__builtin_convertvector(lanes, Narrow), Raw);
  std::memcpy(at, &raw, sizeof(raw));
}
