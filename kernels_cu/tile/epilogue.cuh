// From slabs in registers to tiles of elements in shared memory: outputs on their way out, and operands that other warps need.
#pragma once

#include "tile/fragment.cuh"
#include "tile/sequence.cuh"
#include "tile/softmax.cuh"
#include "tile/swizzle.cuh"

namespace tile {

// Ends the softmax of a slab: adds the sink, writes the log-sum-exps, and says by what the outputs of the thread's two rows are
// multiplied. `row` is the thread's first row in the sequence. Absent rows are not kept.
template <class Config>
DEVICE void finish_rows(RowState& state, float unit, const Score& score, const DropoutKey& dropout, const Shape& shape, int batch,
                        int head, int row, int present_rows, float* lse, float (&factor)[2], bool (&keep)[2]) {
#pragma unroll
  for (int r = 0; r < 2; ++r, row += 8) {
    keep[r] = row < present_rows;
    state.sum[r] = row_sum(state.sum[r]);
    factor[r] = 1.f;
    if constexpr (Config::sinks) factor[r] = add_sink(state, r, unit, score.sinks[head]);
    if constexpr (Config::dropout) factor[r] *= dropout.scale;
    factor[r] = state.sum[r] == 0.f ? 0.f : factor[r] / state.sum[r];
    if (lse != nullptr && row < shape.seqlen_q && arch::lane_index() % 4 == 0)
      lse[statistic_offset(shape, batch, head, shape.seqlen_q, row)] =
          keep[r] ? log_sum_exp(state.maximum[r], state.sum[r], unit) : -arch::infinity();
  }
}

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
