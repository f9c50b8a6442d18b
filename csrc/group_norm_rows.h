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

STAR_FAST_INLINE Lanes silu_of(const Lanes& x) {
  const Lanes small = exp_of(x < 0.0f ? x : -x);  // e^-|x|: never overflows
  return x * ((x < 0.0f ? small : small * 0.0f + 1.0f) / (small + 1.0f));
}

// out = x * scale + shift, through SiLU if asked for.
template <class T>
static void part_scaled(const T* x, int rows, int width, const float* scale, const float* shift, bool silu, T* out) {
  for (int row = 0; row < rows; ++row, x += width, out += width) {
    for (int e = 0; e < width; e += kLanes) {
      const Lanes normed = load(x + e) * load(scale + e) + load(shift + e);
      store(silu ? silu_of(normed) : normed, out + e);
    }
  }
}
