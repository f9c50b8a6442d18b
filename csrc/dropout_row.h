// The dropout mask of a row: an element survives when the hash of row hash + column hash is below `limit`
// (star_fast/ops/add_rms_norm.py). Knows no torch.
#pragma once

#include <cstdint>

namespace star_fast {
namespace {

struct DropoutRow {
  const uint32_t* column_hashes;  // null: no dropout
  uint32_t row_hash;
  int32_t limit;
  float scale;
};

// lowbias32 (github.com/skeeto/hash-prospector) of an unsigned 32-bit number, or of a vector of them; inlined, so that
// it is compiled for its caller's instructions.
template <class Word>
static inline __attribute__((always_inline)) Word hash_of(Word x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ (x >> 16);
}

}  // namespace
}  // namespace star_fast
