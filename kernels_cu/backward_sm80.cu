// Backward attention on mma.sync (sm_80 and later): one CTA computes dk and dv of block_n keys of one key/value head, and adds
// its part of dq for every query block that sees them. The query heads of a group are worked on one after another, so that dk
// and dv stay in registers and need neither atomics nor memory.
//
// Shared memory:  k [block_n][head_dim]  v [block_n][head_dim_v]
//              |  num_stages x { q [block_m][head_dim]  dout [block_m][head_dim_v] }
//              |  ds [block_n][block_m]  |  p, the same, where split_d > 1
//              |  num_stages x { row_lse [block_m]  row_delta [block_m] }  (floats)
// dk and dv are staged where k and v were.
//
// Scores are computed transposed, S^T = K Q^T: a warp owns 16 or 32 keys, and P^T and dS^T leave its registers as the left
// operands of dV = P^T dO and dK = dS^T Q. Only dQ = dS K needs the dS of all warps, through shared memory. Where head_dim is too
// large for one warp to hold its rows of dk and dv, split_d warps share the keys: each computes the scores of its part of
// the queries and the gradients of its part of the columns, and P goes through shared memory as well.
#include "arch/sm80.cuh"
#include "tile/copy.cuh"
#include "tile/dropout.cuh"
#include "tile/epilogue.cuh"
#include "tile/gradient.cuh"
#include "tile/mask.cuh"
#include "tile/matmul.cuh"
#include "tile/modifier.cuh"
#include "tile/scheduler.cuh"

namespace {

using Element = Config::Element;
using Share = tile::DqShare<Config>;
using tile::KeyRows;

constexpr int kBlockM = Config::block_m, kBlockN = Config::block_n;
constexpr int kThreads = Config::num_warps * kWarpSize;
constexpr int kSplit = Config::split_d;
constexpr int kKeyWarps = Config::num_warps / kSplit;
constexpr int kSlabs = kBlockN / (tile::kSlabRows * kKeyWarps);  // slabs of keys of a warp
constexpr int kWarpKeys = kSlabs * tile::kSlabRows;
constexpr int kWarpQueries = kBlockM / kSplit;
constexpr int kWarpColumns = Config::head_dim / kSplit, kWarpColumnsV = Config::head_dim_v / kSplit;
static_assert(kWarpKeys * kKeyWarps == kBlockN, "block_n is a multiple of 16 keys a warp");
static_assert(kWarpQueries % 16 == 0, "a warp scores a multiple of 16 queries");
static_assert(kWarpColumns % 16 == 0 && kWarpColumnsV % 16 == 0, "a warp owns a multiple of 16 columns");

constexpr int kKeyBytes = tile::tile_bytes(kBlockN, Config::head_dim);
constexpr int kValueBytes = tile::tile_bytes(kBlockN, Config::head_dim_v);
constexpr int kQueryBytes = tile::tile_bytes(kBlockM, Config::head_dim);
constexpr int kStageBytes = kQueryBytes + tile::tile_bytes(kBlockM, Config::head_dim_v);
constexpr int kScoreBytes = tile::tile_bytes(kBlockN, kBlockM);
constexpr int kStatisticBytes = 2 * kBlockM * static_cast<int>(sizeof(float));

// Scores to probabilities, p = exp(s - lse). A query's log-sum-exp is in shared memory, base 2.
template <int kSize>
DEVICE void to_probabilities(float (&scores)[kSize], float unit, SharedAddress row_lse) {
#pragma unroll
  for (int i = 0; i < kSize; i += 4) {
    const float2 lse = arch::load_shared_float2(row_lse + 4 * (tile::slab_column(i) + tile::lane_column()));
    scores[i] = arch::exp2(arch::multiply_add(scores[i], unit, -lse.x));
    scores[i + 1] = arch::exp2(arch::multiply_add(scores[i + 1], unit, -lse.y));
    scores[i + 2] = arch::exp2(arch::multiply_add(scores[i + 2], unit, -lse.x));
    scores[i + 3] = arch::exp2(arch::multiply_add(scores[i + 3], unit, -lse.y));
  }
}

// dP to dS = P * (dP - delta).
template <int kSize>
DEVICE void to_score_gradients(float (&gradients)[kSize], const float (&probabilities)[kSize], SharedAddress row_delta) {
#pragma unroll
  for (int i = 0; i < kSize; i += 4) {
    const float2 delta = arch::load_shared_float2(row_delta + 4 * (tile::slab_column(i) + tile::lane_column()));
    gradients[i] = probabilities[i] * (gradients[i] - delta.x);
    gradients[i + 1] = probabilities[i + 1] * (gradients[i + 1] - delta.y);
    gradients[i + 2] = probabilities[i + 2] * (gradients[i + 2] - delta.x);
    gradients[i + 3] = probabilities[i + 3] * (gradients[i + 3] - delta.y);
  }
}

}  // namespace

KERNEL(kThreads, Config::min_blocks) backward_sm80(GRID_CONSTANT BackwardParams params) {
  const Shape& shape = params.shape;
  const tile::KeyWork<Config, kBlockM, kBlockN> work(shape, arch::block_index());
  const int n_block = work.n_block, kv_head = work.kv_head, batch = work.batch;
  const tile::Sequence sequence(shape, batch);
  const tile::Band<Config> band(shape, sequence);
  const int first_key = n_block * kBlockN;

  const SharedAddress k_tile = arch::shared_base(), v_tile = k_tile + kKeyBytes, stages = v_tile + kValueBytes;
  const SharedAddress ds_tile = stages + Config::num_stages * kStageBytes;
  const SharedAddress p_tile = ds_tile + (kSplit > 1 ? kScoreBytes : 0);
  const SharedAddress statistics = p_tile + kScoreBytes;

  const auto load_stage = [&](int stage, const tile::QueryCursor& at) {
    const int head = at.head, first_query = at.block * kBlockM;
    const SharedAddress q_tile = stages + stage * kStageBytes, row_lse = statistics + stage * kStatisticBytes;
    tile::load_tile<kBlockM, Config::head_dim, Config::load_bytes, kThreads>(
        q_tile, tile::HeadRows<Element>(params.q, batch, head), first_query, sequence.seqlen_q, shape.head_dim);
    tile::load_tile<kBlockM, Config::head_dim_v, Config::load_bytes, kThreads>(
        q_tile + kQueryBytes, tile::HeadRows<Element>(params.dout, batch, head), first_query, sequence.seqlen_q, shape.head_dim_v);
    const int64 row = tile::statistic_offset(shape, batch, head, params.padded_seqlen_q, first_query);
    tile::load_statistic<kBlockM, kThreads>(row_lse, params.row_lse + row);
    tile::load_statistic<kBlockM, kThreads>(row_lse + kStatisticBytes / 2, params.row_delta + row);
    arch::copy_async_commit();
  };

  const int key_warp = arch::warp_index() % kKeyWarps, part = arch::warp_index() / kKeyWarps;
  const int warp_key = key_warp * kWarpKeys;  // this warp's first key in the tile

  float dk[kSlabs][kWarpColumns / 2], dv[kSlabs][kWarpColumnsV / 2];
#pragma unroll
  for (int s = 0; s < kSlabs; ++s) {
    tile::clear(dk[s]);
    tile::clear(dv[s]);
  }

  if (!work.is_empty()) {
    tile::load_tile<kBlockN, Config::head_dim, Config::load_bytes, kThreads>(
        k_tile, tile::HeadRows<Element>(params.k, batch, kv_head), first_key, sequence.seqlen_k, shape.head_dim);
    tile::load_tile<kBlockN, Config::head_dim_v, Config::load_bytes, kThreads>(
        v_tile, tile::HeadRows<Element>(params.v, batch, kv_head), first_key, sequence.seqlen_k, shape.head_dim_v);
    load_stage(0, work.first());
  }

  int stage = 0;
#pragma unroll 1
  for (tile::QueryCursor here = work.first(), next = work.next(here); work.has(here); here = next, next = work.next(here)) {
    arch::copy_async_wait<0>();
    arch::block_barrier();  // this block has arrived for all warps, and all warps are done with the previous one
    const int head = here.head, m_block = here.block;
    const SharedAddress q_tile = stages + stage * kStageBytes, dout_tile = q_tile + kQueryBytes;
    const int warp_query = part * kWarpQueries;  // this warp's first scored query in the tile
    const SharedAddress row_lse = statistics + stage * kStatisticBytes + 4 * warp_query;
    if constexpr (Config::num_stages == 2) {
      stage ^= 1;
      if (work.has(next)) load_stage(stage, next);
    }
    const tile::Modifier<Config> modifier(params.score, batch, head);
    const tile::Dropout dropout(params.dropout, batch, head);
    const int query = m_block * kBlockM + warp_query;
    const bool cut = band.template cuts<kBlockM, kBlockN>(m_block * kBlockM, first_key);

    float scores[kSlabs][kWarpQueries / 2], gradients[kSlabs][kWarpQueries / 2];
#pragma unroll
    for (int s = 0; s < kSlabs; ++s) {
      tile::clear(scores[s]);
      tile::clear(gradients[s]);
    }
    tile::multiply_transposed<Element, Config::head_dim>(scores, tile::RowsFirst<kBlockN>(k_tile), warp_key,
                                                         tile::ColumnsFirst<kBlockM>(q_tile), warp_query);
    float derivative[kSlabs][kWarpQueries / 2];  // of the softcap
#pragma unroll
    for (int s = 0; s < kSlabs; ++s) {
      const int key = first_key + warp_key + tile::kSlabRows * s;
      modifier.cap(scores[s]);
      if constexpr (Config::softcap) modifier.softcap_derivative(derivative[s], scores[s]);
      modifier.template shift<KeyRows>(scores[s], query, key, sequence.offset);
      if (cut) band.template select<KeyRows>(scores[s], -arch::infinity(), query, key);
      to_probabilities(scores[s], modifier.unit(), row_lse);
    }

    tile::multiply_transposed<Element, Config::head_dim_v>(gradients, tile::RowsFirst<kBlockN>(v_tile), warp_key,
                                                           tile::ColumnsFirst<kBlockM>(dout_tile), warp_query);
    uint32 p[kSlabs][kWarpQueries / 4], ds[kSlabs][kWarpQueries / 4];
#pragma unroll
    for (int s = 0; s < kSlabs; ++s) {
      const int key = first_key + warp_key + tile::kSlabRows * s;
      if constexpr (Config::dropout) {
        // P as dv sees it has holes; dS needs P without them, and dP with them.
        float kept[kWarpQueries / 2];
        dropout.template for_each<KeyRows, kWarpQueries / 2>(query, key, [&](int i, bool keep) {
          kept[i] = keep ? scores[s][i] : 0.f;
          gradients[s][i] = keep ? gradients[s][i] * params.dropout.scale : 0.f;
        });
        tile::to_operand<Element>(p[s], kept);
      } else {
        tile::to_operand<Element>(p[s], scores[s]);
      }
      to_score_gradients(gradients[s], scores[s], row_lse + kStatisticBytes / 2);
      if constexpr (Config::softcap) tile::multiply(gradients[s], derivative[s]);
      if (cut) band.template select<KeyRows>(gradients[s], 0.f, query, key);
      tile::to_operand<Element>(ds[s], gradients[s]);
      tile::store_operand<kBlockN>(ds_tile, warp_key + tile::kSlabRows * s, warp_query, ds[s]);
      if constexpr (kSplit > 1) tile::store_operand<kBlockN>(p_tile, warp_key + tile::kSlabRows * s, warp_query, p[s]);
    }

    arch::block_barrier();  // the dS of all warps is in shared memory
    if constexpr (kSplit == 1) tile::multiply_registers<Element>(dv, p, tile::RowsFirst<kBlockM>(dout_tile), 0, 0);

    float dq[Share::kSlabs][Share::kColumns / 2];
#pragma unroll
    for (int s = 0; s < Share::kSlabs; ++s) tile::clear(dq[s]);
    tile::multiply_tiles<Element, kBlockN>(dq, tile::ColumnsFirst<kBlockN>(ds_tile), Share::row(),
                                           tile::RowsFirst<kBlockN>(k_tile), Share::column());
    float* accumulator = Share::accumulator(params, batch, head, m_block);
    int* turn = nullptr;
    if constexpr (Config::deterministic) {
      turn = tile::turn_of<Config>(params, batch, head, m_block);
      if (arch::thread_index() == 0) arch::wait_for_turn(turn, n_block);
      arch::block_barrier();
    }
#pragma unroll
    for (int s = 0; s < Share::kSlabs; ++s)
#pragma unroll
      for (int i = 0; i < Share::kColumns / 2; ++i)
        arch::reduce_add(accumulator + Share::offset(s, i), dq[s][i]);
    if constexpr (Config::deterministic) {
      arch::memory_fence();
      arch::block_barrier();
      if (arch::thread_index() == 0) arch::pass_turn(turn, n_block + 1);
    }

    if constexpr (kSplit == 1) {
      tile::multiply_registers<Element>(dk, ds, tile::RowsFirst<kBlockM>(q_tile), 0, 0);
    } else {
      tile::multiply_tiles<Element, kBlockM>(dv, tile::RowsFirst<kBlockN>(p_tile), warp_key, tile::RowsFirst<kBlockM>(dout_tile),
                                             part * kWarpColumnsV);
      tile::multiply_tiles<Element, kBlockM>(dk, tile::RowsFirst<kBlockN>(ds_tile), warp_key, tile::RowsFirst<kBlockM>(q_tile),
                                             part * kWarpColumns);
    }

    if constexpr (Config::num_stages == 1) {
      arch::block_barrier();
      if (work.has(next)) load_stage(0, next);
    }
  }

  arch::block_barrier();  // k and v have been read: their places are free for dk and dv
  // Worked out anew: fewer registers through the loop.
  const tile::TileIndex done = tile::KeyWork<Config, kBlockM, kBlockN>::tile_of(shape, arch::block_index());
  const int present_keys = tile::Sequence(shape, done.batch).seqlen_k;
  const int tile_key = done.block * kBlockN;
#pragma unroll
  for (int s = 0; s < kSlabs; ++s) {
    const int row = warp_key + tile::kSlabRows * s;
    const int key = tile_key + row + tile::lane_row();
    const bool present[2] = {key < present_keys, key + 8 < present_keys};
    const float scale_k[2] = {params.score.scale, params.score.scale};
    const float scale_v[2] = {Config::dropout ? params.dropout.scale : 1.f, Config::dropout ? params.dropout.scale : 1.f};
    tile::stage_slab<Element, kBlockN>(k_tile, row, part * kWarpColumns, dk[s], scale_k, present);
    tile::stage_slab<Element, kBlockN>(v_tile, row, part * kWarpColumnsV, dv[s], scale_v, present);
  }
  arch::block_barrier();
  tile::store_tile<kBlockN, Config::head_dim, Config::store_bytes, kThreads>(
      tile::HeadRows<Element>(params.dk, done.batch, done.head), k_tile, tile_key, shape.seqlen_k, shape.head_dim);
  tile::store_tile<kBlockN, Config::head_dim_v, Config::store_bytes, kThreads>(
      tile::HeadRows<Element>(params.dv, done.batch, done.head), v_tile, tile_key, shape.seqlen_k, shape.head_dim_v);
}
