// Forward attention on mma.sync (sm_80 and later): one CTA computes block_m rows of one head's output.
//
// Shared memory:  q [block_m][head_dim]  |  num_stages x { k [block_n][head_dim]  v [block_n][head_dim_v] }
// The output is staged where q was.
//
// A warp owns 16 or 32 query rows (one or two slabs) and keeps their scores, probabilities and outputs in registers.
#include "arch/sm80.cuh"
#include "tile/copy.cuh"
#include "tile/dropout.cuh"
#include "tile/epilogue.cuh"
#include "tile/mask.cuh"
#include "tile/matmul.cuh"
#include "tile/modifier.cuh"
#include "tile/scheduler.cuh"
#include "tile/softmax.cuh"

namespace {

using Element = Config::Element;
using tile::QueryRows;

constexpr int kBlockM = Config::block_m, kBlockN = Config::block_n;
constexpr int kThreads = Config::num_warps * kWarpSize;
constexpr int kSlabs = kBlockM / (tile::kSlabRows * Config::num_warps);  // slabs of a warp
constexpr int kWarpRows = kSlabs * tile::kSlabRows;
static_assert(kSlabs * tile::kSlabRows * Config::num_warps == kBlockM, "block_m is a multiple of 16 rows a warp");

constexpr int kKeyBytes = tile::tile_bytes(kBlockN, Config::head_dim);
constexpr int kStageBytes = kKeyBytes + tile::tile_bytes(kBlockN, Config::head_dim_v);
constexpr int kQueryBytes = tile::tile_bytes(kBlockM, Config::head_dim > Config::head_dim_v ? Config::head_dim : Config::head_dim_v);

DEVICE tile::TileIndex tile_of(const Shape& shape) {
  const int num_blocks = tile::ceil_divide(shape.seqlen_q, kBlockM);
  if constexpr (Config::window_right) {
    // Under a causal mask the last rows see the most keys.
    const auto index =
        tile::longest_first(arch::block_index(), num_blocks, shape.num_heads, shape.batch, shape.section_heads);
    return {num_blocks - 1 - index.block, index.head, index.batch};
  } else {
    return tile::head_after_head(arch::block_index(), num_blocks, shape.num_heads);
  }
}

}  // namespace

KERNEL(kThreads, Config::min_blocks) forward_sm80(GRID_CONSTANT ForwardParams params) {
  const Shape& shape = params.shape;
  const auto [m_block, head, batch] = tile_of(shape);
  const tile::Sequence sequence(shape, batch);
  const tile::Band<Config> band(shape, sequence);
  const tile::Modifier<Config> modifier(params.score, batch, head);
  const tile::Dropout dropout(params.dropout, batch, head);
  const int kv_head = head / shape.group_size;
  const tile::HeadRows<Element> q_rows(params.q, batch, head), k_rows(params.k, batch, kv_head),
      v_rows(params.v, batch, kv_head);
  const float unit = modifier.unit();

  const SharedAddress q_tile = arch::shared_base();
  const SharedAddress stages = q_tile + kQueryBytes;
  const auto load_stage = [&](int stage, int n_block) {
    const SharedAddress k_tile = stages + stage * kStageBytes;
    tile::load_tile<kBlockN, Config::head_dim, Config::load_bytes, kThreads>(k_tile, k_rows, n_block * kBlockN,
                                                                             sequence.seqlen_k, shape.head_dim);
    tile::load_tile<kBlockN, Config::head_dim_v, Config::load_bytes, kThreads>(
        k_tile + kKeyBytes, v_rows, n_block * kBlockN, sequence.seqlen_k, shape.head_dim_v);
    arch::copy_async_commit();
  };

  const int first_query = m_block * kBlockM;
  const int warp_query = arch::warp_index() * kWarpRows;  // this warp's first row in the tile
  const tile::Range blocks = band.template key_blocks<kBlockM, kBlockN>(first_query);

  float out[kSlabs][Config::head_dim_v / 2];
  tile::RowState state[kSlabs];
#pragma unroll
  for (int s = 0; s < kSlabs; ++s) tile::clear(out[s]);

  if (blocks.begin < blocks.end) {
    tile::load_tile<kBlockM, Config::head_dim, Config::load_bytes, kThreads>(q_tile, q_rows, first_query, sequence.seqlen_q,
                                                                             shape.head_dim);
    load_stage(0, blocks.end - 1);
  }


  // From the diagonal to the left: the first blocks are the ones that a causal mask cuts.
#pragma unroll 1
  for (int n_block = blocks.end - 1, stage = 0; n_block >= blocks.begin; --n_block) {
    arch::copy_async_wait<0>();
    arch::block_barrier();  // this block has arrived for all warps, and all warps are done with the previous one
    const SharedAddress k_tile = stages + stage * kStageBytes;
    if constexpr (Config::num_stages == 2) {
      stage ^= 1;
      if (n_block > blocks.begin) load_stage(stage, n_block - 1);
    }

    float scores[kSlabs][kBlockN / 2];
#pragma unroll
    for (int s = 0; s < kSlabs; ++s) tile::clear(scores[s]);
    tile::multiply_transposed<Element, Config::head_dim>(scores, tile::RowsFirst<kBlockM>(q_tile), warp_query,
                                                         tile::ColumnsFirst<kBlockN>(k_tile), 0);

    const int first_key = n_block * kBlockN;
    const bool cut = band.template cuts<kBlockM, kBlockN>(first_query, first_key);
    uint32 probabilities[kSlabs][kBlockN / 4];
#pragma unroll
    for (int s = 0; s < kSlabs; ++s) {
      const int query = first_query + warp_query + tile::kSlabRows * s;
      modifier.cap(scores[s]);
      modifier.template shift<QueryRows>(scores[s], query, first_key, sequence.offset);
      if (cut) band.template select<QueryRows>(scores[s], -arch::infinity(), query, first_key);
      float rescale[2];
      tile::online_softmax(scores[s], state[s], unit, rescale);
      tile::scale_rows(out[s], rescale);
      if constexpr (Config::dropout)
        dropout.template for_each<QueryRows, kBlockN / 2>(query, first_key,
                                                          [&](int i, bool keep) { scores[s][i] = keep ? scores[s][i] : 0.f; });
      tile::to_operand<Element>(probabilities[s], scores[s]);
    }

    tile::multiply_registers<Element>(out, probabilities, tile::RowsFirst<kBlockN>(k_tile + kKeyBytes), 0, 0);

    if constexpr (Config::num_stages == 1) {
      arch::block_barrier();
      if (n_block > blocks.begin) load_stage(0, n_block - 1);
    }
  }

  arch::block_barrier();  // q has been read: its place is free for the output
  // Worked out anew: three registers less through the loop.
  const tile::TileIndex done = tile_of(shape);
  const int present_rows = tile::Sequence(shape, done.batch).seqlen_q;
  const int tile_row = done.block * kBlockM;
#pragma unroll
  for (int s = 0; s < kSlabs; ++s) {
    float factor[2];
    bool keep[2];
    tile::finish_rows<Config>(state[s], unit, params.score, params.dropout, shape, done.batch, done.head,
                              tile_row + warp_query + tile::kSlabRows * s + tile::lane_row(), present_rows, params.lse, factor,
                              keep);
    tile::stage_slab<Element, kBlockM>(q_tile, warp_query + tile::kSlabRows * s, 0, out[s], factor, keep);
  }
  arch::block_barrier();
  tile::store_tile<kBlockM, Config::head_dim_v, Config::store_bytes, kThreads>(
      tile::HeadRows<Element>(params.out, done.batch, done.head), q_tile, tile_row, shape.seqlen_q, shape.head_dim_v);
}
