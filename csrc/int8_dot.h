// Sums of products of unsigned 8-bit rows with packed signed 8-bit weights, exact in int32, by vectors. int8_cpu.cpp
// includes this file once per instruction set, inside a namespace of its own, after lanes.h and int8_rows.h. Layouts:
// int8_product.h. Knows no torch.
// STAR_FAST_DOT says what for, since GCC's own macros don't follow its target pragma: 0 plain vectors, 1 AVX2,
// 2 AVX-512, 3 AVX-512 with VNNI.

constexpr int kRowsTogether = 8;  // whose sums stay in registers
constexpr int kTilesTogether = 2;

struct Registers {};  // nothing to prepare

typedef int16_t ShortLanes __attribute__((vector_size(4 * kLanes)));

// Of each lane's two pairs of 16-bit numbers the products' sum.
STAR_FAST_INLINE IntLanes pair_products(const ShortLanes& a, const ShortLanes& b) {
#if STAR_FAST_DOT >= 2
  return (IntLanes)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#else
  const IntLanes x = same_bits<IntLanes>(a), y = same_bits<IntLanes>(b);
  return ((x << 16) >> 16) * ((y << 16) >> 16) + (x >> 16) * (y >> 16);
#endif
}

// sums (kRowsTogether, TILES * 16) = codes of kRowsTogether rows, `block_stride` bytes from block to block, times TILES
// tiles of weights, `tile_bytes` apart.
#if STAR_FAST_DOT == 1  // GCC takes 64-byte vectors of 16-bit numbers apart entry by entry here
template <int TILES>
static void dot_rows(const uint8_t* codes, int64_t block_stride, int, const int8_t* weights, int64_t tile_bytes,
                     int blocks, int32_t* sums) {
  constexpr int kFew = 2, kHalves = 2 * TILES;  // rows whose sums fit the sixteen registers; halves of tiles: 8 columns
  for (int first = 0; first < kRowsTogether; first += kFew) {
    __m256i total[kFew][kHalves];
    for (auto& row : total)
      for (auto& half : row) half = _mm256_setzero_si256();
    for (int block = 0; block < blocks; ++block) {
      const uint8_t* row_codes = codes + block * block_stride + first * kBlock;
      for (int k = 0; k < kBlock; k += 4) {
        __m256i even[kFew], odd[kFew];  // each row's first and third code of four, its second and fourth
#pragma GCC unroll 2
        for (int row = 0; row < kFew; ++row) {
          uint32_t word;
          std::memcpy(&word, row_codes + row * kBlock + k, 4);
          even[row] = _mm256_set1_epi32(int(word & 0x00ff00ffu));
          odd[row] = _mm256_set1_epi32(int((word >> 8) & 0x00ff00ffu));
        }
#pragma GCC unroll 4
        for (int half = 0; half < kHalves; ++half) {
          const int8_t* at = weights + half / 2 * tile_bytes + (block * kBlock + k) * kTile + half % 2 * 32;
          const __m256i four = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
          const __m256i even_weights = _mm256_srai_epi16(_mm256_slli_epi16(four, 8), 8),
                        odd_weights = _mm256_srai_epi16(four, 8);
#pragma GCC unroll 2
          for (int row = 0; row < kFew; ++row)
            total[row][half] = _mm256_add_epi32(
                total[row][half],
                _mm256_add_epi32(_mm256_madd_epi16(even_weights, even[row]), _mm256_madd_epi16(odd_weights, odd[row])));
        }
      }
    }
    for (int row = 0; row < kFew; ++row)
      for (int half = 0; half < kHalves; ++half)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + ((first + row) * TILES * kTile + half * 8)),
                            total[row][half]);
  }
}
#else
template <int TILES>
static void dot_rows(const uint8_t* codes, int64_t block_stride, int, const int8_t* weights, int64_t tile_bytes,
                     int blocks, int32_t* sums) {
  IntLanes total[kRowsTogether][TILES] = {};
  for (int block = 0; block < blocks; ++block) {
    const uint8_t* row_codes = codes + block * block_stride;
    for (int k = 0; k < kBlock; k += 4) {
      IntLanes four[TILES];  // weights of each column
      for (int tile = 0; tile < TILES; ++tile)
        std::memcpy(&four[tile], weights + tile * tile_bytes + (block * kBlock + k) * kTile, sizeof(IntLanes));
#if STAR_FAST_DOT == 3
#pragma GCC unroll 8
      for (int row = 0; row < kRowsTogether; ++row) {
        int32_t word;
        std::memcpy(&word, row_codes + row * kBlock + k, 4);
        const __m512i given = _mm512_set1_epi32(word);
#pragma GCC unroll 2
        for (int tile = 0; tile < TILES; ++tile)
          total[row][tile] = (IntLanes)_mm512_dpbusd_epi32((__m512i)total[row][tile], given, (__m512i)four[tile]);
      }
#else
      ShortLanes even[TILES], odd[TILES];  // the first and third of the four, the second and fourth
      for (int tile = 0; tile < TILES; ++tile) {
        even[tile] = (same_bits<ShortLanes>(four[tile]) << 8) >> 8;
        odd[tile] = same_bits<ShortLanes>(four[tile]) >> 8;
      }
#pragma GCC unroll 8
      for (int row = 0; row < kRowsTogether; ++row) {
        uint32_t word;
        std::memcpy(&word, row_codes + row * kBlock + k, 4);
        const ShortLanes first = same_bits<ShortLanes>(IntLanes{} + int32_t(word & 0x00ff00ffu));
        const ShortLanes second = same_bits<ShortLanes>(IntLanes{} + int32_t((word >> 8) & 0x00ff00ffu));
#pragma GCC unroll 2
        for (int tile = 0; tile < TILES; ++tile)
          total[row][tile] += pair_products(even[tile], first) + pair_products(odd[tile], second);
      }
#endif
    }
  }
#pragma GCC unroll 8
  for (int row = 0; row < kRowsTogether; ++row)
#pragma GCC unroll 2
    for (int tile = 0; tile < TILES; ++tile)
      std::memcpy(sums + (row * TILES + tile) * kTile, &total[row][tile], sizeof(IntLanes));
}
#endif
