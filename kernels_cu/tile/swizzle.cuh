// How a tile of 16-bit elements lies in shared memory, on every architecture.
//
// A tile [rows][columns] is stored in chunks of 64 columns: [columns / 64][rows][64], so that a row of a chunk is 128 bytes.
// The 16-byte piece p of row r lies at position p ^ (r % 8): the eight rows that one 8x8 matrix load touches fall into
// eight different groups of banks. TMA's 128-byte swizzle writes exactly this pattern.
#pragma once

#include "arch/common.cuh"

namespace tile {

constexpr int kChunkColumns = 64;
constexpr int kChunkRowBytes = 128;

constexpr DEVICE int chunks(int columns) { return (columns + kChunkColumns - 1) / kChunkColumns; }
constexpr DEVICE int tile_bytes(int rows, int columns) { return chunks(columns) * rows * kChunkRowBytes; }

// Bytes from the start of a tile to element (row, column). Unsigned, so that division by powers of two is a shift.
template <int kRows>
DEVICE uint32 swizzled_offset(uint32 row, uint32 column) {
  const uint32 piece = (column / 8) % 8;
  return (column / kChunkColumns) * (kRows * kChunkRowBytes) + row * kChunkRowBytes + ((piece ^ (row % 8)) * 16) +
         (column % 8) * 2;
}

// In which order a load of a 16x16 block brings its four 8x8 matrices: first down the rows, or first along the columns. The
// registers of a left operand go down the product's rows first; those of a right operand along the contraction first, so
// that each column of eight has its two registers side by side, as the instruction wants them.
enum class BlockOrder { kRowsFirst, kColumnsFirst };

// A tile seen by the lanes of a warp that load its 16x16 blocks with ldmatrix: lane l addresses row l % 8 of matrix l / 8.
template <int kRows, BlockOrder kOrder>
struct SharedTile {
  SharedAddress lane_address;

  // `address` is a multiple of 1024 bytes.
  DEVICE explicit SharedTile(SharedAddress address) {
    const uint32 lane = arch::lane_index();
    const uint32 row_half = kOrder == BlockOrder::kRowsFirst ? lane / 8 % 2 : lane / 16;
    const uint32 column_half = kOrder == BlockOrder::kRowsFirst ? lane / 16 : lane / 8 % 2;
    lane_address = address + swizzled_offset<kRows>(8 * row_half + lane % 8, 8 * column_half);
  }

  // Rows and columns are multiples of 16. The column enters by XOR because the swizzle acts on the final address bits.
  DEVICE SharedAddress block(uint32 row, uint32 column) const {
    return (lane_address ^ (column / 16 % 4 * 32)) + column / kChunkColumns * (kRows * kChunkRowBytes) + row * kChunkRowBytes;
  }
};

template <int kRows>
using RowsFirst = SharedTile<kRows, BlockOrder::kRowsFirst>;
template <int kRows>
using ColumnsFirst = SharedTile<kRows, BlockOrder::kColumnsFirst>;

}  // namespace tile
