// Products of a warpgroup on wgmma: 64 rows, one slab of 16 a warp, times tiles in shared memory. They only start the product:
// product_wait ends it, and until then neither accumulators nor register operands may be touched.
#pragma once

#include "arch/sm90.cuh"
#include "tile/fragment.cuh"
#include "tile/swizzle.cuh"

namespace tile {

constexpr int kWarpgroupRows = 64;

// Bytes from the start of a tile to its 16-column block k of every row.
template <int kRows>
constexpr DEVICE int column_block_bytes(int k) {
  return k / 4 * (kRows * kChunkRowBytes) + k % 4 * 32;
}

// slab = A[row_a ..][:] . B^T over kDepth columns of both tiles; row_a is a multiple of 64. The slab may be narrower than B has rows.
template <class Element, int kDepth, int kRowsA, int kRowsB, int kSize>
DEVICE void start_transposed(float (&slab)[kSize], SharedAddress a, int row_a, SharedAddress b) {
  static_assert(2 * kSize <= kRowsB);
  const arch::ProductOperand operand_a(a + row_a * kChunkRowBytes, 16), operand_b(b, 16);
  arch::pin(slab);
  arch::product_fence();
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k)
    arch::Product<2 * kSize, Element>::shared(slab, operand_a.at(column_block_bytes<kRowsA>(k)),
                                              operand_b.at(column_block_bytes<kRowsB>(k)), k > 0);
  arch::product_commit();
  arch::pin(slab);
}

// slab += operand . B: the left operand in registers (fragment.cuh: to_operand), the contraction along the kRowsB rows of B.
template <class Element, int kColumns, int kRowsB>
DEVICE void start_registers(float (&slab)[kColumns / 2], uint32 (&operand)[kRowsB / 4], SharedAddress b) {
  const arch::ProductOperand operand_b(b, kRowsB * kChunkRowBytes);
  arch::pin(slab);
  arch::pin(operand);
  arch::product_fence();
#pragma unroll
  for (int k = 0; k < kRowsB / 16; ++k)
    arch::Product<kColumns, Element>::registers(slab, operand + 4 * k, operand_b.at(k * 16 * kChunkRowBytes));
  arch::product_commit();
  arch::pin(slab);
  arch::pin(operand);
}

// slab = A[row_a ..][0 .. kDepth) . B[0 .. kDepth)[64 chunk_b ..]: the contraction along the columns of A and the rows of B.
template <class Element, int kColumns, int kDepth, int kRowsA, int kRowsB>
DEVICE void start_tiles(float (&slab)[kColumns / 2], SharedAddress a, int row_a, SharedAddress b, int chunk_b) {
  const arch::ProductOperand operand_a(a + row_a * kChunkRowBytes, 16);
  const arch::ProductOperand operand_b(b + chunk_b * kRowsB * kChunkRowBytes, kRowsB * kChunkRowBytes);
  arch::pin(slab);
  arch::product_fence();
#pragma unroll
  for (int k = 0; k < kDepth / 16; ++k)
    arch::Product<kColumns, Element>::shared_rows(slab, operand_a.at(column_block_bytes<kRowsA>(k)),
                                                  operand_b.at(k * 16 * kChunkRowBytes), k > 0);
  arch::product_commit();
  arch::pin(slab);
}

// Writes a packed slab (fragment.cuh: to_operand) transposed: its rows to columns column .. column + 15 of a tile, its columns
// to the tile's rows from 0 on.
template <int kRows, int kSize>
DEVICE void store_operand_transposed(SharedAddress tile, int column, const uint32 (&operand)[kSize]) {
  const uint32 lane = arch::lane_index();
#pragma unroll
  for (int t = 0; t < kSize / 4; ++t)
    arch::store_matrix_transposed(tile + swizzled_offset<kRows>(16 * t + lane % 8 + lane / 16 * 8, column + lane / 8 % 2 * 8),
                                  operand[4 * t], operand[4 * t + 1], operand[4 * t + 2], operand[4 * t + 3]);
}

// Writes the slab of a warp to rows row .. row + 15 of a tile, each of the thread's two rows multiplied by its factor; a row that
// is not kept becomes zero. Like epilogue.cuh: stage_slab, four 8x8 matrices at a time.
// Of a slab wider than the tile: chunks first_chunk .. first_chunk + num_chunks - 1 of 64 columns.
template <class Element, int kRows, int kSize>
DEVICE void stage_slab_by_matrix(SharedAddress tile, int row, const float (&slab)[kSize], int first_chunk, int num_chunks,
                                 const float (&factor)[2], const bool (&keep)[2]) {
  const uint32 lane = arch::lane_index();
  const uint32 lane_row = row + lane % 16;
  const int first = first_chunk * kChunkColumns / 16, end = min(first + num_chunks * kChunkColumns / 16, kSize / 8);
#pragma unroll
  for (int t = first; t < end; ++t) {
    uint32 matrices[4];
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      const int i = 8 * t + 2 * m, r = m % 2;
      matrices[m] = arch::pack<Element>(keep[r] ? slab[i] * factor[r] : 0.f, keep[r] ? slab[i + 1] * factor[r] : 0.f);
    }
    arch::store_matrix(tile + swizzled_offset<kRows>(lane_row, 16 * (t - first) + lane / 16 * 8), matrices[0], matrices[1],
                       matrices[2], matrices[3]);
  }
}
template <class Element, int kRows, int kSize>
DEVICE void stage_slab_by_matrix(SharedAddress tile, int row, const float (&slab)[kSize], const float (&factor)[2],
                                 const bool (&keep)[2]) {
  stage_slab_by_matrix<Element, kRows>(tile, row, slab, 0, chunks(2 * kSize), factor, keep);
}

}  // namespace tile
