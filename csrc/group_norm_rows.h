// GroupNorm over pixels whose channels lie side by side, with or without SiLU: sums of a part of an image, and its scaled rows. group_norm_cpu.cpp includes
// this file once per instruction set, inside a namespace of its own, after lanes.h. Knows no torch. Everything is computed in float32.
//
// A row is one pixel, or as many as fill whole lanes together (two pixels of 24 channels are 48 entries).

constexpr int kColumns = 8;  // groups of lanes whose sums stay in registers: 128 channels in one sweep

// Of `kCount` groups of lanes over `rows` rows: sums of x - center, and of its square. The center (any number near the channel's mean) keeps the variance's
// digits where the mean is much larger than the deviation.
template <int kCount, class T>
STAR_FAST_INLINE void column_sums(const T* x, int rows, int width, const float* center, float* sums, float* squares) {
  Lanes near[kCount], sum[kCount] = {}, square[kCount] = {};
  for (int i = 0; i < kCount; ++i) near[i] = load(center + i * kLanes);
  for (int row = 0; row < rows; ++row, x += width) {
    for (int i = 0; i < kCount; ++i) {
      const Lanes away = load(x + i * kLanes) - near[i];
      sum[i] += away;
      square[i] += away * away;
    }
  }
  for (int i = 0; i < kCount; ++i) {
    store(sum[i], sums + i * kLanes);
    store(square[i], squares + i * kLanes);
  }
}

// `width` is a multiple of kLanes; `center`, `sums` and `squares` have `width` entries.
template <class T>
static void part_sums(const T* x, int rows, int width, const float* center, float* sums, float* squares) {
  int e = 0;
  for (; e + kColumns * kLanes <= width; e += kColumns * kLanes) column_sums<kColumns>(x + e, rows, width, center + e, sums + e, squares + e);
  for (; e < width; e += kLanes) column_sums<1>(x + e, rows, width, center + e, sums + e, squares + e);
}

// x / (1 + e^-x), with the digits that T keeps: relative error 1e-6 for float, 1e-4 for bfloat16. No division, and an exponential with no case apart, since
// arithmetic and not memory would bound the pass. Beyond +-40 the sigmoid stays what it is there: 1 or 4e-18. NaN stays NaN.
template <class T>
STAR_FAST_INLINE Lanes silu_of(const Lanes& x) {
  constexpr bool kAllDigits = sizeof(T) == 4;
  const Lanes low = x > -40.0f ? x : x * 0.0f - 40.0f;
  const Lanes z = (low < 40.0f ? low : low * 0.0f + 40.0f) * -1.44269504f;
  const Lanes shifted = z + 12582912.0f;  // 1.5 * 2^23: the nearest whole number ends in the last bits
  const Lanes f = z - (shifted - 12582912.0f);
  Lanes power = f * 9.61812911e-3f + 5.55041087e-2f;  // Taylor series of 2^f on [-1/2, 1/2]
  if (kAllDigits) {
    power = f * 1.52527338e-5f + 1.54035304e-4f;
    power = power * f + 1.33335581e-3f;
    power = power * f + 9.61812911e-3f;
    power = power * f + 5.55041087e-2f;
  }
  power = power * f + 2.40226507e-1f;
  power = power * f + 6.93147181e-1f;
  power = power * f + 1.0f;
  const Lanes whole = same_bits<Lanes>(same_bits<IntLanes>(power) + (same_bits<IntLanes>(shifted) << 23)) + 1.0f;
  Lanes inverse = same_bits<Lanes>(0x7ef311c7 - same_bits<IntLanes>(whole));  // within 5 %; each of Newton's steps squares the error
  for (int step = 0; step < (kAllDigits ? 3 : 2); ++step) inverse *= 2.0f - whole * inverse;
  return x * inverse;
}

// out = x * scale + shift, through SiLU if asked for.
template <class T>
static void part_scaled(const T* x, int rows, int width, const float* scale, const float* shift, bool silu, T* out) {
  for (int row = 0; row < rows; ++row, x += width, out += width) {
    for (int e = 0; e < width; e += kLanes) {
      const Lanes normed = load(x + e) * load(scale + e) + load(shift + e);
      store(silu ? silu_of<T>(normed) : normed, out + e);
    }
  }
}
