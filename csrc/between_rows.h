// What stands between a block's matrix products, one row at a time, with its gradients: residual add with dropout and
// RMSNorm, and SwiGLU. between_cpu.cpp includes this file once per instruction set, inside a namespace of its own,
// after lanes.h and dropout_row.h. Knows no torch. Everything is computed in float32.

typedef uint32_t UintLanes __attribute__((vector_size(4 * kLanes)));

STAR_FAST_INLINE Lanes dropped(const Lanes& lanes, const DropoutRow& dropout, int e) {
  UintLanes columns;
  std::memcpy(&columns, dropout.column_hashes + e, sizeof(columns));
  const IntLanes hash = same_bits<IntLanes>(hash_of(columns + dropout.row_hash));
  return hash < dropout.limit ? lanes * dropout.scale : lanes * 0.0f;
}

STAR_FAST_INLINE Lanes rounded_to(const Lanes& lanes, const float*) { return lanes; }

STAR_FAST_INLINE Lanes rounded_to(const Lanes& lanes, const Bfloat16Bits*) {
  Bfloat16Bits bits[kLanes];
  store(lanes, bits);
  return load(bits);
}

// sum = round(residual + dropout(x)); normed = round(round(sum / rms(sum)) * weight). `width` is a multiple of kLanes.
// `residual` may be null; without a residual and dropout the sum is x itself and nothing is written to `sum`.
template <class T>
static void add_rms_norm_row(const T* x, const T* residual, const T* weight, float eps, int width,
                             const DropoutRow& dropout, T* normed, T* sum) {
  const bool separate = residual || dropout.column_hashes;
  Lanes squares = {};
  for (int e = 0; e < width; e += kLanes) {
    Lanes h = load(x + e);
    if (dropout.column_hashes) h = dropped(h, dropout, e);
    if (residual) h += load(residual + e);
    if (separate) {
      h = rounded_to(h, x);
      store(h, sum + e);
    }
    squares += h * h;
  }
  const float scale = 1.0f / std::sqrt(sum_of(squares) / float(width) + eps);
  const T* h_row = separate ? sum : x;
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

// Gradients of add_rms_norm_row by its sum h and by x, and one row's share of the weight's, added to `dweight`. With
// n = h / rms(h): dh = (dnormed * weight - n * mean(dnormed * weight * n)) / rms(h) + dsum, dx = dropout(dh). `dnormed`
// or `dsum` may be null, `dh` or `dx` too.
template <class T>
static void add_rms_norm_backward_row(const T* h, const T* weight, const T* dnormed, const T* dsum, float eps,
                                      int width, const DropoutRow& dropout, T* dh, T* dx, float* dweight) {
  float inverse = 0.0f, mean = 0.0f;
  if (dnormed) {
    Lanes squares = {};
    for (int e = 0; e < width; e += kLanes) squares += load(h + e) * load(h + e);
    inverse = 1.0f / std::sqrt(sum_of(squares) / float(width) + eps);
    Lanes products = {};
    for (int e = 0; e < width; e += kLanes) products += load(dnormed + e) * load(weight + e) * (load(h + e) * inverse);
    mean = sum_of(products) / float(width);
  }
  for (int e = 0; e < width; e += kLanes) {
    Lanes gradient = {};
    if (dnormed) {
      const Lanes n = load(h + e) * inverse, given = load(dnormed + e);
      gradient = (given * load(weight + e) - n * mean) * inverse;
      store(load(dweight + e) + given * rounded_to(n, h), dweight + e);
    }
    if (dsum) gradient += load(dsum + e);
    if (dh) store(gradient, dh + e);
    if (dx) store(dropout.column_hashes ? dropped(gradient, dropout, e) : gradient, dx + e);
  }
}

// With s = sigmoid(a): da = dout * b * s * (1 + a * (1 - s)), db = dout * a * s; `drow` holds da, then db.
template <class T>
static void swiglu_backward_row(const T* row, const T* dout, int width, T* drow) {
  for (int e = 0; e < width; e += kLanes) {
    const Lanes a = load(row + e), b = load(row + width + e), given = load(dout + e);
    const Lanes small = exp_of(a < 0.0f ? a : -a);
    const Lanes whole = small + 1.0f;
    const Lanes s = (a < 0.0f ? small : small * 0.0f + 1.0f) / whole;
    const Lanes rest = (a < 0.0f ? small * 0.0f + 1.0f : small) / whole;  // 1 - s
    store(given * b * s * (a * rest + 1.0f), drow + e);
    store(given * a * s, drow + width + e);
  }
}
