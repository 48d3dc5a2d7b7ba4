// Tiles between global and shared memory on sm_80: cp.async in, plain stores out, in pieces as wide as the arrays' alignment allows.
#pragma once

#include "arch/sm80.cuh"
#include "tile/sequence.cuh"
#include "tile/swizzle.cuh"

namespace tile {

// How the threads of a CTA share the pieces of a tile: kRowThreads of them side by side cover kWidth columns of a row, and the
// CTA covers kRowStep rows at a time. The width divides every number of columns (a multiple of 32) and keeps kRowStep a power of two.
template <int kColumns, int kBytes, int kThreads>
struct Pieces {
  static constexpr int kWidth = kColumns % kChunkColumns == 0 ? kChunkColumns : 32;
  static constexpr int kPieceColumns = kBytes / 2;
  static constexpr int kRowThreads = kWidth / kPieceColumns;
  static constexpr int kRowStep = kThreads / kRowThreads;

  static DEVICE int row() { return static_cast<uint32>(arch::thread_index()) / kRowThreads; }
  static DEVICE int column() { return static_cast<uint32>(arch::thread_index()) % kRowThreads * kPieceColumns; }
};

// Starts copying rows [first_row, first_row + kRows) into a tile; rows from end_row on and columns from `columns` on become zeros.
template <int kRows, int kColumns, int kBytes, int kThreads, class Element>
DEVICE void load_tile(SharedAddress tile, const HeadRows<Element>& rows, int first_row, int end_row, int columns) {
  using Share = Pieces<kColumns, kBytes, kThreads>;
  const int thread_row = Share::row();
  const char* source = rows.row(first_row + thread_row);
#pragma unroll
  for (int r = 0; r < kRows; r += Share::kRowStep, source += Share::kRowStep * rows.row_bytes) {
    const int row = thread_row + r;
    if (kRows % Share::kRowStep != 0 && row >= kRows) break;
#pragma unroll
    for (int c = 0; c < kColumns; c += Share::kWidth) {
      const int column = Share::column() + c;
      arch::copy_async<kBytes>(tile + swizzled_offset<kRows>(row, column), source + 2 * column,
                               first_row + row < end_row && column < columns);
    }
  }
}

// Writes rows [first_row, min(first_row + kRows, end_row)) of a tile, `columns` wide.
template <int kRows, int kColumns, int kBytes, int kThreads, class Element>
DEVICE void store_tile(const HeadRows<Element>& rows, SharedAddress tile, int first_row, int end_row, int columns) {
  using Share = Pieces<kColumns, kBytes, kThreads>;
#pragma unroll 1
  for (int row = Share::row(); row < kRows && first_row + row < end_row; row += Share::kRowStep) {
    char* destination = rows.row(first_row + row);
#pragma unroll
    for (int c = 0; c < kColumns; c += Share::kWidth) {
      const int column = Share::column() + c;
      if (column < columns)
        arch::copy_shared_to_global<kBytes>(destination + 2 * column, tile + swizzled_offset<kRows>(row, column));
    }
  }
}

// Starts copying kCount floats of a per-row statistic; source and destination are 16-byte aligned.
template <int kCount, int kThreads>
DEVICE void load_statistic(SharedAddress destination, const float* source) {
  for (int i = 4 * arch::thread_index(); i < kCount; i += 4 * kThreads)
    arch::copy_async<16>(destination + 4 * i, source + i, true);
}

}  // namespace tile
