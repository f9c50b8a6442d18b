// Scores of a block of cached keys and weighted sums of cached values. Included once per instruction set, inside a
// namespace of its own (hence no #pragma once and no includes), after lanes.h; needs scalars.h, decode_step.h and,
// where STAR_FAST_VECTOR_BYTES (of the instruction set's integer products: 64, 32, 16, or 0 for none by name) is not 0,
// <immintrin.h>. Knows no torch.
//
// Sums are float32, those of an 8-bit cache exact integers, in an order that depends on the shape alone: every
// instruction set gives the same bits.

typedef uint32_t WordLanes __attribute__((vector_size(4 * kLanes)));
static_assert(kBlock == kLanes, "a block of positions is one vector");

STAR_FAST_INLINE WordLanes words(const void* at) {
  WordLanes lanes;
  std::memcpy(&lanes, at, sizeof(lanes));
  return lanes;
}

// Into the second-level cache: a head's keys and values together are larger than the first.
STAR_FAST_INLINE void ask_for(const void* at, int64_t bytes) {
  for (int64_t byte = 0; byte < bytes; byte += 64) __builtin_prefetch(static_cast<const char*>(at) + byte, 0, 2);
}

// --- float32 and bfloat16 ---

STAR_FAST_INLINE Lanes block_scores(const float* query, const float* block, int size) {
  Lanes even = {}, odd = {};
  for (int e = 0; e < size; e += 2) {
    even += load(block + e * kLanes) * query[e];
    odd += load(block + (e + 1) * kLanes) * query[e + 1];
  }
  return even + odd;
}

// A pair of entries is one word: the first its low half, the second its high half; either is a float32 once the other
// is gone.
STAR_FAST_INLINE Lanes block_scores(const float* query, const Bfloat16Bits* block, int size) {
  Lanes sums[4] = {};
  const auto add_pair = [&](int e, Lanes& even, Lanes& odd) __attribute__((always_inline)) {
    const WordLanes pairs = words(block + e * kLanes);
    even += same_bits<Lanes>(pairs << 16) * query[e];
    odd += same_bits<Lanes>(pairs & 0xffff0000u) * query[e + 1];
  };
  int e = 0;
  for (; e + 4 <= size; e += 4) {  // four sums: an addition takes longer than the next one waits
    add_pair(e, sums[0], sums[1]);
    add_pair(e + 2, sums[2], sums[3]);
  }
  if (e < size) add_pair(e, sums[0], sums[1]);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// out[i] = share * sum over s < n of weights[s] values[s][i], i < kVectors * kLanes; `next` is asked for on the way.
template <int kVectors, class Cached>
STAR_FAST_INLINE void weighted_sum(const float* weights, const Cached* values, int64_t width, int n, float share,
                                   const Cached* next, float* out) {
  Lanes sums[kVectors] = {};
  for (int s = 0; s < n; ++s) {
    ask_for(next + s * width, kVectors * kLanes * sizeof(Cached));
    for (int i = 0; i < kVectors; ++i) sums[i] += load(values + s * width + i * kLanes) * weights[s];
  }
  for (int i = 0; i < kVectors; ++i) store(sums[i] * share, out + i * kLanes);
}

// --- int8: products with whole numbers of 15 bits and a sign ---

constexpr float kLargestWhole = 32767.0f;
constexpr int kExactSum = 512;  // so many products of 127 and kLargestWhole fit 32 bits

// What four 8-bit numbers in a word are multiplied by, as pairs of 16 bits: numbers 0 and 2 in the low half, 1 and 3 in
// the high half.
typedef uint64_t FourWholes;

// x / largest * kLargestWhole, rounded; n is a multiple of kLanes, no |x| is larger than `largest`.
static void to_wholes(const float* x, int n, float largest, FourWholes* wholes) {
  const float scale = largest > 0.0f ? kLargestWhole / largest : 0.0f;
  for (int i = 0; i < n; i += kLanes) {
    const IntLanes rounded =
        __builtin_convertvector(load(x + i) * scale + (kLargestWhole + 1.5f), IntLanes) - int32_t(kLargestWhole + 1.0f);
    uint64_t two[kLanes / 2];
    const uint64_t low = 0x0000ffff0000ffff;
    std::memcpy(two, &rounded, sizeof(two));
    for (int j = 0; j < kLanes / 4; ++j) wholes[i / 4 + j] = (two[2 * j] & low) | (two[2 * j + 1] & low) << 16;
  }
}

// Sixteen sums a[0] b[0] + a[1] b[1] of 16-bit numbers; `b` is one pair for all.
STAR_FAST_INLINE IntLanes pair_products(const WordLanes& a, int32_t b) {
#if STAR_FAST_VECTOR_BYTES == 64
  return same_bits<IntLanes>(_mm512_madd_epi16(same_bits<__m512i>(a), _mm512_set1_epi32(b)));
#elif STAR_FAST_VECTOR_BYTES == 32
  __m256i parts[2];
  std::memcpy(parts, &a, sizeof(a));
  for (__m256i& part : parts) part = _mm256_madd_epi16(part, _mm256_set1_epi32(b));
  return same_bits<IntLanes>(parts);
#elif STAR_FAST_VECTOR_BYTES == 16
  __m128i parts[4];
  std::memcpy(parts, &a, sizeof(a));
  for (__m128i& part : parts) part = _mm_madd_epi16(part, _mm_set1_epi32(b));
  return same_bits<IntLanes>(parts);
#else
  const IntLanes both = same_bits<IntLanes>(a);
  return (both << 16 >> 16) * int32_t(int16_t(b)) + (both >> 16) * (b >> 16);
#endif
}

STAR_FAST_INLINE IntLanes four_products(const int8_t* at, FourWholes by) {
  typedef int16_t HalfWords __attribute__((vector_size(4 * kLanes)));
  const HalfWords both = same_bits<HalfWords>(words(at));
  return pair_products(same_bits<WordLanes>(both << 8 >> 8), int32_t(by)) +
         pair_products(same_bits<WordLanes>(both >> 8), int32_t(by >> 32));
}

STAR_FAST_INLINE Lanes block_scores(const FourWholes* query, const int8_t* block, int size) {
  IntLanes even = {}, odd = {};
  for (int e = 0; e < size; e += 8) {
    even += four_products(block + e * kLanes, query[e / 4]);
    if (e + 4 < size) odd += four_products(block + (e + 4) * kLanes, query[e / 4 + 1]);
  }
  return __builtin_convertvector(even + odd, Lanes);
}

template <int kVectors>
STAR_FAST_INLINE void weighted_sum(const FourWholes* weights, const int8_t* values, int64_t width, int n, float share,
                                   const int8_t* next, float* out) {
  Lanes sums[kVectors] = {};
  for (int begin = 0; begin < n; begin += kExactSum) {
    const int end = n < begin + kExactSum ? n : begin + kExactSum;
    IntLanes exact[kVectors] = {};
    for (int s = begin; s < end; s += 4) {
      ask_for(next + s * width, kVectors * kLanes * 4);
      for (int i = 0; i < kVectors; ++i) exact[i] += four_products(values + s * width + i * kLanes * 4, weights[s / 4]);
    }
    for (int i = 0; i < kVectors; ++i) sums[i] += __builtin_convertvector(exact[i], Lanes);
  }
  for (int i = 0; i < kVectors; ++i) store(sums[i] * share, out + i * kLanes);
}

// All of a head's entries: as many vectors at once as keep their sums in registers.
template <class Weight, class Cached>
STAR_FAST_INLINE void weighted_sums(const Weight* weights, const Cached* values, int64_t width, int n, float share,
                                    const Cached* next, float* out) {
  constexpr int kEach = Layout<Cached>::kTogether;
  int64_t e = 0;
  for (; e + 4 * kLanes <= width; e += 4 * kLanes)
    weighted_sum<4>(weights, values + e * kEach, width, n, share, next + e * kEach, out + e);
  if (e + 2 * kLanes <= width) {
    weighted_sum<2>(weights, values + e * kEach, width, n, share, next + e * kEach, out + e);
    e += 2 * kLanes;
  }
  if (e < width) weighted_sum<1>(weights, values + e * kEach, width, n, share, next + e * kEach, out + e);
}
