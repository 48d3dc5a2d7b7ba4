// Products of a warp on mma.sync: slabs of 16 rows times tiles in shared memory.
#pragma once

#include "arch/sm80.cuh"
#include "tile/fragment.cuh"
#include "tile/swizzle.cuh"

namespace tile {

// One 16x16 block of the right operand against every slab; `b` holds (contraction 0-7, 8-15) of columns 0-7, then of 8-15.
template <class Element, int kSlabs, int kSize>
DEVICE void multiply_block(float (&slabs)[kSlabs][kSize], int column, const uint32* const (&a)[kSlabs], const uint32 (&b)[4]) {
#pragma unroll
  for (int s = 0; s < kSlabs; ++s) {
    arch::mma_m16n8k16<Element>(&slabs[s][column / 2], a[s], b[0], b[1]);
    arch::mma_m16n8k16<Element>(&slabs[s][column / 2 + 4], a[s], b[2], b[3]);
  }
}

// slabs[s] += A[row_a + 16 s ..][:] . B[row_b ..][:]^T over kDepth columns of both tiles.
template <class Element, int kDepth, int kSlabs, int kSize, int kRowsA, int kRowsB>
DEVICE void multiply_transposed(float (&slabs)[kSlabs][kSize], const RowsFirst<kRowsA>& a, int row_a,
                                const ColumnsFirst<kRowsB>& b, int row_b) {
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    uint32 operand_a[kSlabs][4];
    const uint32* fragments[kSlabs];
#pragma unroll
    for (int s = 0; s < kSlabs; ++s) {
      arch::load_matrix(operand_a[s], a.block(row_a + kSlabRows * s, k));
      fragments[s] = operand_a[s];
    }
#pragma unroll
    for (int n = 0; n < 2 * kSize; n += 16) {
      uint32 operand_b[4];
      arch::load_matrix(operand_b, b.block(row_b + n, k));
      multiply_block<Element>(slabs, n, fragments, operand_b);
    }
  }
}

// slabs[s] += operand[s] . B[row_b ..][column_b ..]: the left operand in registers (fragment.cuh: to_operand).
template <class Element, int kSlabs, int kSize, int kOperandSize, int kRowsB>
DEVICE void multiply_registers(float (&slabs)[kSlabs][kSize], const uint32 (&operand)[kSlabs][kOperandSize],
                               const RowsFirst<kRowsB>& b, int row_b, int column_b) {
#pragma unroll
  for (int k = 0; k < 4 * kOperandSize; k += 16) {
    const uint32* fragments[kSlabs];
#pragma unroll
    for (int s = 0; s < kSlabs; ++s) fragments[s] = &operand[s][k / 4];
#pragma unroll
    for (int n = 0; n < 2 * kSize; n += 16) {
      uint32 operand_b[4];
      arch::load_matrix_transposed(operand_b, b.block(row_b + k, column_b + n));
      multiply_block<Element>(slabs, n, fragments, operand_b);
    }
  }
}

// One slab of the left operand, A[row ..][k ..], out of a tile whose rows are the product's rows, or its contraction.
template <int kRowsA>
DEVICE void load_left_operand(uint32 (&operand)[4], const RowsFirst<kRowsA>& a, int row, int k) {
  arch::load_matrix(operand, a.block(row, k));
}
template <int kRowsA>
DEVICE void load_left_operand(uint32 (&operand)[4], const ColumnsFirst<kRowsA>& a_transposed, int row, int k) {
  arch::load_matrix_transposed(operand, a_transposed.block(k, row));
}

// slabs[s] += A[row_a + 16 s ..][0 .. kDepth) . B[0 .. kDepth)[column_b ..]; A as load_left_operand takes it.
template <class Element, int kDepth, int kSlabs, int kSize, class TileA, int kRowsB>
DEVICE void multiply_tiles(float (&slabs)[kSlabs][kSize], const TileA& a, int row_a, const RowsFirst<kRowsB>& b, int column_b) {
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    uint32 operand_a[kSlabs][4];
    const uint32* fragments[kSlabs];
#pragma unroll
    for (int s = 0; s < kSlabs; ++s) {
      load_left_operand(operand_a[s], a, row_a + kSlabRows * s, k);
      fragments[s] = operand_a[s];
    }
#pragma unroll
    for (int n = 0; n < 2 * kSize; n += 16) {
      uint32 operand_b[4];
      arch::load_matrix_transposed(operand_b, b.block(k, column_b + n));
      multiply_block<Element>(slabs, n, fragments, operand_b);
    }
  }
}

}  // namespace tile
