// One row on the CPU: plain loops that vectorise. sample_cpu.cpp includes this file once per instruction set, inside a
// namespace of its own (hence no #pragma once and no includes); all copies give the same tokens, since token_choice.h
// leaves nothing to the instruction set. Knows no torch. Indices are 64 bits wide: setuptools compiles with -fwrapv,
// under which a loop over int indices does not vectorise.
//
// No sort: a histogram over bins of log-weight finds the bin in which a cut (top-k or top-p) falls, and only that bin's
// few tokens are compared by value.

constexpr int kChunk = 256;     // tokens whose weights are summed together before the draw walks through one such chunk
constexpr int kFlagBlock = 64;  // tokens compared at once when few of many are wanted

struct Scratch {
  std::vector<float> guided = std::vector<float>(kMaxVocab);  // the row in float32
  std::vector<uint16_t> bin = std::vector<uint16_t>(kMaxVocab);
  std::vector<uint64_t> weight = std::vector<uint64_t>(kMaxVocab);
  std::vector<int32_t> kept = std::vector<int32_t>(kMaxVocab);  // indices of the tokens that top-k left, ascending
  std::vector<float> kept_logit = std::vector<float>(kMaxVocab);
  std::vector<int32_t> rivals = std::vector<int32_t>(kMaxVocab);  // indices of the tokens in the bin of the cut
  std::vector<uint16_t> counts = std::vector<uint16_t>(4 * kBins);
  std::vector<uint64_t> masses = std::vector<uint64_t>(kBins);
};

// The float32 row: `cond` itself where it is one already, else converted or guided into `out`.
template <class T>
const float* load_row(const T* __restrict cond, const T* __restrict uncond, float guidance, int n,
                      float* __restrict out) {
  if constexpr (std::is_same_v<T, float>) {
    if (!uncond) return cond;
  }
  if (uncond) {
    for (int64_t i = 0; i < n; ++i) out[i] = guide(to_float(cond[i]), to_float(uncond[i]), guidance);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = to_float(cond[i]);
  }
  return out;
}

// The largest logit; false if the row holds NaN or +inf, or nothing but -inf. Compared as integers, which vectorises
// without any licence to reorder floats.
inline bool find_largest(const float* __restrict g, int n, float* largest) {
  int32_t top = INT32_MIN, magnitude = 0;
  for (int64_t i = 0; i < n; ++i) {
    const int32_t bits = int32_t(bits_of(g[i]));
    const int32_t ordered = bits ^ ((bits >> 31) & 0x7fffffff), absolute = bits & 0x7fffffff;
    top = top > ordered ? top : ordered;
    magnitude = magnitude > absolute ? magnitude : absolute;
  }
  const int32_t infinity = 0x7f800000, minus_infinity = int32_t(0xff800000u ^ 0x7fffffffu);
  *largest = float_of(uint32_t(top ^ ((top >> 31) & 0x7fffffff)));
  return magnitude <= infinity && top < infinity && top > minus_infinity;
}

inline int first_equal(const float* __restrict g, int n, float wanted) {
  int64_t start = 0;
  for (; start + kFlagBlock <= n; start += kFlagBlock) {
    int found = 0;
    for (int64_t j = 0; j < kFlagBlock; ++j) found |= g[start + j] == wanted;
    if (found) break;
  }
  while (g[start] != wanted) ++start;
  return int(start);
}

// The top bits of 64 bytes, byte 0's lowest.
inline uint64_t top_bits(const uint8_t* bytes) {
#if STAR_FAST_VECTOR_BITS == 512
  return _mm512_movepi8_mask(_mm512_loadu_si512(bytes));
#elif STAR_FAST_VECTOR_BITS == 256
  const int low = _mm256_movemask_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
  const int high = _mm256_movemask_epi8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + 32)));
  return uint64_t{uint32_t(high)} << 32 | uint32_t(low);
#else
  uint64_t word = 0;
  for (int64_t j = 0; j < kFlagBlock; ++j) word |= uint64_t{bytes[j]} >> 7 << j;
  return word;
#endif
}

// Calls take(i) for each i in 0 ... n-1 with wanted(values[i]), ascending. For conditions that few tokens meet: 64 are
// compared at once and become the bits of a word. (`wanted` by value, and holding values only: what it read through a
// reference could, to the compiler, be what `flags` writes.)
template <class Value, class Wanted, class Take>
inline void for_each_wanted(const Value* __restrict values, int n, const Wanted wanted, const Take& take) {
  alignas(64) uint8_t flags[kFlagBlock];
  int64_t start = 0;
  for (; start + kFlagBlock <= n; start += kFlagBlock) {
    for (int64_t j = 0; j < kFlagBlock; ++j) flags[j] = wanted(values[start + j]) ? 0xff : 0;
    for (uint64_t word = top_bits(flags); word; word &= word - 1) take(start + __builtin_ctzll(word));
  }
  for (; start < n; ++start) {
    if (wanted(values[start])) take(start);
  }
}

inline void find_bins(const float* __restrict g, int n, float largest, float scale, uint16_t* __restrict bin) {
  for (int64_t i = 0; i < n; ++i) bin[i] = uint16_t(bin_of(exponent(g[i], largest, scale)));
}

inline uint64_t find_bins_and_weights(const float* __restrict g, int n, float largest, float scale,
                                      uint16_t* __restrict bin, uint64_t* __restrict w) {
  uint64_t total = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float z = exponent(g[i], largest, scale);
    bin[i] = uint16_t(bin_of(z));
    w[i] = weight(z);
    total += w[i];
  }
  return total;
}

// The smallest logit of a bin that stays, given that the tokens of the heavier bins (lower numbers) amount to `before`:
// a token stays if what is strictly greater amounts to at most `limit`.
template <class Amount>
inline float smallest_kept(const float* g, const uint16_t* bin, int n, uint16_t wanted_bin, uint64_t before,
                           uint64_t limit, const Amount& amount, int32_t* rivals) {
  int count = 0;
  bool all_equal = true;
  for_each_wanted(
      bin, n, [=](uint16_t b) { return b == wanted_bin; },
      [&](int64_t i) {
        rivals[count++] = int32_t(i);
        all_equal = all_equal && g[i] == g[rivals[0]];
      });
  if (!all_equal) std::sort(rivals, rivals + count, [&](int32_t a, int32_t b) { return g[a] > g[b]; });
  float smallest = g[rivals[0]];
  for (int64_t j = 0; j < count && !all_equal; ++j) {
    if (g[rivals[j]] < smallest) {
      if (before > limit) break;
      smallest = g[rivals[j]];
    }
    before += amount(rivals[j]);
  }
  return smallest;
}

// Step 3: the k-th largest logit (-inf where it weighs nothing, so that dropping below it would change nothing).
inline float count_cut(const float* g, int n, float largest, float scale, uint32_t k, Scratch& s) {
  find_bins(g, n, largest, scale, s.bin.data());
  std::fill(s.counts.begin(), s.counts.end(), uint16_t{0});
  uint16_t* const counts = s.counts.data();  // four interleaved histograms: a token rarely waits for the one before it
  const uint16_t* const bin = s.bin.data();
  int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    ++counts[4 * bin[i]];
    ++counts[4 * bin[i + 1] + 1];
    ++counts[4 * bin[i + 2] + 2];
    ++counts[4 * bin[i + 3] + 3];
  }
  for (; i < n; ++i) ++counts[4 * bin[i]];
  uint64_t before = 0;
  for (int b = 0; b < kBins - 1; ++b) {
    const uint64_t here = uint64_t{counts[4 * b]} + counts[4 * b + 1] + counts[4 * b + 2] + counts[4 * b + 3];
    if (before + here >= k)
      return smallest_kept(g, bin, n, uint16_t(b), before, k - 1, [](int32_t) { return uint64_t{1}; }, s.rivals.data());
    before += here;
  }
  return -INFINITY;
}

// Step 4: the smallest logit for which all that is strictly greater weighs at most the share p of the whole.
inline float mass_cut(const float* g, int n, float largest, float scale, uint64_t p, Scratch& s) {
  uint16_t* const bin = s.bin.data();
  const uint64_t* const w = s.weight.data();
  const uint64_t limit = multiply_high(p, find_bins_and_weights(g, n, largest, scale, bin, s.weight.data()));
  std::fill(s.masses.begin(), s.masses.end(), uint64_t{0});
  for (int64_t i = 0; i < n; ++i) s.masses[bin[i]] += w[i];
  uint64_t before = 0;
  int b = 0;
  while (before + s.masses[b] <= limit) before += s.masses[b++];  // ends: limit is less than the sum of all
  return smallest_kept(g, bin, n, uint16_t(b), before, limit, [&](int32_t i) { return w[i]; }, s.rivals.data());
}

// Step 3: the tokens that top-k leaves, into s.kept and s.kept_logit, ascending by index. Returns how many.
inline int keep_top_k(const float* g, int n, float largest, float scale, uint32_t k, Scratch& s) {
  const float kth = count_cut(g, n, largest, scale, k, s);
  int count = 0;
  int32_t* const kept = s.kept.data();
  float* const logit = s.kept_logit.data();
  for_each_wanted(
      g, n, [=](float x) { return x >= kth; },
      [&](int64_t i) {
        kept[count] = int32_t(i);
        logit[count++] = g[i];
      });
  return count;
}

// Step 5: the first index whose running sum of weight_of(index) exceeds the share `bits` / 2^64 of their whole.
template <class WeightOf>
inline int draw(int n, uint64_t bits, const WeightOf& weight_of) {
  uint64_t sums[kMaxVocab / kChunk] = {}, total = 0;
  for (int64_t start = 0; start < n; start += kChunk) {
    const int64_t end = start + kChunk < n ? start + kChunk : n;
    uint64_t sum = 0;
    for (int64_t i = start; i < end; ++i) sum += weight_of(i);
    sums[start / kChunk] = sum;
    total += sum;
  }
  uint64_t left = multiply_high(bits, total);
  int chunk = 0;
  while (left >= sums[chunk]) left -= sums[chunk++];
  uint64_t w[kChunk];
  const int64_t start = int64_t{chunk} * kChunk, count = start + kChunk < n ? kChunk : n - start;
  for (int64_t j = 0; j < count; ++j) w[j] = weight_of(start + j);
  int64_t j = 0;
  while (left >= w[j]) left -= w[j++];
  return int(start + j);
}

// Steps 4 and 5 on `n` logits: the index of the one drawn.
inline int draw_from(const float* __restrict g, int n, float largest, const Settings& settings, uint64_t bits,
                     Scratch& s) {
  const float scale = settings.scale;
  if (!settings.restrict_mass) return draw(n, bits, [=](int64_t i) { return weight(exponent(g[i], largest, scale)); });
  const float cut = mass_cut(g, n, largest, scale, settings.top_p, s);
  const uint64_t* const w = s.weight.data();
  return draw(n, bits, [=](int64_t i) { return w[i] & -uint64_t{g[i] >= cut}; });  // a choice would be a branch here
}

// The token of one row, or -1 if it cannot be drawn from.
template <class T>
int sample_row(const T* cond, const T* uncond, int n, const Settings& settings, uint64_t bits, Scratch& s) {
  const float* const g = load_row(cond, uncond, settings.guidance, n, s.guided.data());
  float largest;
  if (!find_largest(g, n, &largest)) return -1;
  if (settings.greedy) return first_equal(g, n, largest);
  if (!settings.restrict_count) return draw_from(g, n, largest, settings, bits, s);
  const int count = keep_top_k(g, n, largest, settings.scale, settings.top_k, s);
  return s.kept[draw_from(s.kept_logit.data(), count, largest, settings, bits, s)];
}
