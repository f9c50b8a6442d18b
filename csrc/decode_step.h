// One decoding step of attention as plain pointers and numbers, and how its cache lies in memory
// (star_fast/ops/kv_cache.py says it in tensors). Knows no torch.
#pragma once

#include <cstdint>

namespace star_fast {
namespace {

constexpr int kBlock = 16;  // positions side by side

constexpr int64_t rounded_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// A cache of `blocks` blocks of positions, for each row and head:
//   keys (blocks, groups, kBlock, kGroup): an entry's neighbours are the same entries of other positions, so 16 scores
//   come out as one vector;
//   values (positions / kTogether, width, kTogether): the weighted sum reads them from first to last.
// kGroup entries fill 32 bits. 8-bit values lie in fours of positions, which one integer product takes; the others one
// position after the other.
template <class Cached>
struct Layout {
  static constexpr int kGroup = 4 / int(sizeof(Cached));
  static constexpr int kTogether = sizeof(Cached) == 1 ? 4 : 1;
  static constexpr int64_t block_entries(int size) { return rounded_up(size, kGroup) * kBlock; }
  static constexpr int64_t width(int size) { return rounded_up(size, kBlock); }
  static constexpr int64_t key_at(int64_t position, int entry, int size) {
    return position / kBlock * block_entries(size) + (entry / kGroup * kBlock + position % kBlock) * kGroup +
           entry % kGroup;
  }
  static constexpr int64_t value_at(int64_t position, int entry, int size) {
    return (position / kTogether * width(size) + entry) * kTogether + position % kTogether;
  }
};

// `angles` is the rotary table's row of this position, or null; 8-bit caches have a scale for each row, head and
// position, others null.
template <class T, class Cached>
struct Step {
  const T* qkv;
  int64_t row_stride, part_stride, head_stride, heads;
  int size;  // of a head
  Cached *keys, *values;
  float *key_scales, *value_scales;
  int64_t blocks;  // of positions, in the cache
  int64_t position;
  const float* angles;
  T* out;
};

}  // namespace
}  // namespace star_fast
