// The product of int8_dot.h by the matrix unit (AMX) of newer Xeons: same layouts, same numbers. Included by int8_cpu.cpp inside a namespace for amx-int8,
// after lanes.h and int8_rows.h. Knows no torch.

constexpr int kRowsTogether = 64;  // four tile registers of sums
constexpr int kBytesAhead = 8192;  // of weights asked for before their turn: one core waits for memory most of the time

// Tile registers of 16 rows of 64 bytes, while it lives; then as before, since PyTorch's own kernels may count on theirs.
class AmxTiles {
 public:
  AmxTiles() {
    Shape shape{};
    shape.palette = 1;
    for (int tile = 0; tile < 8; ++tile) shape.row_bytes[tile] = 64, shape.rows[tile] = 16;
    _tile_storeconfig(&before_);
    _tile_loadconfig(&shape);
  }
  ~AmxTiles() { _tile_loadconfig(&before_); }
  AmxTiles(const AmxTiles&) = delete;
  AmxTiles& operator=(const AmxTiles&) = delete;

 private:
  struct alignas(64) Shape {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
  };
  Shape before_;
};

// sums (ROW_TILES * 16, 16) = codes (ROW_TILES * 16 rows) times one tile of weights.
template <int ROW_TILES>
static void amx_rows(const uint8_t* codes, int64_t block_stride, const int8_t* weights, int blocks, int32_t* sums) {
  _tile_zero(0);
  if constexpr (ROW_TILES > 1) _tile_zero(1);
  if constexpr (ROW_TILES > 2) _tile_zero(2);
  if constexpr (ROW_TILES > 3) _tile_zero(3);
  for (int block = 0; block < blocks; ++block) {
    const int8_t* tile = weights + block * 1024;
    for (int line = 0; line < 1024; line += 64) __builtin_prefetch(tile + kBytesAhead + line);
    _tile_loadd(4, tile, 64);
    const uint8_t* rows = codes + block * block_stride;
    _tile_loadd(5, rows, 64);
    _tile_dpbusd(0, 5, 4);
    if constexpr (ROW_TILES > 1) {
      _tile_loadd(6, rows + 1024, 64);
      _tile_dpbusd(1, 6, 4);
    }
    if constexpr (ROW_TILES > 2) {
      _tile_loadd(7, rows + 2048, 64);
      _tile_dpbusd(2, 7, 4);
    }
    if constexpr (ROW_TILES > 3) {
      _tile_loadd(5, rows + 3072, 64);
      _tile_dpbusd(3, 5, 4);
    }
  }
  _tile_stored(0, sums, 64);
  if constexpr (ROW_TILES > 1) _tile_stored(1, sums + 256, 64);
  if constexpr (ROW_TILES > 2) _tile_stored(2, sums + 512, 64);
  if constexpr (ROW_TILES > 3) _tile_stored(3, sums + 768, 64);
}

// Columns of tiles `begin` ... `end` - 1: codes times weights, scaled.
template <class T>
static void product_tiles(const Int8Product& p, int64_t begin, int64_t end, T* out) {
  const AmxTiles configured;
  const int64_t block_stride = p.padded_rows() * kBlock, tile_bytes = p.blocks * kBlock * kTile;
  alignas(64) int32_t sums[kRowsTogether * kTile];
  for (int64_t tile = begin; tile < end; ++tile) {
    const int64_t column = tile * kTile;
    const int count = int(p.columns - column < kTile ? p.columns - column : kTile);
    for (int64_t row = 0; row < p.rows; row += kRowsTogether) {
      const int rows = int(p.rows - row < kRowsTogether ? p.rows - row : kRowsTogether), row_tiles = (rows + kTile - 1) / kTile;
      const auto dot = row_tiles == 1 ? &amx_rows<1> : row_tiles == 2 ? &amx_rows<2> : row_tiles == 3 ? &amx_rows<3> : &amx_rows<4>;
      dot(p.codes + row * kBlock, block_stride, p.weights + tile * tile_bytes, int(p.blocks), sums);
      store_rows(sums, kTile, rows, p.correction + column, p.weight_scale + column, p.scale + row, count, out + row * p.columns + column, p.columns);
    }
  }
}
