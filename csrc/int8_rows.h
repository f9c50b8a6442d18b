// What stands around an 8-bit matrix product, one row at a time: rounding a row to unsigned 8 bits with one scale, and scaling the product's row back.
// int8_cpu.cpp includes this file once per instruction set, inside a namespace of its own, after lanes.h. Knows no torch.

typedef uint32_t UintLanes __attribute__((vector_size(4 * kLanes)));

constexpr int kZeroPoint = 128;         // the code of 0
constexpr float kLargestCode = 127.0f;  // of a row's largest entry, counted from the zero point
constexpr float kTakenForZero = 1e-35f;  // a row whose largest entry is smaller has no scale that float32 can invert

// `count` < kLanes entries, and zeros after them.
template <class T>
STAR_FAST_INLINE Lanes load_first(const T* at, int count) {
  T whole[kLanes] = {};
  std::memcpy(whole, at, count * sizeof(T));
  return load(whole);
}

template <class T>
STAR_FAST_INLINE void store_first(const Lanes& lanes, T* at, int count) {
  T whole[kLanes];
  store(lanes, whole);
  std::memcpy(at, whole, count * sizeof(T));
}

// The larger of `largest` and the bits of |x|, which are ordered as the numbers are, infinity and NaN above all others.
STAR_FAST_INLINE IntLanes larger(const IntLanes& largest, const Lanes& x) {
  const IntLanes magnitude = same_bits<IntLanes>(x) & 0x7fffffff;
  return magnitude > largest ? magnitude : largest;
}

// round(x * inverse) + kZeroPoint for |x * inverse| <= 127, ties to even: the sum's last bit is worth 1, so its low byte is the code.
STAR_FAST_INLINE void store_codes(const Lanes& x, float inverse, uint8_t* at) {
  typedef uint8_t Raw __attribute__((vector_size(kLanes)));
  typedef uint16_t Wide __attribute__((vector_size(2 * kLanes)));  // in two steps, as in lanes.h
  const UintLanes bits = same_bits<UintLanes>(x * inverse + (12582912.0f + kZeroPoint));
  const Raw raw = __builtin_convertvector(__builtin_convertvector(bits & 0xffu, Wide), Raw);
  std::memcpy(at, &raw, sizeof(raw));
}

// x ~ (codes - kZeroPoint) * scale; returns the scale: max|x| / 127, 0 for a row of zeros, NaN (and codes of no meaning) for one that is not finite.
template <class T>
static float round_row(const T* x, int width, uint8_t* codes) {
  const int rest = width % kLanes, whole = width - rest;
  IntLanes largest = {};
  for (int e = 0; e < whole; e += kLanes) largest = larger(largest, load(x + e));
  if (rest) largest = larger(largest, load_first(x + whole, rest));
  int32_t top = 0;
  for (int lane = 0; lane < kLanes; ++lane) top = largest[lane] > top ? largest[lane] : top;
  const float most = same_bits<float>(top);
  const float inverse = most < kTakenForZero || top >= 0x7f800000 ? 0.0f : kLargestCode / most;
  for (int e = 0; e < whole; e += kLanes) store_codes(load(x + e), inverse, codes + e);
  if (rest) {
    uint8_t last[kLanes];
    store_codes(load_first(x + whole, rest), inverse, last);
    std::memcpy(codes + whole, last, rest);
  }
  return top >= 0x7f800000 ? same_bits<float>(0x7fc00000) : inverse == 0.0f ? 0.0f : most / kLargestCode;
}

// out = product * scale, rounded once; `out` may be the product itself.
template <class T>
static void scale_row(const float* product, float scale, int width, T* out) {
  const int rest = width % kLanes, whole = width - rest;
  for (int e = 0; e < whole; e += kLanes) store(load(product + e) * scale, out + e);
  if (rest) store_first(load_first(product + whole, rest) * scale, out + whole, rest);
}
