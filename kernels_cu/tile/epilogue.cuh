// From slabs in registers to tiles of elements in shared memory: outputs on their way out, and operands that other warps need.
#pragma once

#include "tile/fragment.cuh"
#include "tile/swizzle.cuh"

namespace tile {

// Writes a slab to rows row .. row + 15, columns column .. of a tile, each of the thread's two rows multiplied by its factor.
// A row that is not kept becomes zero whatever it holds: absent rows must not pass on a NaN.
template <class Element, int kRows, int kSize>
DEVICE void stage_slab(SharedAddress tile, int row, int column, const float (&slab)[kSize], const float (&factor)[2],
                       const bool (&keep)[2]) {
#pragma unroll
  for (int i = 0; i < kSize; i += 2) {
    const int r = (i >> 1) & 1;
    const uint32 pair = arch::pack<Element>(keep[r] ? slab[i] * factor[r] : 0.f, keep[r] ? slab[i + 1] * factor[r] : 0.f);
    arch::store_shared(
        tile + swizzled_offset<kRows>(row + lane_row() + slab_row(i), column + lane_column() + slab_column(i)), pair);
  }
}

// Writes a packed slab (fragment.cuh: to_operand) to rows row .. row + 15, columns column .. of a tile.
template <int kRows, int kSize>
DEVICE void store_operand(SharedAddress tile, int row, int column, const uint32 (&operand)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i)
    arch::store_shared(tile + swizzled_offset<kRows>(row + lane_row() + slab_row(2 * i),
                                                     column + lane_column() + slab_column(2 * i)),
                       operand[i]);
}

}  // namespace tile
