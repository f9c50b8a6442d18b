// Runs the 8-bit product of csrc/int8_*.h with every instruction set, without torch: reads calls from a file, writes
// their results to another. Built and driven by test_int8_on_host.py.
//
// A call is one Header, then x (rows, inner) float32 or bfloat16, then packed weights, weight_scale and correction as
// in csrc/int8_product.h. Its answer: the rows' scales (float32), then the product (rows, columns) in x's type.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "../../csrc/int8_product.h"
#include "../../csrc/scalars.h"
#if defined(__x86_64__) && !defined(BASELINE_ALONE)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#pragma GCC diagnostic ignored "-Wpsabi"

namespace star_fast {
namespace {

#if defined(__x86_64__) && !defined(BASELINE_ALONE)
#define STAR_FAST_X86 1
#endif
#include "../../csrc/int8_each_set.h"

struct Header {
  int64_t set, is_bfloat16, rows, columns, inner;
};

bool read(std::FILE* file, void* to, size_t bytes) { return std::fread(to, 1, bytes, file) == bytes; }

template <class T>
using RoundRow = float (*)(const T*, int, uint8_t*, int64_t, float*);
template <class T>
using ProductTiles = void (*)(const Int8Product&, int64_t, int64_t, T*);

template <class T>
bool run(const Header& h, RoundRow<T> round_row, ProductTiles<T> product_tiles, std::FILE* in, std::FILE* out) {
  Int8Product p{};
  p.rows = h.rows, p.columns = h.columns, p.blocks = (h.inner + kGroup - 1) / kGroup * (kGroup / kBlock);
  const int64_t padded = p.tiles() * kTile, block_stride = p.padded_rows() * kBlock;
  // Each exactly as long as it must be: AddressSanitizer sees a step beyond it.
  std::unique_ptr<T[]> x(new T[h.rows * h.inner]), result(new T[h.rows * h.columns]);
  std::unique_ptr<int8_t[]> weights(new int8_t[padded * p.blocks * kBlock]);
  std::unique_ptr<uint8_t[]> codes(new uint8_t[p.blocks * block_stride]());
  std::unique_ptr<float[]> weight_scale(new float[padded]), scale(new float[h.rows]),
      rotated(new float[p.blocks * kBlock]);
  std::unique_ptr<int32_t[]> correction(new int32_t[padded]);
  if (!read(in, x.get(), sizeof(T) * h.rows * h.inner) || !read(in, weights.get(), padded * p.blocks * kBlock) ||
      !read(in, weight_scale.get(), 4 * padded) || !read(in, correction.get(), 4 * padded))
    return false;
  for (int64_t row = 0; row < h.rows; ++row)
    scale[row] =
        round_row(x.get() + row * h.inner, int(h.inner), codes.get() + row * kBlock, block_stride, rotated.get());
  p.codes = codes.get(), p.scale = scale.get(), p.weights = weights.get(), p.weight_scale = weight_scale.get(),
  p.correction = correction.get();
  const int64_t middle = p.tiles() / 2;  // as two threads would share the columns
  product_tiles(p, 0, middle, result.get());
  product_tiles(p, middle, p.tiles(), result.get());
  return std::fwrite(scale.get(), 4, h.rows, out) == size_t(h.rows) &&
         std::fwrite(result.get(), sizeof(T), h.rows * h.columns, out) == size_t(h.rows * h.columns);
}

template <class T>
bool run_as(const Header& h, std::FILE* in, std::FILE* out) {
  switch (h.set) {
    case 0: return run<T>(h, &baseline::round_row<T>, &baseline::product_tiles<T>, in, out);
#if defined(__x86_64__) && !defined(BASELINE_ALONE)
    case 1: return run<T>(h, &avx2::round_row<T>, &avx2::product_tiles<T>, in, out);
    case 2: return run<T>(h, &avx512::round_row<T>, &avx512::product_tiles<T>, in, out);
    case 3: return run<T>(h, &vnni::round_row<T>, &vnni::product_tiles<T>, in, out);
    case 4: return run<T>(h, &amx::round_row<T>, &amx::product_tiles<T>, in, out);
#endif
    default: return false;
  }
}

}  // namespace
}  // namespace star_fast

int main(int count, char** names) {
  if (count != 3) return 2;
  std::FILE *in = std::fopen(names[1], "rb"), *out = std::fopen(names[2], "wb");
  if (!in || !out) return 2;
  star_fast::Header h;
  while (star_fast::read(in, &h, sizeof h)) {
#if defined(__x86_64__) && !defined(BASELINE_ALONE)
    // ARCH_REQ_XCOMP_PERM: the matrix unit's registers.
    if (h.set == 4 && syscall(SYS_arch_prctl, 0x1023, 18) != 0) return 4;
#endif
    if (!(h.is_bfloat16 ? star_fast::run_as<star_fast::Bfloat16Bits>(h, in, out)
                        : star_fast::run_as<float>(h, in, out)))
      return 3;
  }
  std::fclose(in);
  return std::fclose(out) == 0 ? 0 : 3;
}
