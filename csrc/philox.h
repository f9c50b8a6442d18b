// Philox4x32-10 (Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011): random bits as a
// pure function of (key, counter). Host and device; knows no torch.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define STAR_FAST_BOTH __host__ __device__ __forceinline__
#else
#define STAR_FAST_BOTH inline __attribute__((always_inline))
#endif

namespace star_fast {

struct Words4 {
  uint32_t x, y, z, w;
};

STAR_FAST_BOTH Words4 philox4x32_10(Words4 counter, uint32_t key_low, uint32_t key_high) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t even = uint64_t{0xD2511F53u} * counter.x, odd = uint64_t{0xCD9E8D57u} * counter.z;
    counter = {uint32_t(odd >> 32) ^ counter.y ^ key_low, uint32_t(odd), uint32_t(even >> 32) ^ counter.w ^ key_high,
               uint32_t(even)};
    key_low += 0x9E3779B9u;
    key_high += 0xBB67AE85u;
  }
  return counter;
}

// 64 random bits of (seed, image, position); the counter's second word is 0 and left to other uses.
STAR_FAST_BOTH uint64_t uniform64(uint64_t seed, uint64_t image_index, uint32_t position) {
  const Words4 words = philox4x32_10({position, 0u, uint32_t(image_index), uint32_t(image_index >> 32)}, uint32_t(seed),
                                     uint32_t(seed >> 32));
  return (uint64_t{words.x} << 32) | words.y;
}

}  // namespace star_fast
