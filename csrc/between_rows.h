// What stands between a block's matrix products, one row at a time: residual add with RMSNorm, and SwiGLU. between_cpu.cpp includes this file once per
// instruction set, inside a namespace of its own, after lanes.h. Knows no torch. Everything is computed in float32.

STAR_FAST_INLINE Lanes rounded_to(const Lanes& lanes, const float*) { return lanes; }

STAR_FAST_INLINE Lanes rounded_to(const Lanes& lanes, const Bfloat16Bits*) {
  Bfloat16Bits bits[kLanes];
  store(lanes, bits);
  return load(bits);
}

// sum = round(residual + x); normed = round(round(sum / rms(sum)) * weight). `width` is a multiple of kLanes. `residual` may be null: then sum is x itself
// and nothing is written to `sum`.
template <class T>
static void add_rms_norm_row(const T* x, const T* residual, const T* weight, float eps, int width, T* normed, T* sum) {
  Lanes squares = {};
  for (int e = 0; e < width; e += kLanes) {
    Lanes h = load(x + e);
    if (residual) {
      h = rounded_to(h + load(residual + e), x);
      store(h, sum + e);
    }
    squares += h * h;
  }
  const float scale = 1.0f / std::sqrt(sum_of(squares) / float(width) + eps);
  const T* h_row = residual ? sum : x;
  for (int e = 0; e < width; e += kLanes) store(rounded_to(load(h_row + e) * scale, x) * load(weight + e), normed + e);
}

// out = a * sigmoid(a) * b for a row that holds a, then b, `width` entries each, a multiple of kLanes.
template <class T>
static void swiglu_row(const T* row, int width, T* out) {
  for (int e = 0; e < width; e += kLanes) {
    const Lanes a = load(row + e), b = load(row + width + e);
    const Lanes small = exp_of(a < 0.0f ? a : -a);  // e^-|a|: never overflows
    const Lanes sigmoid = (a < 0.0f ? small : small * 0.0f + 1.0f) / (small + 1.0f);
    store(a * sigmoid * b, out + e);
  }
}
