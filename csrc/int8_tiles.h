// The product of int8_product.h by the sums of int8_dot.h or int8_amx.h: int8_cpu.cpp includes this file after each.
// Knows no torch.

// Columns of tiles `begin` ... `end` - 1 of the product, into out (rows, columns).
template <class T>
static void product_tiles(const Int8Product& p, int64_t begin, int64_t end, T* out) {
  const int64_t block_stride = p.padded_rows() * kBlock, tile_bytes = p.blocks * kBlock * kTile;
  [[maybe_unused]] const Registers prepared;
  alignas(64) int32_t sums[kRowsTogether * kTilesTogether * kTile];
  for (int64_t first = begin; first < end; first += kTilesTogether) {
    const int tiles = first + kTilesTogether <= end ? kTilesTogether : 1;
    const auto dot = tiles == 1 ? &dot_rows<1> : &dot_rows<kTilesTogether>;
    for (int64_t row = 0; row < p.rows; row += kRowsTogether) {
      const int rows = int(p.rows - row < kRowsTogether ? p.rows - row : kRowsTogether);
      dot(p.codes + row * kBlock, block_stride, rows, p.weights + first * tile_bytes, tile_bytes, int(p.blocks), sums);
      for (int tile = 0; tile < tiles; ++tile) {
        const int64_t column = (first + tile) * kTile;
        const int count = int(p.columns - column < kTile ? p.columns - column : kTile);
        store_rows(sums + tile * kTile, tiles * kTile, rows, p.correction + column, p.weight_scale + column,
                   p.scale + row, count, out + row * p.columns + column, p.columns);
      }
    }
  }
}
