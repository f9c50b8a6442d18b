// Rows and heads of one decoding step on the CPU: rotary, append, then scores, softmax and weighted sum over cached
// keys and values, each read once. decode_attention_cpu.cpp includes this file once per instruction set, inside a
// namespace of its own (hence no #pragma once), after lanes.h. Knows no torch.
//
// Memory is what this waits for: values come in while scores are computed, the next head's keys while values are
// summed.

#include "block_products.h"

// Of |x[0 ... n)|, n a multiple of kLanes; not finite if one of them is not.
static float largest_of(const float* x, int n) {
  Lanes largest = {}, poison = {};
  for (int e = 0; e < n; e += kLanes) {
    const Lanes lanes = load(x + e), magnitude = lanes < 0.0f ? -lanes : lanes;
    largest = magnitude > largest ? magnitude : largest;
    poison += lanes - lanes;  // 0, or NaN
  }
  float found = largest[0];
  for (int i = 1; i < kLanes; ++i) found = largest[i] > found ? largest[i] : found;
  return found + sum_of(poison);
}

STAR_FAST_INLINE IntLanes first_lanes(int count) {  // -1 where the lane's number is under `count`
  constexpr IntLanes numbers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return numbers < count;
}

// scores -> e^(score - largest), zero from n on to the end of the block; returns their sum. NaN or +inf among the
// scores make it NaN.
static float softmax_weights(float* scores, int n) {
  Lanes largest = Lanes{} - INFINITY;
  for (int s = 0; s < n; s += kLanes) {
    Lanes those = load(scores + s);
    those = first_lanes(n - s) ? those : Lanes{} - INFINITY;
    largest = those > largest ? those : largest;
    store(those, scores + s);
  }
  float top = largest[0];
  for (int i = 1; i < kLanes; ++i) top = largest[i] > top ? largest[i] : top;
  Lanes total = {};
  for (int s = 0; s < n; s += kLanes) {
    const Lanes weights = first_lanes(n - s) ? exp_of(load(scores + s) - top) : Lanes{};
    store(weights, scores + s);
    total += weights;
  }
  return sum_of(total);
}

// Numbers of one head on the way: `width` of each, zero past the head's size, and `positions` scores, both whole
// vectors. Only an 8-bit cache needs wholes.
struct Scratch {
  Scratch(int64_t width, int64_t positions) : floats(4 * width + positions), wholes((width + positions) / 4) {
    query = floats.data();
    key = query + width;
    value = key + width;
    out = value + width;
    scores = out + width;
    whole_query = wholes.data();
    whole_weights = whole_query + width / 4;
  }

  float *query, *key, *value, *out, *scores;
  FourWholes *whole_query, *whole_weights;

 private:
  std::vector<float> floats;
  std::vector<FourWholes> wholes;
};

// One head's part of the cache; 8-bit caches have a scale a position, others none.
template <class Cached>
struct Head {
  Cached *keys, *values;
  float *key_scales, *value_scales;
};

// scratch.out = sum over s < n of softmax_s(query . key[s]) value[s]. The query carries the scale 1 / sqrt(size).
template <class Cached>
static void attend_row(const Head<Cached>& head, const Cached* next_keys, int n, int size, const Scratch& scratch) {
  const int64_t block = Layout<Cached>::block_entries(size), width = Layout<Cached>::width(size);
  for (int s = 0; s < n; s += kLanes) {
    ask_for(head.values + s * width, kLanes * width * sizeof(Cached));
    store(block_scores(scratch.query, head.keys + s / kLanes * block, size), scratch.scores + s);
  }
  const float share = 1.0f / softmax_weights(scratch.scores, n);
  weighted_sums(scratch.scores, head.values, width, n, share, next_keys, scratch.out);
}

// The same with 8-bit codes: the query, then the weights with the values' scales in them, as whole numbers.
static inline void attend_row(const Head<int8_t>& head, const int8_t* next_keys, int n, int size,
                              const Scratch& scratch) {
  const int64_t block = Layout<int8_t>::block_entries(size), width = Layout<int8_t>::width(size);
  const float largest_query = largest_of(scratch.query, int(width));
  to_wholes(scratch.query, int(width), largest_query, scratch.whole_query);
  for (int s = 0; s < n; s += kLanes) {
    ask_for(head.values + s * width, kLanes * width);
    const Lanes products = block_scores(scratch.whole_query, head.keys + s / kLanes * block, size);
    store(products * (largest_query / kLargestWhole) * load(head.key_scales + s), scratch.scores + s);
  }
  const float total = softmax_weights(scratch.scores, n);
  for (int s = 0; s < n; s += kLanes) {
    const Lanes scaled = load(scratch.scores + s) * load(head.value_scales + s);
    store(first_lanes(n - s) ? scaled : Lanes{}, scratch.scores + s);
  }
  const int padded = int(rounded_up(n, kLanes));
  const float largest = largest_of(scratch.scores, padded);
  to_wholes(scratch.scores, padded, largest, scratch.whole_weights);
  weighted_sums(scratch.whole_weights, head.values, width, n, largest / kLargestWhole / total, next_keys, scratch.out);
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

// What the cache stores of x[0 ... width).
template <class Cached>
static void to_stored(const float* x, int64_t width, Cached* stored, float*) {
  for (int64_t e = 0; e < width; e += kLanes) store(load(x + e), stored + e);
}

// 8 bits: codes times max|x| / 127, halves rounded up.
static inline void to_stored(const float* x, int64_t width, int8_t* codes, float* scale) {
  *scale = largest_of(x, int(width)) / 127.0f;
  const float step = *scale > 0.0f ? *scale : 1.0f;
  for (int64_t e = 0; e < width; e += kLanes) {
    const Lanes shifted = load(x + e) / step + 0.5f;
    const IntLanes cut = __builtin_convertvector(shifted, IntLanes);
    // Rounded down: a comparison that holds is -1.
    IntLanes code = cut + (__builtin_convertvector(cut, Lanes) > shifted);
    // Where the scale is too small for a float of full precision.
    code = code > 127 ? IntLanes{} + 127 : code < -127 ? IntLanes{} - 127 : code;
    store(code, codes + e);
  }
}

template <class Cached>
static void append_key(const Cached* stored, int64_t position, int size, Cached* keys) {
  constexpr int kGroup = Layout<Cached>::kGroup;
  for (int e = 0; e < size; e += kGroup)
    std::memcpy(keys + Layout<Cached>::key_at(position, e, size), stored + e, kGroup * sizeof(Cached));
}

template <class Cached>
static void append_value(const Cached* stored, int64_t position, int size, Cached* values) {
  for (int e = 0; e < size; ++e) values[Layout<Cached>::value_at(position, e, size)] = stored[e];
}

// Rows and heads begin ... end-1 of a step.
template <class T, class Cached>
static void attend_rows(const Step<T, Cached>& step, int64_t begin, int64_t end) {
  const int size = step.size;
  const int64_t position = step.position, positions = step.blocks * kBlock, width = Layout<Cached>::width(size);
  const int64_t head_keys = step.blocks * Layout<Cached>::block_entries(size), head_values = positions * width;
  const float softmax_scale = 1.0f / std::sqrt(float(size));
  const Scratch scratch(width, rounded_up(position + 1, kLanes));
  std::vector<Cached> stored(width);
  for (int64_t one = begin; one < end; ++one) {
    const T* given = step.qkv + one / step.heads * step.row_stride + one % step.heads * step.head_stride;
    rotated(given, step.angles, size, scratch.query);
    rotated(given + step.part_stride, step.angles, size, scratch.key);
    rotated(given + 2 * step.part_stride, static_cast<const float*>(nullptr), size, scratch.value);
    for (int e = 0; e < size; ++e) scratch.query[e] *= softmax_scale;
    Head<Cached> head{step.keys + one * head_keys, step.values + one * head_values, nullptr, nullptr};
    if (step.key_scales) {
      head.key_scales = step.key_scales + one * positions;
      head.value_scales = step.value_scales + one * positions;
    }
    to_stored(scratch.key, width, stored.data(), head.key_scales ? head.key_scales + position : nullptr);
    append_key(stored.data(), position, size, head.keys);
    to_stored(scratch.value, width, stored.data(), head.value_scales ? head.value_scales + position : nullptr);
    append_value(stored.data(), position, size, head.values);
    attend_row(head, one + 1 < end ? head.keys + head_keys : head.keys, int(position) + 1, size, scratch);
    for (int e = 0; e < size; ++e) round_to(scratch.out[e], step.out + one * size + e);
  }
}
