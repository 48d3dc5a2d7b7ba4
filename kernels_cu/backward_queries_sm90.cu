// The gradient of q on Hopper (sm_90a): one CTA computes dq of a block of query rows of one head, going through the keys that they
// see as the forward does. No sum leaves the CTA, so nothing is added in global memory and the result is repeatable; the price is
// that scores and dP are computed a second time for dk and dv.
//
// Shared memory:  q [block_m][head_dim]  dout [block_m][head_dim_v]
//              |  2 x k [block_n][head_dim]  |  value_stages x v [block_n][head_dim_v]  |  barriers
// dq is staged where q was.
//
// A producer warp copies by tensor map; consumer warpgroups of 64 rows each keep their rows of scores, dP and dq in registers.
#include "arch/sm90.cuh"
#include "tile/absent.cuh"
#include "tile/dropout.cuh"
#include "tile/mask.cuh"
#include "tile/modifier.cuh"
#include "tile/pipeline.cuh"
#include "tile/scheduler.cuh"
#include "tile/warpgroup.cuh"

namespace {

using Element = Config::Element;
using tile::QueryRows;

constexpr int kConsumers = Config::num_consumers;
constexpr int kBlockM = kConsumers * tile::kWarpgroupRows, kBlockN = Config::block_n;
constexpr int kThreads = (kConsumers + 1) * arch::kWarpgroupSize;
constexpr int kReaders = kConsumers * arch::kWarpgroupSize / kWarpSize;
constexpr int kProducerRegisters = kConsumers == 2 ? 24 : 32, kConsumerRegisters = kConsumers == 2 ? 240 : 160;

constexpr int kQueryBytes = tile::tile_bytes(kBlockM, Config::head_dim);
constexpr int kDoutBytes = tile::tile_bytes(kBlockM, Config::head_dim_v);
using QueriesAndDouts = tile::Pipeline<1, kQueryBytes + kDoutBytes>;
using Keys = tile::Pipeline<2, tile::tile_bytes(kBlockN, Config::head_dim)>;
using Values = tile::Pipeline<Config::value_stages, tile::tile_bytes(kBlockN, Config::head_dim_v)>;

struct Shared {
  QueriesAndDouts rows;
  Keys k;
  Values v;

  DEVICE Shared() {
    rows.data = arch::shared_base();
    k.data = rows.data + QueriesAndDouts::kBytes;
    v.data = k.data + Keys::kBytes;
    rows.barriers = v.data + Values::kBytes;
    k.barriers = rows.barriers + QueriesAndDouts::kBarriersBytes;
    v.barriers = k.barriers + Keys::kBarriersBytes;
  }
  DEVICE SharedAddress queries() const { return rows.data; }
  DEVICE SharedAddress douts() const { return rows.data + kQueryBytes; }
};

constexpr int kStageBarrier = 1, kStoreBarrier = 4;  // + consumer
constexpr int kClearBarrier = 7;                     // all consumers

// The work of a CTA: all warps go through it in the same order.
struct Work {
  int m_block, head, batch;
  tile::Range blocks;

  DEVICE explicit Work(const Shape& shape) {
    const tile::TileIndex index =
        tile::query_tile_of<Config>(shape, arch::block_index(), kBlockM, shape.num_heads, shape.section_heads * shape.group_size);
    m_block = index.block, head = index.head, batch = index.batch;
    const tile::Band<Config> band(shape, tile::Sequence(shape, batch));
    blocks = band.template key_blocks<kBlockM, kBlockN>(m_block * kBlockM);
  }
};

// One thread.
DEVICE void produce(const BackwardQueriesSm90Params& params, const Shared& shared) {
  const Shape& shape = params.rest.common.shape;
  const Work work(shape);
  if (work.blocks.begin >= work.blocks.end) return;
  const int row = work.m_block * kBlockM, kv_head = work.head / shape.group_size;
  const SharedAddress barrier = shared.rows.begin_fill(0);
  tile::copy_tile<kBlockM, Config::head_dim>(shared.queries(), params.q, barrier, row, work.head, work.batch);
  tile::copy_tile<kBlockM, Config::head_dim_v>(shared.douts(), params.dout, barrier, row, work.head, work.batch);
  uint32 use = 0;
#pragma unroll 1
  for (int n_block = work.blocks.end - 1; n_block >= work.blocks.begin; --n_block, ++use) {
    const SharedAddress k_barrier = shared.k.begin_fill(use);
    tile::copy_tile<kBlockN, Config::head_dim>(shared.k.stage(use), params.k, k_barrier, n_block * kBlockN, kv_head, work.batch);
    const SharedAddress v_barrier = shared.v.begin_fill(use);
    tile::copy_tile<kBlockN, Config::head_dim_v>(shared.v.stage(use), params.v, v_barrier, n_block * kBlockN, kv_head, work.batch);
  }
}

// Zeroes keys that are absent: their dS is 0, which dQ = dS K multiplies with them. Their values meet nothing but masked scores.
DEVICE void clear_absent_keys(const Shared& shared, uint32 use, int key, int used, int allocated) {
  if constexpr (Config::used_keys) {
    const tile::AbsentRows<kBlockN> absent(key, used, allocated);
    if (!absent.exist()) return;
    constexpr int kAll = kConsumers * arch::kWarpgroupSize;
    shared.k.wait_full(use);
    absent.template clear<Config::head_dim, kAll>(shared.k.stage(use));
    tile::publish(tile::AtOneBarrier<kAll>{kClearBarrier});
  }
}

DEVICE void consume(const BackwardQueriesSm90Params& params, const Shared& shared, int consumer) {
  const BackwardParams& common = params.rest.common;
  const Shape& shape = common.shape;
  const Work work(shape);
  const tile::Sequence sequence(shape, work.batch);
  const tile::Band<Config> band(shape, sequence);
  const tile::Modifier<Config> modifier(common.score, work.batch, work.head);
  const tile::Dropout dropout(common.dropout, work.batch, work.head);
  const float unit = modifier.unit();
  const int warp_in_group = arch::warp_index() % 4;
  const int group_row = consumer * tile::kWarpgroupRows;
  const int warp_row = group_row + warp_in_group * tile::kSlabRows;  // this warp's first row in the tile
  const int first_query = work.m_block * kBlockM, query = first_query + warp_row;
  const bool leader = arch::lane_index() == 0;
  constexpr int kSize = kBlockN / 2;

  float lse[2], delta[2];  // of the thread's two rows
  const int64 statistic =
      tile::statistic_offset(shape, work.batch, work.head, common.padded_seqlen_q, query + tile::lane_row());
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    lse[r] = common.row_lse[statistic + 8 * r];
    delta[r] = common.row_delta[statistic + 8 * r];
  }

  float dq[Config::head_dim / 2];
  uint32 ds[kSize / 2];
  tile::clear(dq);
  if (work.blocks.begin < work.blocks.end) shared.rows.wait_full(0);
  uint32 use = 0;
#pragma unroll 1
  for (int n_block = work.blocks.end - 1; n_block >= work.blocks.begin; --n_block, ++use) {
    const int key = n_block * kBlockN;

    float scores[kSize], gradients[kSize];
    clear_absent_keys(shared, use, key, sequence.seqlen_k, shape.seqlen_k);
    shared.k.wait_full(use);
    tile::start_transposed<Element, Config::head_dim, kBlockM, kBlockN>(scores, shared.queries(), group_row, shared.k.stage(use));
    shared.v.wait_full(use);
    tile::start_transposed<Element, Config::head_dim_v, kBlockM, kBlockN>(gradients, shared.douts(), group_row,
                                                                          shared.v.stage(use));
    arch::product_wait<2>();
    arch::pin(dq);
    arch::pin(ds);
    if (leader && use > 0) shared.k.release(use - 1);
    arch::product_wait<1>();
    arch::pin(scores);
    float derivative[kSize];  // of the softcap
    modifier.cap(scores);
    if constexpr (Config::softcap) modifier.softcap_derivative(derivative, scores);
    modifier.template shift<QueryRows>(scores, query, key, sequence.offset);
#pragma unroll
    for (int i = 0; i < kSize; ++i) scores[i] = arch::exp2(arch::multiply_add(scores[i], unit, -lse[i / 2 % 2]));
    if constexpr (Config::softcap) tile::multiply(scores, derivative);
    arch::product_wait_here(shape.num_heads);
    arch::pin(gradients);
    if (leader) shared.v.release(use);

    if constexpr (Config::dropout)
      dropout.template for_each<QueryRows, kSize>(
          query, key, [&](int i, bool keep) { gradients[i] = keep ? gradients[i] * common.dropout.scale : 0.f; });
#pragma unroll
    for (int i = 0; i < kSize; ++i) gradients[i] = scores[i] * (gradients[i] - delta[i / 2 % 2]);
    if (band.template cuts<kBlockM, kBlockN>(first_query, key)) band.template select<QueryRows>(gradients, 0.f, query, key);
    tile::to_operand<Element>(ds, gradients);

    tile::start_registers<Element, Config::head_dim, kBlockN>(dq, ds, shared.k.stage(use));  // runs on beside the next scores
  }
  arch::product_wait<0>();
  arch::pin(dq);

  arch::named_barrier_sync(kStageBarrier + consumer, arch::kWarpgroupSize);  // its rows of q have been read by all its warps
  const float scale[2] = {common.score.scale, common.score.scale};
  const int row = query + tile::lane_row();
  const bool keep[2] = {!Config::used_queries || row < sequence.seqlen_q, !Config::used_queries || row + 8 < sequence.seqlen_q};
  tile::stage_slab_by_matrix<Element, kBlockM>(shared.queries(), warp_row, dq, scale, keep);
  arch::fence_async_proxy();
  arch::named_barrier_sync(kStoreBarrier + consumer, arch::kWarpgroupSize);
  if (warp_in_group == 0 && leader) {
    tile::copy_rows_out<kBlockM>(params.dq, shared.queries(), group_row, 0, tile::chunks(Config::head_dim), first_query + group_row,
                                 work.head, work.batch);
    arch::copy_to_global_commit();
    arch::copy_to_global_wait_read();
  }
}

}  // namespace

KERNEL(kThreads, 1) backward_queries_sm90(GRID_CONSTANT BackwardQueriesSm90Params params) {
  const Shared shared;
  if (arch::thread_index() == 0) {
    shared.rows.init(kReaders);
    shared.k.init(kReaders);
    shared.v.init(kReaders);
    arch::fence_barrier_init();
    arch::prefetch(params.q);
    arch::prefetch(params.k);
    arch::prefetch(params.v);
    arch::prefetch(params.dout);
  }
  arch::block_barrier();
  const int warpgroup = arch::warpgroup_index();
  if (warpgroup == 0) {
    arch::lower_registers<kProducerRegisters>();
    if (arch::thread_index() == 0) produce(params, shared);
  } else {
    arch::raise_registers<kConsumerRegisters>();
    consume(params, shared, warpgroup - 1);
  }
}
