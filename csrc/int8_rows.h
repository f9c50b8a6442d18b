// What stands around an 8-bit product, one row at a time: rotating it, rounding it to unsigned 8 bits
// with one scale, and turning sums back into numbers. int8_cpu.cpp
// includes this file once per instruction set, inside a namespace of its own, after lanes.h. Knows no torch.

typedef uint32_t UintLanes __attribute__((vector_size(4 * kLanes)));

constexpr int kZeroPoint = 128;          // the code of 0
constexpr float kLargestCode = 127.0f;   // of a row's largest entry, counted from the zero point
constexpr float kTakenForZero = 1e-35f;  // a row whose largest entry is smaller has no scale that float32 can invert

// The larger of `largest` and the bits of |x|, which are ordered as the numbers are, infinity and NaN above all others.
STAR_FAST_INLINE IntLanes larger(const IntLanes& largest, const Lanes& x) {
  const IntLanes magnitude = same_bits<IntLanes>(x) & 0x7fffffff;
  return magnitude > largest ? magnitude : largest;
}

// round(x * inverse) + kZeroPoint in the low byte, for |x * inverse| <= 127, ties to even: the sum's last bit is
// worth 1.
STAR_FAST_INLINE UintLanes code_of(const Lanes& x, float inverse) {
  return same_bits<UintLanes>(x * inverse + (12582912.0f + kZeroPoint));
}

// The codes of kBlock entries, in the order of int8_product.h: no byte changes its lane.
STAR_FAST_INLINE void store_codes(const float* x, float inverse, uint8_t* at) {
  const UintLanes codes = (code_of(load(x), inverse) & 0xffu) | (code_of(load(x + kLanes), inverse) & 0xffu) << 8 |
                          (code_of(load(x + 2 * kLanes), inverse) & 0xffu) << 16 |
                          code_of(load(x + 3 * kLanes), inverse) << 24;
  std::memcpy(at, &codes, sizeof(codes));
}

// Every 16 entries of a group that are 16 apart times the Hadamard matrix of size 16: sums and differences of
// neighbours at distance 1, 2, 4, 8.
template <class T>
STAR_FAST_INLINE void rotate(const T* x, Lanes* rotated) {
  for (int part = 0; part < kGroup / kLanes; ++part) rotated[part] = load(x + part * kLanes);
  for (int distance = 1; distance < kGroup / kLanes; distance *= 2)
    for (int part = 0; part < kGroup / kLanes; ++part)
      if (!(part & distance)) {
        const Lanes first = rotated[part], second = rotated[part + distance];
        rotated[part] = first + second;
        rotated[part + distance] = first - second;
      }
}

// rotated x ~ (codes - kZeroPoint) * scale. Codes in blocks of kBlock, `block_stride` bytes apart, the last group
// filled up; `rotated` has room for them as floats. Returns the scale: largest / 127, 0 for a row of zeros, NaN (and
// codes of no meaning) for one that is not finite.
template <class T>
static float round_row(const T* x, int width, uint8_t* codes, int64_t block_stride, float* rotated) {
  const int rest = width % kGroup, padded = width - rest + (rest ? kGroup : 0);
  T last[kGroup] = {};
  std::memcpy(last, x + width - rest, rest * sizeof(T));
  IntLanes largest = {};
  for (int e = 0; e < padded; e += kGroup) {
    Lanes group[kGroup / kLanes];
    rotate(e + kGroup <= width ? x + e : last, group);
    for (int part = 0; part < kGroup / kLanes; ++part) {
      largest = larger(largest, group[part]);
      store(group[part], rotated + e + part * kLanes);
    }
  }
  int32_t top = 0;
  for (int lane = 0; lane < kLanes; ++lane) top = largest[lane] > top ? largest[lane] : top;
  const bool finite = top < 0x7f800000;
  const float most = same_bits<float>(top);
  const float inverse = finite && most >= kTakenForZero ? kLargestCode / most : 0.0f;
  for (int e = 0; e < padded; e += kBlock) store_codes(rotated + e, inverse, codes + e / kBlock * block_stride);
  return !finite ? same_bits<float>(0x7fc00000) : inverse == 0.0f ? 0.0f : most / kLargestCode;
}

// out[row] = (sums[row] - correction) * weight_scale * scale[row], in this order, rounded once, for the first `count`
// of 16 columns.
template <class T>
static void store_rows(const int32_t* sums, int64_t sums_stride, int rows, const int32_t* correction,
                       const float* weight_scale, const float* scale, int count, T* out, int64_t out_stride) {
  const Lanes column_scale = load(weight_scale);
  IntLanes zero;
  std::memcpy(&zero, correction, sizeof(zero));
  for (int row = 0; row < rows; ++row) {
    IntLanes sum;
    std::memcpy(&sum, sums + row * sums_stride, sizeof(sum));
    const Lanes value = __builtin_convertvector(sum - zero, Lanes) * column_scale * scale[row];
    if (count == kLanes) {
      store(value, out + row * out_stride);
    } else {
      T whole[kLanes];
      store(value, whole);
      std::memcpy(out + row * out_stride, whole, count * sizeof(T));
    }
  }
}
