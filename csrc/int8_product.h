// One product of rounded rows with packed weights, as int8_dot.h computes it. Knows no torch.
#pragma once

#include <cstdint>

namespace star_fast {
namespace {

constexpr int kTile = 16;    // columns of packed weights that lie together; rows of codes are padded to it
constexpr int kBlock = 64;   // entries of a row of codes that lie together
constexpr int kGroup = 256;  // entries of a row that are rotated together

// Both are padded: columns and rows to 16, inner entries to 256, with weights of 0. The 64 entries of a block lie in
// the order 0 16 32 48, 1 17 33 49 ...: so four vectors of 16 rounded entries become one of 64 bytes without a shuffle,
// and a sum does not mind its order.
// Packed weights: tiles of 16 columns; in a tile for every four entries of that order 64 bytes: four of each column.
// Packed codes: blocks of 64 entries; in a block each row's 64 bytes.
struct Int8Product {
  const uint8_t* codes;       // (blocks, rows padded, 64), 128 stands for 0
  const float* scale;         // (rows), of the codes
  const int8_t* weights;      // (tiles, 16 * blocks, 16, 4)
  const float* weight_scale;  // (16 * tiles)
  const int32_t* correction;  // (16 * tiles): 128 times the sum of a column's weights
  int64_t rows, columns, blocks;

  int64_t padded_rows() const { return (rows + kTile - 1) / kTile * kTile; }
  int64_t tiles() const { return (columns + kTile - 1) / kTile; }
};

}  // namespace
}  // namespace star_fast
