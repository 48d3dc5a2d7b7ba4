// The gradients of k and v on Hopper (sm_90a) where head_dim is so large that a warpgroup has registers for one of the two only:
// one CTA computes dk and dv of 64 keys of one key/value head. A producer warp copies q and dout by tensor map; one consumer
// warpgroup works out probabilities and dv, the other dk from these probabilities and dP.
//
// Shared memory:  k [64][head_dim]  v [64][head_dim_v]  |  2 x q [block_m][head_dim]  |  2 x dout [block_m][head_dim_v]
//              |  2 x P, float32, 64 * block_m in register order  |  2 x row_lse [block_m]  2 x row_delta [block_m]  |  barriers
// dk and dv are staged where k and v were.
//
// Scores are computed transposed, S^T = K Q^T, so that P^T and dS^T leave the registers as left operands of dV = P^T dO and
// dK = dS^T Q. Both warpgroups spread a tile over their threads in the same way: thread t of the second needs what thread t of the
// first has. What a score was made by stays with the first: it passes on P times the derivative of the softcap, negative where
// dropped.
//
// dK is the last to read a block of q, and comes after everything that is made of the block before: so only its warpgroup releases
// q. What reads dout beside dV, the producer knows to be done when it fills dout: it has filled q before.
#include "arch/sm90.cuh"
#include "tile/absent.cuh"
#include "tile/dropout.cuh"
#include "tile/gradient.cuh"
#include "tile/mask.cuh"
#include "tile/modifier.cuh"
#include "tile/pipeline.cuh"
#include "tile/scheduler.cuh"
#include "tile/warpgroup.cuh"

namespace {

using Element = Config::Element;
using tile::KeyRows;

constexpr int kBlockM = Config::block_m, kBlockN = tile::kWarpgroupRows;
constexpr int kSize = kBlockM / 2;  // elements of a tile of scores that a thread has
constexpr int kThreads = 3 * arch::kWarpgroupSize;
constexpr int kWarps = arch::kWarpgroupSize / kWarpSize;  // of each consumer
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;

constexpr int kStatisticBytes = kBlockM * static_cast<int>(sizeof(float));
constexpr int kQueryBytes = tile::tile_bytes(kBlockM, Config::head_dim);
constexpr int kDoutBytes = tile::tile_bytes(kBlockM, Config::head_dim_v);
constexpr int kKeyBytes = tile::tile_bytes(kBlockN, Config::head_dim), kValueBytes = tile::tile_bytes(kBlockN, Config::head_dim_v);
constexpr int kProbabilityBytes = kBlockN * kBlockM * static_cast<int>(sizeof(float));
using KeysAndValues = tile::Pipeline<1, kKeyBytes + kValueBytes>;
using Queries = tile::Pipeline<2, kQueryBytes, kQueryBytes + kStatisticBytes>;
using Douts = tile::Pipeline<2, kDoutBytes, kDoutBytes + kStatisticBytes>;

struct Shared {
  KeysAndValues kv;
  Queries q;
  Douts dout;
  SharedAddress p, statistics;

  DEVICE Shared() {
    kv.data = arch::shared_base();
    q.data = kv.data + KeysAndValues::kBytes;
    dout.data = q.data + Queries::kBytes;
    p = dout.data + Douts::kBytes;
    statistics = p + 2 * kProbabilityBytes;
    kv.barriers = statistics + 4 * kStatisticBytes;
    q.barriers = kv.barriers + KeysAndValues::kBarriersBytes;
    dout.barriers = q.barriers + Queries::kBarriersBytes;
  }
  DEVICE SharedAddress keys() const { return kv.data; }
  DEVICE SharedAddress values() const { return kv.data + kKeyBytes; }
  DEVICE SharedAddress row_lse(uint32 use) const { return statistics + use % 2 * kStatisticBytes; }
  DEVICE SharedAddress row_delta(uint32 use) const { return statistics + (2 + use % 2) * kStatisticBytes; }
  // A thread's elements 0 .. 3 of the probabilities; the next four are kFourBytes further.
  DEVICE SharedAddress probabilities(uint32 use) const {
    return p + use % 2 * kProbabilityBytes + arch::thread_index() % arch::kWarpgroupSize * 16;
  }
};

constexpr int kFourBytes = 16 * arch::kWarpgroupSize;
constexpr int kValuesReadBarrier = 1, kStoreBarrier = 2;  // + 1 for dk
constexpr int kFullBarrier = 4, kEmptyBarrier = 6;        // of the two buffers of probabilities: + use % 2
constexpr int kClearBarrier = 8;                          // + 1 for dk, + 2 every other time: one may be a step ahead
constexpr int kConsumerThreads = 2 * arch::kWarpgroupSize;

using Work = tile::KeyWork<Config, kBlockM, kBlockN>;
using Meet = tile::AtOwnBarriers<kConsumerThreads>;  // dv and dk clear absent queries at places of their own

// One thread.
DEVICE void produce(const BackwardSm90Params& params, const Shared& shared) {
  const BackwardParams& common = params.common;
  const Work work(common.shape, arch::block_index());
  if (work.is_empty()) return;
  const SharedAddress kv_barrier = shared.kv.begin_fill(0);
  const int key = work.n_block * kBlockN;
  tile::copy_tile<kBlockN, Config::head_dim>(shared.keys(), params.k, kv_barrier, key, work.kv_head, work.batch);
  tile::copy_tile<kBlockN, Config::head_dim_v>(shared.values(), params.v, kv_barrier, key, work.kv_head, work.batch);
  uint32 use = 0;
#pragma unroll 1
  for (tile::QueryCursor here = work.first(); work.has(here); here = work.next(here), ++use) {
    const int row = here.block * kBlockM;
    const int64 statistic = tile::statistic_offset(common.shape, work.batch, here.head, common.padded_seqlen_q, row);
    const SharedAddress q_barrier = shared.q.begin_fill(use);
    tile::copy_tile<kBlockM, Config::head_dim>(shared.q.stage(use), params.q, q_barrier, row, here.head, work.batch);
    arch::copy_bytes_to_shared(shared.row_lse(use), common.row_lse + statistic, kStatisticBytes, q_barrier);
    const SharedAddress dout_barrier = shared.dout.begin_fill(use);
    tile::copy_tile<kBlockM, Config::head_dim_v>(shared.dout.stage(use), params.dout, dout_barrier, row, here.head, work.batch);
    arch::copy_bytes_to_shared(shared.row_delta(use), common.row_delta + statistic, kStatisticBytes, dout_barrier);
  }
}

// Stages the 64 rows of a gradient and stores them.
template <int kColumns>
DEVICE void store_gradient(const TensorMap& map, SharedAddress tile, const float (&gradient)[kColumns / 2], float scale,
                           const Work& work, int barrier) {
  const int warp_in_group = arch::warp_index() % kWarps;
  const float factor[2] = {scale, scale};
  const bool keep[2] = {true, true};
  tile::stage_slab_by_matrix<Element, kBlockN>(tile, warp_in_group * tile::kSlabRows, gradient, factor, keep);
  arch::fence_async_proxy();
  arch::named_barrier_sync(barrier, arch::kWarpgroupSize);
  if (warp_in_group == 0 && arch::lane_index() == 0) {
    tile::copy_rows_out<kBlockN>(map, tile, 0, 0, tile::chunks(kColumns), work.n_block * kBlockN, work.kv_head, work.batch);
    arch::copy_to_global_commit();
    arch::copy_to_global_wait_read();
  }
}

// The first consumer.
DEVICE void compute_dv(const BackwardSm90Params& params, const Shared& shared) {
  const BackwardParams& common = params.common;
  const Shape& shape = common.shape;
  const Work work(shape, arch::block_index());
  const tile::Sequence sequence(shape, work.batch);
  const tile::Band<Config> band(shape, sequence);
  const int first_key = work.n_block * kBlockN, key = first_key + arch::warp_index() % kWarps * tile::kSlabRows;
  const bool leader = arch::lane_index() == 0;

  float dv[Config::head_dim_v / 2];
  uint32 p[kSize / 2];
  tile::clear(dv);
  if (!work.is_empty()) shared.kv.wait_full(0);
  uint32 use = 0;
#pragma unroll 1
  for (tile::QueryCursor here = work.first(); work.has(here); here = work.next(here), ++use) {
    const tile::Modifier<Config> modifier(common.score, work.batch, here.head);
    const tile::Dropout dropout(common.dropout, work.batch, here.head);
    const int query = here.block * kBlockM;
    const float unit = modifier.unit();
    const int clear_barrier = kClearBarrier + use % 2 * 2;
    tile::clear_absent_queries<Config, kBlockM, kConsumerThreads>(shared.q, shared.dout, use, query, sequence.seqlen_q,
                                                                  shape.seqlen_q, Meet{clear_barrier + 1, clear_barrier});

    float scores[kSize];
    tile::RowValues<kSize, !Config::softcap> lse(shared.row_lse(use));  // whose derivative leaves no registers to wait in
    shared.q.wait_full(use);
    lse.load_ahead();  // now: such loads starve beside a product
    tile::start_transposed<Element, Config::head_dim, kBlockN, kBlockM>(scores, shared.keys(), 0, shared.q.stage(use));
    arch::product_wait<1>();
    arch::pin(dv);
    arch::pin(p);
    if (leader && use > 0) shared.dout.release(use - 1);
    arch::product_wait<0>();
    arch::pin(scores);

    float derivative[kSize];  // of the softcap
    modifier.cap(scores);
    if constexpr (Config::softcap) modifier.softcap_derivative(derivative, scores);
    modifier.template shift<KeyRows>(scores, query, key, sequence.offset);
    if (band.template cuts<kBlockM, kBlockN>(query, first_key))
      band.template select<KeyRows>(scores, -arch::infinity(), query, key);
#pragma unroll
    for (int i = 0; i < kSize; ++i) scores[i] = arch::exp2(arch::multiply_add(scores[i], unit, -lse[i]));
    if constexpr (Config::dropout) {
      dropout.template for_each<KeyRows, kSize>(query, key, [&](int i, bool keep) { scores[i] = keep ? scores[i] : -scores[i]; });
#pragma unroll
      for (int i = 0; i < kSize; i += 2) p[i / 2] = arch::pack_relu<Element>(scores[i], scores[i + 1]);
    } else {
      tile::to_operand<Element>(p, scores);
    }
    if constexpr (Config::softcap) tile::multiply(scores, derivative);

    const SharedAddress place = shared.probabilities(use);
    arch::named_barrier_sync(kEmptyBarrier + use % 2, kConsumerThreads);
#pragma unroll
    for (int i = 0; i < kSize; i += 4)
      arch::store_shared(place + i / 4 * kFourBytes, scores[i], scores[i + 1], scores[i + 2], scores[i + 3]);
    arch::named_barrier_arrive(kFullBarrier + use % 2, kConsumerThreads);

    shared.dout.wait_full(use);
    tile::start_registers<Element, Config::head_dim_v, kBlockM>(dv, p, shared.dout.stage(use));  // runs on beside the next scores
  }
  arch::product_wait<0>();
  arch::pin(dv);
  arch::named_barrier_sync(kValuesReadBarrier, kConsumerThreads);
  store_gradient<Config::head_dim_v>(params.dv, shared.values(), dv, Config::dropout ? common.dropout.scale : 1.f, work,
                                     kStoreBarrier);
}

// The second consumer.
DEVICE void compute_dk(const BackwardSm90Params& params, const Shared& shared) {
  const BackwardParams& common = params.common;
  const Shape& shape = common.shape;
  const Work work(shape, arch::block_index());
  const tile::Sequence sequence(shape, work.batch);
  const tile::Band<Config> band(shape, sequence);
  const int first_key = work.n_block * kBlockN, key = first_key + arch::warp_index() % kWarps * tile::kSlabRows;
  const bool leader = arch::lane_index() == 0;

  float dk[Config::head_dim / 2];
  uint32 ds[kSize / 2];
  tile::clear(dk);
  if (!work.is_empty()) {
    for (int buffer = 0; buffer < 2; ++buffer) arch::named_barrier_arrive(kEmptyBarrier + buffer, kConsumerThreads);
    shared.kv.wait_full(0);
  }
  uint32 use = 0;
#pragma unroll 1
  for (tile::QueryCursor here = work.first(); work.has(here); here = work.next(here), ++use) {
    const int query = here.block * kBlockM;
    const int clear_barrier = kClearBarrier + use % 2 * 2;
    tile::clear_absent_queries<Config, kBlockM, kConsumerThreads>(shared.q, shared.dout, use, query, sequence.seqlen_q,
                                                                  shape.seqlen_q, Meet{clear_barrier, clear_barrier + 1});

    float gradients[kSize];
    tile::RowValues<kSize, true> delta(shared.row_delta(use));
    shared.dout.wait_full(use);
    delta.load_ahead();
    tile::start_transposed<Element, Config::head_dim_v, kBlockN, kBlockM>(gradients, shared.values(), 0, shared.dout.stage(use));
    arch::product_wait<1>();
    arch::pin(dk);
    arch::pin(ds);
    if (leader && use > 0) shared.q.release(use - 1);
    arch::product_wait<0>();
    arch::pin(gradients);

    arch::named_barrier_sync(kFullBarrier + use % 2, kConsumerThreads);
    const SharedAddress place = shared.probabilities(use);
#pragma unroll
    for (int i = 0; i < kSize; i += 4) {
      const float4 four = arch::load_shared_float4(place + i / 4 * kFourBytes);
      const float p[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float dp = gradients[i + j];
        if constexpr (Config::dropout) dp = p[j] < 0.f ? 0.f : dp * common.dropout.scale;
        gradients[i + j] = (Config::dropout ? arch::absolute(p[j]) : p[j]) * (dp - delta[i + j]);
      }
    }
    arch::named_barrier_arrive(kEmptyBarrier + use % 2, kConsumerThreads);
    if (band.template cuts<kBlockM, kBlockN>(query, first_key)) band.template select<KeyRows>(gradients, 0.f, query, key);
    tile::to_operand<Element>(ds, gradients);

    shared.q.wait_full(use);
    tile::start_registers<Element, Config::head_dim, kBlockM>(dk, ds, shared.q.stage(use));  // runs on beside the next dP
  }
  arch::product_wait<0>();
  arch::pin(dk);
  arch::named_barrier_arrive(kValuesReadBarrier, kConsumerThreads);
  // The last probabilities were made after the last use of k: its place is free.
  store_gradient<Config::head_dim>(params.dk, shared.keys(), dk, common.score.scale, work, kStoreBarrier + 1);
}

}  // namespace

KERNEL(kThreads, 1) backward_keys_sm90(GRID_CONSTANT BackwardSm90Params params) {
  const Shared shared;
  if (arch::thread_index() == 0) {
    shared.kv.init(2 * kWarps);
    shared.q.init(kWarps);
    shared.dout.init(kWarps);
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
    if (warpgroup == 1)
      compute_dv(params, shared);
    else
      compute_dk(params, shared);
  }
}
