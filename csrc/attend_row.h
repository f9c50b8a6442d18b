// Rows and heads of one decoding step on the CPU: rotary, append, then scores, softmax and weighted sum over cached keys and values, each read once.
// decode_attention_cpu.cpp includes this file once per instruction set, inside a namespace of its own (hence no #pragma once and no includes).
// Knows no torch. Everything is computed in float32. Needs lanes.h in the same namespace.

// out[e] = sum over s < n of softmax_s(query . key[s]) value[s][e]. `query` carries the scale 1 / sqrt(size). 8-bit caches have one scale a position,
// others none. `scores` has room for n rounded up to kLanes.
//
// Memory is what this waits for: values come in while scores are computed, the next row's keys while values are summed.
template <class Cached>
static void attend_row(const float* query, const Cached* keys, const Cached* values, const float* key_scales, const float* value_scales, const Cached* next_keys,
                       int n, int size, float* scores, float* out) {
  const int whole = size - size % kLanes;
  float largest = -INFINITY;
  bool is_nan = false;
  for (int s = 0; s < n; ++s) {
    const Cached* key = keys + int64_t(s) * size;
    prefetch(values + int64_t(s) * size, size);
    Lanes sums = {};
    for (int e = 0; e < whole; e += kLanes) sums += load(query + e) * load(key + e);
    float score = sum_of(sums);
    for (int e = whole; e < size; ++e) score += query[e] * to_float(key[e]);
    if (key_scales) score *= key_scales[s];
    scores[s] = score;
    largest = score > largest ? score : largest;
    is_nan |= score != score;
  }
  if (is_nan) largest = NAN;
  for (int s = n; s % kLanes; ++s) scores[s] = -INFINITY;
  float total = 0.0f;
  for (int s = 0; s < n; s += kLanes) {
    const Lanes weights = exp_of(load(scores + s) - largest);
    std::memcpy(scores + s, &weights, sizeof(weights));
    for (int i = s; i < n && i < s + kLanes; ++i) total += scores[i];
  }
  if (value_scales) {
    for (int s = 0; s < n; ++s) scores[s] *= value_scales[s];
  }
  const float share = 1.0f / total;
  int e = 0;
  for (; e + kTogether * kLanes <= size; e += kTogether * kLanes) {
    Lanes sums[kTogether] = {};
    for (int s = 0; s < n; ++s) {
      const Cached* value = values + int64_t(s) * size + e;
      prefetch(next_keys + int64_t(s) * size + e, kTogether * kLanes);
      for (int i = 0; i < kTogether; ++i) sums[i] += load(value + i * kLanes) * scores[s];
    }
    for (int i = 0; i < kTogether; ++i) sums[i] *= share;
    std::memcpy(out + e, sums, sizeof(sums));
  }
  for (; e < whole; e += kLanes) {
    Lanes sums = {};
    for (int s = 0; s < n; ++s) sums += load(values + int64_t(s) * size + e) * scores[s];
    sums *= share;
    std::memcpy(out + e, &sums, sizeof(sums));
  }
  for (; e < size; ++e) {
    float sum = 0.0f;
    for (int s = 0; s < n; ++s) sum += to_float(values[int64_t(s) * size + e]) * scores[s];
    out[e] = sum * share;
  }
}

// Pairs (x[2p], x[2p+1]) turned by the table's (cos, sin); without a table only converted.
template <class T>
static void rotated(const T* __restrict x, const float* __restrict table, int size, float* __restrict out) {
  if (!table) {
    for (int e = 0; e < size; ++e) out[e] = to_float(x[e]);
    return;
  }
  for (int e = 0; e < size; e += 2) {
    const float first = to_float(x[e]), second = to_float(x[e + 1]), cos = table[e], sin = table[e + 1];
    out[e] = first * cos - second * sin;
    out[e + 1] = first * sin + second * cos;
  }
}

template <class T>
static void append(const float* __restrict x, int size, T* __restrict row, float*) {
  for (int e = 0; e < size; ++e) round_to(x[e], row + e);
}

// 8 bits: codes times max|x| / 127, halves rounded up.
static inline void append(const float* __restrict x, int size, int8_t* __restrict row, float* scale) {
  float largest = 0.0f;
  for (int e = 0; e < size; ++e) largest = std::fabs(x[e]) > largest ? std::fabs(x[e]) : largest;
  *scale = largest / 127.0f;
  const float step = *scale == 0.0f ? 1.0f : *scale;
  for (int e = 0; e < size; ++e) row[e] = int8_t(std::floor(x[e] / step + 0.5f));
}

// Rows and heads begin ... end-1 of a step.
template <class T, class Cached>
static void attend_rows(const Step<T, Cached>& step, int64_t begin, int64_t end) {
  const int size = step.size, position = int(step.position);
  const float softmax_scale = 1.0f / std::sqrt(float(size));
  std::vector<float> scratch(4 * size + position + 1 + kLanes);
  float *query = scratch.data(), *key = query + size, *value = key + size, *sum = value + size, *scores = sum + size;
  for (int64_t one = begin; one < end; ++one) {
    const T* head = step.qkv + one / step.heads * step.row_stride + one % step.heads * step.head_stride;
    rotated(head, step.angles, size, query);
    rotated(head + step.part_stride, step.angles, size, key);
    rotated(head + 2 * step.part_stride, static_cast<const float*>(nullptr), size, value);
    for (int e = 0; e < size; ++e) query[e] *= softmax_scale;
    const int64_t first = one * step.positions, now = first + position;
    const int64_t next = one + 1 < end ? first + step.positions : first;
    append(key, size, step.keys + now * size, step.key_scales ? step.key_scales + now : nullptr);
    append(value, size, step.values + now * size, step.value_scales ? step.value_scales + now : nullptr);
    attend_row(query, step.keys + first * size, step.values + first * size, step.key_scales ? step.key_scales + first : nullptr,
               step.value_scales ? step.value_scales + first : nullptr, step.keys + next * size, position + 1, size, scores, sum);
    for (int e = 0; e < size; ++e) round_to(sum[e], step.out + one * size + e);
  }
}
