// After the portable backward: the float32 accumulator of dq, scaled, to the element type. One CTA takes block_m rows of one head.
#include "arch/common.cuh"
#include "tile/copy.cuh"
#include "tile/epilogue.cuh"
#include "tile/gradient.cuh"
#include "tile/scheduler.cuh"

namespace {

using Element = Config::Element;
using Share = tile::DqShare<Config>;

constexpr int kBlockM = Config::block_m;
constexpr int kThreads = Config::num_warps * kWarpSize;

}  // namespace

KERNEL(kThreads, 1) backward_finish(GRID_CONSTANT BackwardParams params) {
  const Shape& shape = params.shape;
  const auto [m_block, head, batch] =
      tile::head_after_head(arch::block_index(), params.padded_seqlen_q / kBlockM, shape.num_heads);
  const SharedAddress dq_tile = arch::shared_base();
  const float* accumulator = Share::accumulator(params, batch, head, m_block);
  const float factor[2] = {params.score.scale, params.score.scale};
  const bool keep[2] = {true, true};
#pragma unroll
  for (int s = 0; s < Share::kSlabs; ++s) {
    float slab[Share::kColumns / 2];
#pragma unroll
    for (int i = 0; i < Share::kColumns / 2; ++i) slab[i] = accumulator[Share::offset(s, i)];
    tile::stage_slab<Element, kBlockM>(dq_tile, Share::row() + tile::kSlabRows * s, Share::column(), slab, factor, keep);
  }
  arch::block_barrier();
  tile::store_tile<kBlockM, Config::head_dim, Config::store_bytes, kThreads>(
      tile::HeadRows<Element>(params.dq, batch, head), dq_tile, m_block * kBlockM, shape.seqlen_q, shape.head_dim);
}
