// CUDA on the host, for tests: the few names that csrc/sample_cuda.cu uses, on top of std::thread. Each thread of a
// block is a real thread, so that ThreadSanitizer sees every access to shared memory that no barrier orders. Blocks run
// one after another.
#pragma once

#include <pthread.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
// One block at a time: shared by its threads, kept between blocks with whatever the last one left there.
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using cudaError_t = int;
using cudaStream_t = void*;
constexpr cudaError_t cudaSuccess = 0;

namespace cuda_on_host {

class Barrier {
 public:
  explicit Barrier(unsigned threads) { pthread_barrier_init(&barrier_, nullptr, threads); }
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  Barrier(const Barrier&) = delete;
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

struct Warp {
  Barrier barrier{32};
  uint64_t value[32] = {};
};

struct Block {
  explicit Block(unsigned threads) : barrier(threads) {
    if (threads % 32) std::abort();
    for (unsigned w = 0; w < threads / 32; ++w) warps.push_back(std::make_unique<Warp>());
  }
  Barrier barrier;
  std::vector<std::unique_ptr<Warp>> warps;
};

inline thread_local dim3 thread_index, block_index;
inline thread_local Block* block = nullptr;

inline Warp& warp() { return *block->warps[thread_index.x / 32]; }

// Every lane shows its value; then each reads from the others what `read` asks for.
template <class T, class Read>
T exchange(uint32_t mask, T mine, const Read& read) {
  if (mask != 0xffffffffu) std::abort();  // the kernel uses whole warps only
  Warp& w = warp();
  w.value[thread_index.x % 32] = uint64_t(mine);
  w.barrier.wait();
  const T result = read(w.value);
  w.barrier.wait();
  return result;
}

}  // namespace cuda_on_host

#define threadIdx cuda_on_host::thread_index
#define blockIdx cuda_on_host::block_index

inline void __syncthreads() { cuda_on_host::block->barrier.wait(); }
inline void __syncwarp() { cuda_on_host::warp().barrier.wait(); }

template <class T>
T __shfl_sync(uint32_t mask, T mine, int from) {
  return cuda_on_host::exchange(mask, mine, [&](const uint64_t* v) { return T(v[from]); });
}

template <class T>
T __shfl_up_sync(uint32_t mask, T mine, unsigned step) {
  const unsigned lane = threadIdx.x % 32;
  return cuda_on_host::exchange(mask, mine, [&](const uint64_t* v) { return T(v[lane < step ? lane : lane - step]); });
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T mine, int bits) {
  return cuda_on_host::exchange(mask, mine, [&](const uint64_t* v) { return T(v[int(threadIdx.x % 32) ^ bits]); });
}

inline uint32_t __reduce_max_sync(uint32_t mask, uint32_t mine) {
  return cuda_on_host::exchange(mask, mine, [](const uint64_t* v) {
    uint64_t top = 0;
    for (int i = 0; i < 32; ++i) top = v[i] > top ? v[i] : top;
    return uint32_t(top);
  });
}

inline uint32_t atomicAdd(uint32_t* at, uint32_t value) { return __atomic_fetch_add(at, value, __ATOMIC_RELAXED); }

template <class T>
T atomicMin(T* at, T value) {
  T old = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (value < old && !__atomic_compare_exchange_n(at, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
  return old;
}

template <class T>
T atomicMax(T* at, T value) {
  T old = __atomic_load_n(at, __ATOMIC_RELAXED);
  while (value > old && !__atomic_compare_exchange_n(at, &old, value, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
  return old;
}

// The threads of a block live for the whole launch and meet between blocks.
template <class Argument>
cudaError_t cudaLaunchKernel(void (*kernel)(Argument), dim3 grid, dim3 block, void** arguments, size_t, cudaStream_t) {
  cuda_on_host::Block shared(block.x);
  std::vector<std::thread> threads;
  for (unsigned t = 0; t < block.x; ++t) {
    threads.emplace_back([&, t] {
      cuda_on_host::block = &shared;
      threadIdx = dim3(t);
      for (unsigned b = 0; b < grid.x; ++b) {
        blockIdx = dim3(b);
        kernel(*static_cast<std::remove_const_t<Argument>*>(arguments[0]));
        shared.barrier.wait();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return cudaSuccess;
}
