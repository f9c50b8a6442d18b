// GroupNorm over pixels whose channels lie side by side, with or without SiLU: sums of a part of an image, and its
// scaled rows. group_norm_cpu.cpp includes this file once per instruction set, inside a namespace of its own, after
// lanes.h. Knows no torch. Everything is computed in float32.
//
// A row is one pixel, or as many as fill whole blocks together (four pixels of 24 channels are 96 entries). A block of
// 32 entries is handled as two groups of lanes: of bfloat16 the even and the odd entries, which one shift and one mask
// take apart; of float the first and the second half. What belongs to a row's entries (centers, sums, scales) lies in
// the same order: entry_at.

constexpr int kBlock = 2 * kLanes;
constexpr int kColumns = 4;  // blocks whose sums stay in registers: 128 channels in one sweep

typedef uint32_t UintLanes __attribute__((vector_size(4 * kLanes)));

// Which entry of a row lies in a place of this order.
template <class T>
STAR_FAST_INLINE int entry_at(int place) {
  const int block = place / kBlock * kBlock, lane = place % kBlock;
  return sizeof(T) == 4 ? place : block + (lane < kLanes ? 2 * lane : 2 * (lane - kLanes) + 1);
}

struct Pair {
  Lanes first, second;
};

STAR_FAST_INLINE Pair load_pair(const float* at) { return {load(at), load(at + kLanes)}; }

STAR_FAST_INLINE Pair load_pair(const Bfloat16Bits* at) {
  UintLanes both;
  std::memcpy(&both, at, sizeof(both));
  return {same_bits<Lanes>(both << 16), same_bits<Lanes>(both & 0xffff0000u)};
}

STAR_FAST_INLINE void store_pair(const Pair& pair, float* at) {
  store(pair.first, at);
  store(pair.second, at + kLanes);
}

// To nearest, ties to even. NaN needs no care: those of arithmetic on bfloat16 have no last bits that rounding could
// carry over into the sign.
STAR_FAST_INLINE UintLanes rounded_bits(const Lanes& lanes) {
  const UintLanes bits = same_bits<UintLanes>(lanes);
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

STAR_FAST_INLINE void store_pair(const Pair& pair, Bfloat16Bits* at) {
  const UintLanes both = (rounded_bits(pair.first) >> 16) | (rounded_bits(pair.second) & 0xffff0000u);
  std::memcpy(at, &both, sizeof(both));
}

// Of `kCount` blocks over `rows` rows: sums of x - center, and of its square. The center (any number near the channel's
// mean) keeps the variance's digits where the mean is much larger than the deviation.
template <int kCount, class T>
STAR_FAST_INLINE void column_sums(const T* x, int rows, int width, const float* center, float* sums, float* squares) {
  Pair near[kCount], sum[kCount] = {}, square[kCount] = {};
  for (int i = 0; i < kCount; ++i) near[i] = load_pair(center + i * kBlock);
  for (int row = 0; row < rows; ++row, x += width) {
    for (int i = 0; i < kCount; ++i) {
      const Pair given = load_pair(x + i * kBlock);
      const Lanes first = given.first - near[i].first, second = given.second - near[i].second;
      sum[i].first += first;
      sum[i].second += second;
      square[i].first += first * first;
      square[i].second += second * second;
    }
  }
  for (int i = 0; i < kCount; ++i) {
    store_pair(sum[i], sums + i * kBlock);
    store_pair(square[i], squares + i * kBlock);
  }
}

// `width` is a multiple of kBlock; `center`, `sums` and `squares` have `width` entries.
template <class T>
static void part_sums(const T* x, int rows, int width, const float* center, float* sums, float* squares) {
  int e = 0;
  for (; e + kColumns * kBlock <= width; e += kColumns * kBlock)
    column_sums<kColumns>(x + e, rows, width, center + e, sums + e, squares + e);
  for (; e < width; e += kBlock) column_sums<1>(x + e, rows, width, center + e, sums + e, squares + e);
}

// x / (1 + e^-x), with the digits that T keeps: relative error 1e-6 for float, 1e-4 for bfloat16. No division, and an
// exponential with no case apart, since arithmetic and not memory bounds the pass. Beyond +-40 the sigmoid stays what
// it is there: 1 or 4e-18. NaN stays NaN.
template <class T>
STAR_FAST_INLINE Lanes silu_of(const Lanes& x) {
  const Lanes none = {}, least = none - 40.0f, most = none + 40.0f;
  const Lanes low = x > least ? x : least;
  const Lanes z = (low < most ? low : most) * -1.44269504f;
  const Lanes shifted = z + 12582912.0f;  // 1.5 * 2^23: the nearest whole number ends in the last bits
  const Lanes f = z - (shifted - 12582912.0f);
  Lanes power;  // 2^f on [-1/2, 1/2]
  if (sizeof(T) == 4) {
    power = power_of_two(f);
  } else {
    power = f * 5.517166e-2f + 2.4261115e-1f;  // least relative error of a cubic
    power = power * f + 6.9326099e-1f;
    power = power * f + 9.9992807e-1f;
  }
  const Lanes whole = same_bits<Lanes>(same_bits<IntLanes>(power) + (same_bits<IntLanes>(shifted) << 23)) + 1.0f;
  // Within 5 %; each of Newton's steps squares the error.
  Lanes inverse = same_bits<Lanes>(0x7ef311c7 - same_bits<IntLanes>(whole));
  for (int step = 0; step < (sizeof(T) == 4 ? 3 : 2); ++step) inverse *= 2.0f - whole * inverse;
  return x * inverse;
}

template <bool kSilu, class T>
STAR_FAST_INLINE void scaled_rows(const T* x, int rows, int width, const float* scale, const float* shift, T* out) {
  for (int row = 0; row < rows; ++row, x += width, out += width) {
    for (int e = 0; e < width; e += kBlock) {
      const Pair given = load_pair(x + e), by = load_pair(scale + e), to = load_pair(shift + e);
      const Lanes first = given.first * by.first + to.first, second = given.second * by.second + to.second;
      store_pair(kSilu ? Pair{silu_of<T>(first), silu_of<T>(second)} : Pair{first, second}, out + e);
    }
  }
}

// out = x * scale + shift, through SiLU if asked for; `out` may be `x`.
template <class T>
static void part_scaled(const T* x, int rows, int width, const float* scale, const float* shift, bool silu, T* out) {
  if (silu) return scaled_rows<true>(x, rows, width, scale, shift, out);
  scaled_rows<false>(x, rows, width, scale, shift, out);
}
