// What a tensor's entries are on the CPU, one at a time. Knows no torch.
#pragma once

#include <cstdint>
#include <cstring>

namespace star_fast {
namespace {

struct Bfloat16Bits {
  uint16_t bits;
};

inline float to_float(float x) { return x; }
inline float to_float(int8_t x) { return float(x); }
inline float to_float(Bfloat16Bits x) {
  const uint32_t wide = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

inline void round_to(float x, float* out) { *out = x; }
inline void round_to(float x, Bfloat16Bits* out) {  // to nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  out->bits = x != x ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace
}  // namespace star_fast
