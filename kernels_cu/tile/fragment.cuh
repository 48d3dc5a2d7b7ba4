// The accumulator of the tensor cores, as every tile function sees it.
//
// mma.sync m16n8 (sm_80 and later) and wgmma m64nN (sm_90a) spread a 16-row slab over a warp in the same way. A thread holds
// float slab[N / 2]; element i is at
//     row    = lane / 4       + slab_row(i)       (0 or 8)
//     column = 2 * (lane % 4) + slab_column(i)
// so a thread owns two rows, and the four lanes of a quad share them.
#pragma once

#include "arch/common.cuh"

namespace tile {

constexpr int kSlabRows = 16;

constexpr DEVICE int slab_row(int i) { return ((i >> 1) & 1) * 8; }
constexpr DEVICE int slab_column(int i) { return (i >> 2) * 8 + (i & 1); }
DEVICE int lane_row() { return arch::lane_index() / 4; }
DEVICE int lane_column() { return 2 * (arch::lane_index() % 4); }

// Which side of a score slab the queries are on: rows in the forward (S = Q K^T), columns in the backward (S^T = K Q^T).
// query(i) and key(i) are offsets from lane_query() and lane_key(), known at compile time.
struct QueryRows {
  static constexpr bool kQueryRows = true;
  static constexpr DEVICE int query(int i) { return slab_row(i); }
  static constexpr DEVICE int key(int i) { return slab_column(i); }
  static DEVICE int lane_query() { return lane_row(); }
  static DEVICE int lane_key() { return lane_column(); }
};
struct KeyRows {
  static constexpr bool kQueryRows = false;
  static constexpr DEVICE int query(int i) { return slab_column(i); }
  static constexpr DEVICE int key(int i) { return slab_row(i); }
  static DEVICE int lane_query() { return lane_column(); }
  static DEVICE int lane_key() { return lane_row(); }
};

template <int kSize>
DEVICE void clear(float (&slab)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) slab[i] = 0.f;
}

template <int kSize>
DEVICE void multiply(float (&slab)[kSize], const float (&factor)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) slab[i] *= factor[i];
}

template <int kSize>
DEVICE void multiply(float (&slab)[kSize], float factor) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) slab[i] *= factor;
}

// Sum or maximum over the four lanes that share a row.
DEVICE float row_sum(float value) {
  value += arch::shuffle_xor(value, 2);
  return value + arch::shuffle_xor(value, 1);
}
DEVICE float row_maximum(float value) {
  value = arch::maximum(value, arch::shuffle_xor(value, 2));
  return arch::maximum(value, arch::shuffle_xor(value, 1));
}

// A slab as the left operand of the next product: registers 4k .. 4k + 3 are the 16x16 fragment of columns 16k .. 16k + 15.
template <class Element, int kSize>
DEVICE void to_operand(uint32 (&operand)[kSize / 2], const float (&slab)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize / 2; ++i) operand[i] = arch::pack<Element>(slab[2 * i], slab[2 * i + 1]);
}

// Part `index` of a slab or of an operand in kPart registers each.
template <int kPart, class Register, int kSize>
DEVICE Register (&part_of(Register (&slab)[kSize], int index))[kPart] {
  return reinterpret_cast<Register(&)[kPart]>(slab[index * kPart]);
}

}  // namespace tile
