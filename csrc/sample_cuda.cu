// sample_tokens on CUDA: one block a row, no sort, no host sync, no scratch memory; one launch, which a CUDA graph can
// hold (seed and position may lie in device memory). Knows no torch. tests/csrc runs this same file on the host, with
// real threads, under ThreadSanitizer and AddressSanitizer.
//
// Rows of up to 16384 tokens are read once and stay in registers; longer ones (up to 65536) are read again from the L2
// cache in each pass.
#include <cuda_runtime.h>

#include "sample_cuda.h"

namespace star_fast {
namespace {

constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr uint32_t kBadKey = 0xffffffffu;         // above the key of +inf
constexpr uint32_t kMinusInfinity = 0x007fffffu;  // key of -inf
constexpr int kSegment = 128;                     // consecutive tokens that a warp holds at a time: 32 lanes, four each
constexpr int kMaxSegments = kMaxVocab / kSegment;

template <class T>
struct alignas(4 * sizeof(T)) Four {
  T at[4];
};

struct Shared {
  uint32_t low[kBins], high[kBins];  // a histogram's 64-bit sums, in halves: shared memory adds 32 bits at a time
  uint64_t segment[kMaxSegments];    // kept weight of each segment
  uint64_t warp_sum[32];
  uint32_t warp_top[32];
  uint32_t smallest, greatest;  // keys
  int found;                    // bin, digit or segment in which a sum crosses its limit
  uint64_t before;              // what stands before it
  uint64_t limit;
};

// A row of logits, four tokens at a time, as keys (one register each; the logit is two instructions away). Beyond its
// end -inf.
template <class T>
struct Row {
  const T* cond;
  const T* uncond;
  float guidance;
  int n;

  __device__ void load(int first, uint32_t (&key)[4]) const {
    Four<T> c, u;
    read(cond, first, c);
    if (uncond) read(uncond, first, u);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float logit = uncond ? guide(to_float(c.at[j]), to_float(u.at[j]), guidance) : to_float(c.at[j]);
      key[j] = first + j >= n ? kMinusInfinity : logit < INFINITY ? key_of(logit) : kBadKey;
    }
  }

  __device__ void read(const T* from, int first, Four<T>& four) const {
    from += first;
    if (first + 4 <= n && reinterpret_cast<uintptr_t>(from) % sizeof(four) == 0) {
      four = *reinterpret_cast<const Four<T>*>(from);
    } else {
#pragma unroll
      for (int j = 0; j < 4; ++j) four.at[j] = first + j < n ? from[j] : T{};
    }
  }
};

// The block's view of its row: for_each(f) calls f(first token, four keys) for this thread's share. Group q of thread t
// is tokens 4 * (q * THREADS + t) ... + 3, so that a warp holds 128 consecutive tokens in each group.
template <class T, int THREADS, int GROUPS, bool CACHED>
struct Share {
  const Row<T>& row;
  uint32_t held[CACHED ? GROUPS : 1][4];

  __device__ explicit Share(const Row<T>& r) : row(r) {
    if constexpr (CACHED) {
#pragma unroll
      for (int q = 0; q < GROUPS; ++q) row.load(first(q), held[q]);
    }
  }

  __device__ static int first(int q) { return 4 * (q * THREADS + int(threadIdx.x)); }

  template <class F>
  __device__ void for_each(const F& f) const {
    if constexpr (CACHED) {
#pragma unroll
      for (int q = 0; q < GROUPS; ++q) {
        if (4 * q * THREADS < row.n) f(first(q), held[q]);  // the same for the whole block: warps stay together
      }
    } else {
      for (int q = 0; 4 * q * THREADS < row.n; ++q) {
        uint32_t key[4];
        row.load(first(q), key);
        f(first(q), key);
      }
    }
  }
};

__device__ __forceinline__ int lane() { return int(threadIdx.x) % 32; }
__device__ __forceinline__ int warp() { return int(threadIdx.x) / 32; }

__device__ __forceinline__ uint64_t sum_of_lanes_up_to_here(uint64_t x) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint64_t below = __shfl_up_sync(kAllLanes, x, step);
    if (lane() >= step) x += below;
  }
  return x;
}

__device__ __forceinline__ uint64_t sum_of_lanes(uint64_t x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

__device__ __forceinline__ float logit_of(uint32_t key) {
  return float_of(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// A copy that the compiler cannot see through: what a pass derives from it for each token is computed anew, not kept
// from the pass before in registers that there are not.
__device__ __forceinline__ float afresh(float x) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+f"(x));
#endif
  return x;
}

// The largest key of the block's row, to every thread; kBadKey if a logit is NaN or +inf.
template <int THREADS, class ShareT>
__device__ uint32_t find_largest(const ShareT& share, Shared& s) {
  uint32_t top = 0;
  share.for_each([&](int, const uint32_t (&key)[4]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) top = top > key[j] ? top : key[j];
  });
  top = __reduce_max_sync(kAllLanes, top);
  if (lane() == 0) s.warp_top[warp()] = top;
  __syncthreads();
  return __reduce_max_sync(kAllLanes, lane() < THREADS / 32 ? s.warp_top[lane()] : 0u);
}

// Which of the histogram's sums carries the running sum beyond the limit (found), and what stands before it (before).
// With `share_of_total` the limit is first set to that share of the whole, in units of 2^-64.
template <int THREADS>
__device__ void find_crossing(Shared& s, bool share_of_total, uint64_t share) {
  constexpr int kOwn = kBins / THREADS;
  static_assert(kOwn * THREADS == kBins, "every thread scans the same number of bins");
  const int first = int(threadIdx.x) * kOwn;
  uint64_t own = 0;
#pragma unroll
  for (int b = 0; b < kOwn; ++b) own += (uint64_t{s.high[first + b]} << 32) + s.low[first + b];
  const uint64_t up_to_here = sum_of_lanes_up_to_here(own);
  if (lane() == 31) s.warp_sum[warp()] = up_to_here;
  __syncthreads();
  const uint64_t warp_up_to = sum_of_lanes_up_to_here(lane() < THREADS / 32 ? s.warp_sum[lane()] : 0);
  const uint64_t total = __shfl_sync(kAllLanes, warp_up_to, 31);
  const uint64_t earlier_warps = __shfl_sync(kAllLanes, warp_up_to, warp()) - s.warp_sum[warp()];
  const uint64_t limit = share_of_total ? multiply_high(share, total) : s.limit;
  const uint64_t offset = share_of_total ? 0 : s.before;  // of an earlier, coarser round
  uint64_t before = offset + earlier_warps + up_to_here - own;
  __syncthreads();  // all have read s.before
  if (before <= limit && limit < before + own) {
    int b = first;
    for (; b < first + kOwn - 1; ++b) {
      const uint64_t here = (uint64_t{s.high[b]} << 32) + s.low[b];
      if (limit < before + here) break;
      before += here;
    }
    s.found = b;
    s.before = before;
    s.limit = limit;
  }
  __syncthreads();
}

__device__ __forceinline__ void add(Shared& s, int bin, uint64_t amount) {
  const uint32_t low = uint32_t(amount);
  uint32_t high = uint32_t(amount >> 32);
  if (low) high += uint32_t(atomicAdd(&s.low[bin], low) + low < low);  // the carry
  if (high) atomicAdd(&s.high[bin], high);
}

template <int THREADS>
__device__ void clear_bins(Shared& s) {
  for (int b = int(threadIdx.x); b < kBins; b += THREADS) s.low[b] = s.high[b] = 0;
  __syncthreads();
}

// The cut: the smallest key that stays when a token of key >= floor stays if the tokens of strictly greater key amount
// to at most a limit. BY_MASS: tokens amount to their weight and the limit is a share of the whole; else each amounts
// to one and the limit is `limit`.
// First a histogram over bins of log-weight, then, within the bin of the cut, over 11 bits of the key at a time.
template <int THREADS, bool BY_MASS, class ShareT>
__device__ uint32_t find_cut(const ShareT& share, Shared& s, float largest, float scale, uint32_t floor,
                             uint64_t limit) {
  clear_bins<THREADS>(s);
  largest = afresh(largest);
  share.for_each([&](int, const uint32_t (&key)[4]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float z = exponent(logit_of(key[j]), largest, scale);
      if (key[j] >= floor) add(s, bin_of(z), BY_MASS ? weight(z) : 1);
    }
  });
  if (threadIdx.x == 0) {
    if (!BY_MASS) s.limit = limit;
    s.before = 0;
    s.smallest = kBadKey;
    s.greatest = 0;
  }
  __syncthreads();
  find_crossing<THREADS>(s, BY_MASS, limit);
  const int bin = s.found;
  if (bin == kBins - 1) return floor;  // the cut falls among tokens that weigh nothing: all the others stay
  largest = afresh(largest);
  share.for_each([&](int, const uint32_t (&key)[4]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (key[j] >= floor && bin_of(exponent(logit_of(key[j]), largest, scale)) == bin) {
        atomicMin(&s.smallest, key[j]);
        atomicMax(&s.greatest, key[j]);
      }
    }
  });
  __syncthreads();
  uint32_t smallest = s.smallest, greatest = s.greatest;
  while (smallest < greatest) {
    const uint32_t width = greatest - smallest;
    int shift = 0;
    while ((width >> shift) >= uint32_t(kBins)) ++shift;
    clear_bins<THREADS>(s);
    largest = afresh(largest);
    share.for_each([&](int, const uint32_t (&key)[4]) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (key[j] < smallest || key[j] > greatest) continue;
        add(s, int((greatest - key[j]) >> shift), BY_MASS ? weight(exponent(logit_of(key[j]), largest, scale)) : 1);
      }
    });
    __syncthreads();
    find_crossing<THREADS>(s, false, 0);
    greatest -= uint32_t(s.found) << shift;
    const uint32_t span = (1u << shift) - 1;
    smallest = greatest - smallest > span ? greatest - span : smallest;
  }
  return greatest;
}

// Step 5. Only the thread that holds the token writes it.
template <int THREADS, class T, class ShareT>
__device__ void draw(const Row<T>& row, const ShareT& share, Shared& s, float largest, float scale, uint32_t cut,
                     uint64_t bits, int64_t* out) {
  largest = afresh(largest);
  const auto kept_weight = [&](uint32_t key) {
    return key >= cut ? weight(exponent(logit_of(key), largest, scale)) : 0;
  };
  share.for_each([&](int first, const uint32_t (&key)[4]) {
    const uint64_t sum =
        sum_of_lanes(kept_weight(key[0]) + kept_weight(key[1]) + kept_weight(key[2]) + kept_weight(key[3]));
    if (lane() == 0 && first < row.n) s.segment[first / kSegment] = sum;
  });
  __syncthreads();
  if (warp() != 0) return;
  const int segments = (row.n + kSegment - 1) / kSegment, own = (segments + 31) / 32, begin = lane() * own;
  uint64_t sum = 0;
  for (int i = begin; i < begin + own && i < segments; ++i) sum += s.segment[i];
  const uint64_t up_to_here = sum_of_lanes_up_to_here(sum);
  uint64_t threshold = multiply_high(bits, __shfl_sync(kAllLanes, up_to_here, 31));
  uint64_t before = up_to_here - sum;
  if (before <= threshold && threshold < up_to_here) {
    int i = begin;
    for (; before + s.segment[i] <= threshold; ++i) before += s.segment[i];
    s.found = i;
    s.before = before;
  }
  __syncwarp();
  const int first = s.found * kSegment + 4 * lane();
  uint32_t key[4];
  row.load(first, key);
  uint64_t w[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) w[j] = kept_weight(key[j]) + (j ? w[j - 1] : 0);
  before = s.before + sum_of_lanes_up_to_here(w[3]) - w[3];
  if (before <= threshold && threshold - before < w[3]) {
    threshold -= before;
    *out = first + int(threshold >= w[0]) + int(threshold >= w[1]) + int(threshold >= w[2]);
  }
}

template <class T, int THREADS, int GROUPS, bool CACHED>
__global__ void __launch_bounds__(THREADS, 1) sample_tokens_kernel(const Problem p) {
  __shared__ Shared s;
  const int64_t index = blockIdx.x;
  const Row<T> row{static_cast<const T*>(p.logits) + index * p.logits_row_stride,
                   p.uncond ? static_cast<const T*>(p.uncond) + index * p.uncond_row_stride : nullptr,
                   p.settings.guidance, p.vocab};
  const Share<T, THREADS, GROUPS, CACHED> share(row);
  const uint32_t top = find_largest<THREADS>(share, s);
  if (top == kBadKey || top <= kMinusInfinity) {
    if (threadIdx.x == 0) {
      p.out[index] = 0;
      atomicMax(p.bad_rows, 1);
    }
    return;
  }
  if (p.settings.greedy) {
    if (threadIdx.x == 0) s.smallest = kBadKey;
    __syncthreads();
    share.for_each([&](int first, const uint32_t (&key)[4]) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (key[j] == top) atomicMin(&s.smallest, uint32_t(first + j));
      }
    });
    __syncthreads();
    if (threadIdx.x == 0) p.out[index] = s.smallest;
    return;
  }
  const float largest = logit_of(top), scale = p.settings.scale;
  uint32_t cut = kMinusInfinity;
  if (p.settings.restrict_count) cut = find_cut<THREADS, false>(share, s, largest, scale, cut, p.settings.top_k - 1);
  if (p.settings.restrict_mass) cut = find_cut<THREADS, true>(share, s, largest, scale, cut, p.settings.top_p);
  const uint64_t seed = uint64_t(p.seed_at ? *p.seed_at : p.seed);
  const uint32_t position = uint32_t(p.position_at ? *p.position_at : p.position);
  draw<THREADS>(row, share, s, largest, scale, cut, uniform64(seed, uint64_t(p.image_index[index]), position),
                p.out + index);
}

}  // namespace

template <class T, int THREADS, int GROUPS>
cudaError_t launch(const Problem& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  Problem copy = p;
  void* arguments[] = {&copy};
  const dim3 grid(static_cast<unsigned>(p.rows)), block(THREADS);
  if (p.vocab <= 4 * THREADS * GROUPS)
    return cudaLaunchKernel(sample_tokens_kernel<T, THREADS, GROUPS, true>, grid, block, arguments, 0, stream);
  return cudaLaunchKernel(sample_tokens_kernel<T, THREADS, GROUPS, false>, grid, block, arguments, 0, stream);
}

template <int THREADS, int GROUPS>
cudaError_t launch_sampling(const Problem& p, cudaStream_t stream) {
  switch (p.type) {
    case LogitType::float32: return launch<float, THREADS, GROUPS>(p, stream);
    case LogitType::bfloat16: return launch<Bfloat16, THREADS, GROUPS>(p, stream);
    default: return launch<Float16, THREADS, GROUPS>(p, stream);
  }
}

// 1024 threads of 16 tokens: 16384 tokens in registers, one block a multiprocessor.
cudaError_t sample_tokens_cuda(const Problem& p, cudaStream_t stream) { return launch_sampling<1024, 4>(p, stream); }

}  // namespace star_fast
