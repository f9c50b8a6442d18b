// The sums of int8_dot.h by the matrix unit (AMX) of newer Xeons: same layouts, same numbers. Included by int8_cpu.cpp
// in int8_dot.h's place, inside a namespace for amx-int8. Knows no torch.

// Two tile registers of codes times two of weights: the fewest loads for the four of sums.
constexpr int kRowsTogether = 32;
constexpr int kTilesTogether = 2;
constexpr int kTileBytes = 1024;   // a register: 16 rows of 64 bytes
constexpr int kBytesAhead = 8192;  // of weights, asked for before their turn

// Tile registers of 16 rows of 64 bytes, while it lives; then as before, since PyTorch's own kernels may count on
// theirs.
class Registers {
 public:
  Registers() {
    Shape shape{};
    shape.palette = 1;
    for (int tile = 0; tile < 8; ++tile) shape.row_bytes[tile] = 64, shape.rows[tile] = 16;
    _tile_storeconfig(&before_);
    _tile_loadconfig(&shape);
  }
  ~Registers() { _tile_loadconfig(&before_); }
  Registers(const Registers&) = delete;
  Registers& operator=(const Registers&) = delete;

 private:
  struct alignas(64) Shape {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  Shape before_;
};

// As int8_dot.h's; with 16 rows or fewer the second half of `sums` is left alone.
template <int TILES>
static void dot_rows(const uint8_t* codes, int64_t block_stride, int rows, const int8_t* weights, int64_t tile_bytes,
                     int blocks, int32_t* sums) {
  const bool both = rows > kTile;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int block = 0; block < blocks; ++block) {
    const int8_t* here = weights + block * kTileBytes;
    for (int tile = 0; tile < TILES; ++tile)
      for (int line = 0; line < kTileBytes; line += 64)
        _mm_prefetch(reinterpret_cast<const char*>(here) + tile * tile_bytes + kBytesAhead + line, _MM_HINT_T1);
    const uint8_t* row_codes = codes + block * block_stride;
    _tile_loadd(4, here, 64);
    _tile_loadd(6, row_codes, 64);
    _tile_dpbusd(0, 6, 4);
    if constexpr (TILES > 1) {
      _tile_loadd(5, here + tile_bytes, 64);
      _tile_dpbusd(1, 6, 5);
    }
    if (both) {
      _tile_loadd(7, row_codes + kTileBytes, 64);
      _tile_dpbusd(2, 7, 4);
      if constexpr (TILES > 1) _tile_dpbusd(3, 7, 5);
    }
  }
  constexpr int kStride = TILES * kTile;
  _tile_stored(0, sums, kStride * 4);
  if constexpr (TILES > 1) _tile_stored(1, sums + kTile, kStride * 4);
  if (both) {
    _tile_stored(2, sums + kTile * kStride, kStride * 4);
    if constexpr (TILES > 1) _tile_stored(3, sums + kTile * kStride + kTile, kStride * 4);
  }
}
