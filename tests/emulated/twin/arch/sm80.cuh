// The host twin of kernels_cu/arch/sm80.cuh: the same names, on the machine of machine/.
#pragma once

#include "arch/common.cuh"

namespace arch {

template <int kBytes>
DEVICE void copy_async(SharedAddress shared, const void* global, bool valid, Where where = {}) {
  if constexpr (kBytes == 2) {
    uint16_t value = 0;
    if (valid) twin::read_global(global, &value, kBytes, where);
    twin::write_shared(shared, &value, kBytes, where);
  } else {
    twin::begin_copy(shared, valid ? global : nullptr, kBytes, where);
  }
}
DEVICE void copy_async_commit() { twin::commit_copies(); }
template <int kPending>
DEVICE void copy_async_wait() {
  twin::wait_for_copies(kPending);
}

// ---- ldmatrix -----------------------------------------------------------------------------------------------------------------------

struct MatrixLoad {
  SharedAddress address;
  uint32* matrices;
  Where where;
};

// Lane l gives row l % 8 of matrix l / 8, and receives (row l / 4, columns 2 * (l % 4) and + 1) of each matrix.
template <bool kTransposed>
void distribute_matrices(MatrixLoad* const* lanes) {
  uint16_t matrix[4][8][8];
  for (int lane = 0; lane < kWarpSize; ++lane)
    twin::read_shared_for_lane(lane, lanes[lane]->address, matrix[lane / 8][lane % 8], 16, lanes[lane]->where);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int row = lane / 4, column = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const uint32 low = kTransposed ? matrix[i][column][row] : matrix[i][row][column];
      const uint32 high = kTransposed ? matrix[i][column + 1][row] : matrix[i][row][column + 1];
      lanes[lane]->matrices[i] = low | high << 16;
    }
  }
}
DEVICE void load_matrix(uint32 (&matrices)[4], SharedAddress address, Where where = {}) {
  MatrixLoad load{address, matrices, where};
  twin::meet<MatrixLoad, distribute_matrices<false>>("load_matrix", load, where);
}
DEVICE void load_matrix_transposed(uint32 (&matrices)[4], SharedAddress address, Where where = {}) {
  MatrixLoad load{address, matrices, where};
  twin::meet<MatrixLoad, distribute_matrices<true>>("load_matrix_transposed", load, where);
}

// ---- mma ----------------------------------------------------------------------------------------------------------------------------

struct Mma {
  float* d;
  const uint32* a;
  uint32 b[2];
};

// Products of 16-bit elements are exact in float32; sums are rounded one by one in the order of k. (The device keeps more bits
// within one instruction; both are inside the library's error bound.)
template <typename Element>
void multiply_matrices(Mma* const* lanes) {
  float a[16][16], b[16][8], d[16][8];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    const int row = lane / 4, column = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      float* const pair = &a[row + i % 2 * 8][column + i / 2 * 8];
      pair[0] = unpack_low<Element>(lanes[lane]->a[i]);
      pair[1] = unpack_high<Element>(lanes[lane]->a[i]);
      d[row + i / 2 * 8][column + i % 2] = lanes[lane]->d[i];
    }
    for (int i = 0; i < 2; ++i) {
      b[column + i * 8][row] = unpack_low<Element>(lanes[lane]->b[i]);
      b[column + i * 8 + 1][row] = unpack_high<Element>(lanes[lane]->b[i]);
    }
  }
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < 16; ++k)
      for (int column = 0; column < 8; ++column) d[row][column] += a[row][k] * b[k][column];
  for (int lane = 0; lane < kWarpSize; ++lane)
    for (int i = 0; i < 4; ++i) lanes[lane]->d[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
}

template <typename Element>
DEVICE void mma_m16n8k16(float* d, const uint32* a, uint32 b0, uint32 b1, Where where = {}) {
  Mma mma{d, a, {b0, b1}};
  twin::meet<Mma, multiply_matrices<Element>>("mma_m16n8k16", mma, where);
}

}  // namespace arch
