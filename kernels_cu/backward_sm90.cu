// Backward attention on Hopper (sm_90a): persistent CTAs. A tile is 128 keys of one key/value head: its dk and dv, and its part of dq
// of every query block that sees them; with Config::split_groups, what one query head of the group gives to these. A producer warp
// copies q and dout by tensor map, two consumer warpgroups of 64 keys each multiply with wgmma, and a store warp adds their parts of dq
// to the float32 accumulator in global memory. One more warp, and at the end the consumers, convert what is complete. Without
// Config::with_dq another kernel computes dq; then the warpgroups have nothing to tell each other.
//
// Shared memory:  k [128][head_dim]  v [128][head_dim_v]
//              |  2 x q [block_m][head_dim]  |  2 x dout [block_m][head_dim_v]
//              |  2 x ds [block_m][128]  |  dq, float32, block_m * head_dim in register order  |  out [128][head_dim or head_dim_v]
//              |  2 x row_lse [block_m]  2 x row_delta [block_m]  |  barriers  |  tile queue
// ds and dq are there with dq only. dv and then dk are staged in memory of their own, so that the next tile's k, v, q and dout are
// loaded meanwhile: the few steps of a short sequence would else wait for all of that at both ends.
//
// Scores are computed transposed, S^T = K Q^T, so that P^T and dS^T leave the registers as left operands of dV = P^T dO and
// dK = dS^T Q. Only dQ = dS K needs the dS of both warpgroups, through shared memory: each computes half of dQ, the columns of
// one 64-column chunk (block_m 64) or 64 rows (block_m 128).
#include "arch/sm90.cuh"
#include "tile/absent.cuh"
#include "tile/dq_end.cuh"
#include "tile/dq_start.cuh"
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

constexpr int kConsumers = 2;
constexpr int kBlockM = Config::block_m, kBlockN = kConsumers * tile::kWarpgroupRows;
constexpr int kThreads = (kConsumers + 1) * arch::kWarpgroupSize;
constexpr int kReaders = kConsumers * arch::kWarpgroupSize / kWarpSize;
constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
static_assert(kBlockM == 64 ? Config::head_dim == 128 : kBlockM == 128 && Config::head_dim == 64, "halves of dq are 64 wide");

constexpr int kStatisticBytes = kBlockM * static_cast<int>(sizeof(float));
constexpr int kQueryBytes = tile::tile_bytes(kBlockM, Config::head_dim), kDoutBytes = tile::tile_bytes(kBlockM, Config::head_dim_v);
constexpr int kKeyBytes = tile::tile_bytes(kBlockN, Config::head_dim), kValueBytes = tile::tile_bytes(kBlockN, Config::head_dim_v);
using Keys = tile::Pipeline<1, kKeyBytes>;
using Values = tile::Pipeline<1, kValueBytes>;
using Queries = tile::Pipeline<2, kQueryBytes, kQueryBytes + kStatisticBytes>;
using Douts = tile::Pipeline<2, kDoutBytes, kDoutBytes + kStatisticBytes>;
using TileQueue = tile::TileQueue<>;
constexpr int kDsBytes = Config::with_dq ? tile::tile_bytes(kBlockM, kBlockN) : 0;
constexpr int kDqHalf = kBlockM * Config::head_dim / kConsumers;  // floats of dq of a consumer
constexpr int kDqBytes = Config::with_dq ? kConsumers * kDqHalf * static_cast<int>(sizeof(float)) : 0;
constexpr int kDqRegisters = kDqHalf / arch::kWarpgroupSize;
constexpr int kOutBytes = kKeyBytes > kValueBytes ? kKeyBytes : kValueBytes;

struct Shared {
  Keys k;
  Values v;
  Queries q;
  Douts dout;
  SharedAddress ds, dq, out, statistics;
  TileQueue queue;
  SharedAddress copied;  // barrier: all queries of a tile are on their way

  DEVICE Shared() {
    k.data = arch::shared_base();
    v.data = k.data + kKeyBytes;
    q.data = v.data + kValueBytes;
    dout.data = q.data + Queries::kBytes;
    ds = dout.data + Douts::kBytes;
    dq = ds + 2 * kDsBytes;
    out = dq + kDqBytes;
    statistics = out + kOutBytes;
    k.barriers = statistics + 4 * kStatisticBytes;
    v.barriers = k.barriers + Keys::kBarriersBytes;
    q.barriers = v.barriers + Values::kBarriersBytes;
    dout.barriers = q.barriers + Queries::kBarriersBytes;
    queue.slots = dout.barriers + Douts::kBarriersBytes;
    copied = queue.slots + TileQueue::kBytes;
  }
  DEVICE SharedAddress row_lse(uint32 use) const { return statistics + use % 2 * kStatisticBytes; }
  DEVICE SharedAddress row_delta(uint32 use) const { return statistics + (2 + use % 2) * kStatisticBytes; }
  DEVICE SharedAddress ds_stage(uint32 use) const { return ds + use % 2 * kDsBytes; }
  DEVICE SharedAddress dq_half(int consumer) const { return dq + consumer * kDqBytes / kConsumers; }
};

// Named barriers. Those of dq are between a consumer and the store warp.
constexpr int kDsBarrier = 1, kDqEmptyBarrier = 2, kDqFullBarrier = 4, kStoreBarrier = 6, kClearBarrier = 8;
constexpr int kConsumerThreads = kConsumers * arch::kWarpgroupSize, kDqThreads = arch::kWarpgroupSize + kWarpSize;

using Work = tile::KeyWork<Config, kBlockM, kBlockN, Config::split_groups>;
using DqEnd = tile::DqEnd<Config, Work>;

// One thread: says which tile is next, and copies its k and v when those of the tile before have been read.
DEVICE void produce_keys(const BackwardSm90Params& params, const Shared& shared) {
  const BackwardParams& common = params.common;
  int index = TileQueue::draw_in_order(common.tile_counter, common.num_tiles);
#pragma unroll 1
  for (uint32 round = 0;; ++round) {
    shared.queue.push(round, index);
    if (index >= common.num_tiles) break;
    const tile::TileIndex at = Work::tile_of(common.shape, index);
    const int kv_head = Work::kv_head_of(common.shape, at);
    const SharedAddress k_barrier = shared.k.begin_fill(round);
    tile::copy_tile<kBlockN, Config::head_dim>(shared.k.data, params.k, k_barrier, at.block * kBlockN, kv_head, at.batch);
    const SharedAddress v_barrier = shared.v.begin_fill(round);
    tile::copy_tile<kBlockN, Config::head_dim_v>(shared.v.data, params.v, v_barrier, at.block * kBlockN, kv_head, at.batch);
    // Two steps before the tile's end at most: drawn at its beginning, the longest tiles would fall to the CTAs with the longest.
    arch::barrier_wait(shared.copied, round & 1);
    index = TileQueue::draw_in_order(common.tile_counter, common.num_tiles);
  }
}

// One warp, of which one lane copies: a tile's first q and dout come while the tile before has yet to end.
DEVICE void produce_queries(const BackwardSm90Params& params, const Shared& shared) {
  const BackwardParams& common = params.common;
  uint32 use = 0;
#pragma unroll 1
  for (uint32 round = 0;; ++round) {
    const int index = shared.queue.pop(round);
    if (index >= common.num_tiles) break;
    if (arch::lane_index() == 0) {
      const Work work(common.shape, index);
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
      arch::barrier_arrive(shared.copied);
    }
    arch::warp_barrier();  // the other lanes wait here, and not in the next pop, where they would poll against the first
  }
}

// One warp: adds the halves of dq as they come.
DEVICE void store_dq(const BackwardParams& params, const Shared& shared) {
  const bool leader = arch::lane_index() == 0;
#pragma unroll 1
  for (uint32 round = 0;; ++round) {
    const int index = shared.queue.pop(round);
    if (index >= params.num_tiles) break;
    const Work work(params.shape, index);
    const tile::Band<Config> band(params.shape, tile::Sequence(params.shape, work.batch));
#pragma unroll 1
    for (tile::QueryCursor here = work.first(); work.has(here); here = work.next(here)) {
      float* accumulator = params.dq_accum + tile::statistic_offset(params.shape, work.batch, here.head, params.padded_seqlen_q,
                                                                    here.block * kBlockM) * Config::head_dim;
      const tile::DqStart<Config, Work> start(params, work, band, here);
      if (leader) start.wait();
#pragma unroll
      for (int consumer = 0; consumer < kConsumers; ++consumer) {
        arch::named_barrier_sync(kDqFullBarrier + consumer, kDqThreads);
        if (leader) {
          float* half = accumulator + consumer * kDqHalf;
          if (start.is_mine)
            arch::copy_floats_to_global(half, shared.dq_half(consumer), kDqHalf * 4);
          else
            arch::add_floats_to_global(half, shared.dq_half(consumer), kDqHalf * 4);
          arch::copy_to_global_commit();
        }
      }
      if (leader) arch::copy_to_global_wait_read<1>();
      arch::warp_barrier();
      arch::named_barrier_arrive(kDqEmptyBarrier, kDqThreads);
      if (leader) arch::copy_to_global_wait_read<0>();
      arch::warp_barrier();
      arch::named_barrier_arrive(kDqEmptyBarrier + 1, kDqThreads);
      if (leader) start.announce();
    }
    if (leader) DqEnd::tile_is_done(params, work);
    arch::warp_barrier();  // the other lanes wait here, and not in the next pop, where they would poll against the leader
  }
}

constexpr int kSize = kBlockM / 2;  // scores of a thread
// Under a mask that cuts to the right, 64 queries before the keys of the second warpgroup see none of them: it has no products of its
// own there, only its half of dq, and none in the steps that follow. At the other end of a window so does the first warpgroup.
constexpr bool kBlind = Config::window_right && kBlockM == tile::kWarpgroupRows;
// What softcap, dropout and ALiBi compute, and lengths to compare with, leave fewer registers: per-query values are then loaded late,
// and scores become operands of the next products in parts, between which the branch of the mask keeps the compiler from mixing them.
constexpr bool kAhead = !((Config::dropout || Config::softcap || Config::alibi) && kBlockM == 128) &&
                        !(Config::dropout && (Config::softcap || Config::alibi)) &&
                        !(Config::softcap && (kBlind || Config::used_queries || Config::used_keys)) &&
                        !(Config::alibi && (!Config::with_dq || Config::split_groups));
// How many is what the compiler has registers for.
constexpr int kPartsOfCapped = Config::dropout ? (Config::alibi ? kSize / 16 : 8) : kBlockM == 64 ? 8 : 4;
constexpr int kParts = Config::softcap && !kAhead ? kPartsOfCapped : Config::dropout && !kAhead ? 2 : 1;
// Draws for the next block stand behind the hand-over of dq, where the store warp waits for it, and not among the products of dk. A
// block of 128 queries has twice the draws for the same products: there they may stand anywhere.
constexpr bool kDrawsLast = Config::dropout && kBlockM == 64;
constexpr int kPart = kSize / kParts, kPartQueries = kBlockM / kParts;

// Zeroes keys that are absent: their dS is 0, which dQ = dS K multiplies with them. Their values meet nothing but masked scores.
DEVICE void clear_absent_keys(const Shared& shared, const Work& work, int used, int allocated) {
  if constexpr (Config::used_keys && Config::with_dq) {
    const tile::AbsentRows<kBlockN> absent(work.n_block * kBlockN, used, allocated);
    if (!absent.exist() || work.is_empty()) return;
    absent.template clear<Config::head_dim, kConsumerThreads>(shared.k.data);
    tile::publish(tile::AtOneBarrier<kConsumerThreads>{kClearBarrier});
  }
}

// Stages and stores a warpgroup's 64 rows of a gradient, when what was staged before has left.
template <int kColumns>
DEVICE void store_gradient(const TensorMap& map, const Shared& shared, const float (&gradient)[kColumns / 2], float scale,
                           const tile::TileIndex& at, int consumer) {
  const int group_row = consumer * tile::kWarpgroupRows, warp_in_group = arch::warp_index() % 4;
  const bool storer = warp_in_group == 0 && arch::lane_index() == 0;
  const float factor[2] = {scale, scale};
  const bool keep[2] = {true, true};
  if (storer) arch::copy_to_global_wait_read();
  arch::named_barrier_sync(kStoreBarrier + consumer, arch::kWarpgroupSize);
  tile::stage_slab_by_matrix<Element, kBlockN>(shared.out, group_row + warp_in_group * tile::kSlabRows, gradient, factor, keep);
  arch::fence_async_proxy();
  arch::named_barrier_sync(kStoreBarrier + consumer, arch::kWarpgroupSize);
  if (storer) {
    tile::copy_rows_out<kBlockN>(map, shared.out, group_row, 0, tile::chunks(kColumns), at.block * kBlockN + group_row, at.head,
                                 at.batch);
    arch::copy_to_global_commit();
  }
}

// Adds a warpgroup's 64 rows of a gradient to the sums of its group, from the given column on.
template <int kSize>
DEVICE void add_gradient(const BackwardParams& params, const float (&gradient)[kSize], const tile::TileIndex& at, int first_row,
                         int column) {
  using Sums = tile::GroupSums<Config>;
  float* sums = Sums::row(params, at.batch, Work::kv_head_of(params.shape, at), at.block * kBlockN + first_row + tile::lane_row()) +
                column + tile::lane_column();
#pragma unroll
  for (int i = 0; i < kSize; i += 2)
    arch::reduce_add(sums + tile::slab_row(i) * Sums::kColumns + tile::slab_column(i), gradient[i], gradient[i + 1]);
}

// One tile; returns the next use of the buffers of queries.
DEVICE uint32 consume_tile(const BackwardSm90Params& params, const Shared& shared, int consumer, int index, uint32 round,
                           uint32 use) {
  const BackwardParams& common = params.common;
  const Shape& shape = common.shape;
  const Work work(shape, index);
  const tile::Sequence sequence(shape, work.batch);
  const tile::Band<Config> band(shape, sequence);
  const int warp_in_group = arch::warp_index() % 4;
  const int group_key = consumer * tile::kWarpgroupRows, warp_key = group_key + warp_in_group * tile::kSlabRows;
  const int first_key = work.n_block * kBlockN;

  float dk[Config::head_dim / 2], dv[Config::head_dim_v / 2];
  tile::clear(dk);
  tile::clear(dv);
  tile::Dropped<kSize> dropped;
  const auto decide_dropped = [&](const tile::QueryCursor& there) {
    if constexpr (Config::dropout) {
      const tile::Dropout dropout(common.dropout, work.batch, there.head);
      dropout.template decide<KeyRows>(dropped, there.block * kBlockM, first_key + warp_key);
      arch::pin(dropped.word);  // else the compiler holds each decision by itself
    }
  };
  decide_dropped(work.first());
  shared.k.wait_full(round);
  shared.v.wait_full(round);
  clear_absent_keys(shared, work, sequence.seqlen_k, shape.seqlen_k);
#pragma unroll 1
  for (tile::QueryCursor here = work.first(); work.has(here); here = work.next(here), ++use) {
    const tile::Modifier<Config> modifier(common.score, work.batch, here.head);
    const int query = here.block * kBlockM, key = first_key + warp_key;
    const bool cut = band.template cuts<kBlockM, kBlockN>(query, first_key);
    const float unit = modifier.unit();

    const auto start_dq = [&](float(&dq)[kDqRegisters]) {
      arch::fence_async_proxy();
      arch::named_barrier_sync(kDsBarrier, kConsumerThreads);  // the dS of both warpgroups is in shared memory
      if constexpr (kBlockM == 64)
        tile::start_tiles<Element, 64, kBlockN, kBlockM, kBlockN>(dq, shared.ds_stage(use), 0, shared.k.data, consumer);
      else
        tile::start_tiles<Element, 64, kBlockN, kBlockM, kBlockN>(dq, shared.ds_stage(use), group_key, shared.k.data, 0);
    };
    const auto hand_over_dq = [&](const float(&dq)[kDqRegisters]) {
      arch::named_barrier_sync(kDqEmptyBarrier + consumer, kDqThreads);
      const SharedAddress half = shared.dq_half(consumer) + arch::thread_index() % arch::kWarpgroupSize * 16;
#pragma unroll
      for (int i = 0; i < kDqRegisters; i += 4)
        arch::store_shared(half + i * 4 * arch::kWarpgroupSize, dq[i], dq[i + 1], dq[i + 2], dq[i + 3]);
      arch::fence_async_proxy();
      arch::named_barrier_arrive(kDqFullBarrier + consumer, kDqThreads);
    };

    const int used = tile::Sequence(shape, work.batch).seqlen_q;  // worked out anew: a register less through the loop
    tile::clear_absent_queries<Config, kBlockM, kConsumerThreads>(shared.q, shared.dout, use, query, used, shape.seqlen_q,
                                                                  tile::AtOneBarrier<kConsumerThreads>{kClearBarrier});
    if constexpr (kBlind) {
      bool is_blind = query + kBlockM - 1 + sequence.offset + shape.window_right < first_key + group_key;
      if constexpr (Config::window_left)
        is_blind |= first_key + group_key + tile::kWarpgroupRows <= query + sequence.offset - shape.window_left;
      if (is_blind) {
        shared.q.wait_full(use);
        shared.dout.wait_full(use);
        arch::warp_barrier();  // no lane is left behind in a wait whose phase the leader lets pass
        shared.dout.release(use, arch::lane_index());
        if constexpr (Config::with_dq) {
          const uint32 no_ds[kSize / 2] = {};
          tile::store_operand_transposed<kBlockM>(shared.ds_stage(use), warp_key, no_ds);
          float dq[kDqRegisters];
          start_dq(dq);
          arch::product_wait<0>();
          arch::pin(dq);
          hand_over_dq(dq);
        }
        shared.q.release(use, arch::lane_index());
        if constexpr (Config::window_left) decide_dropped(work.next(here));
        continue;
      }
    }

    float scores[kSize], gradients[kSize];
    tile::RowValues<kSize, kAhead> row_lse(shared.row_lse(use)), row_delta(shared.row_delta(use));

    shared.q.wait_full(use);
    row_lse.load_ahead();  // now: such loads starve beside a product of 64 columns
    tile::start_transposed<Element, Config::head_dim, kBlockN, kBlockM>(scores, shared.k.data, group_key, shared.q.stage(use));
    shared.dout.wait_full(use);
    tile::start_transposed<Element, Config::head_dim_v, kBlockN, kBlockM>(gradients, shared.v.data, group_key,
                                                                          shared.dout.stage(use));

    uint32 p[kSize / 2], ds[kSize / 2];
    const auto to_probabilities = [&](int part) {
      float(&part_scores)[kPart] = tile::part_of<kPart>(scores, part);
      const int part_query = query + part * kPartQueries;
      modifier.template shift<KeyRows>(part_scores, part_query, key, sequence.offset);
      if (cut) band.template select<KeyRows>(part_scores, -arch::infinity(), part_query, key);
#pragma unroll
      for (int i = part * kPart; i < (part + 1) * kPart; ++i) {
        scores[i] = arch::exp2(arch::multiply_add(scores[i], unit, -row_lse[i]));
        if constexpr (Config::dropout) scores[i] = dropped.mark(i, scores[i]);
      }
    };
    // Derivative by what the softmax sees, divided by the probability.
    const auto centred = [&](int i) {
      const float delta = row_delta[i];
      if constexpr (!Config::dropout) return gradients[i] - delta;
      const bool is_dropped = Config::softcap ? dropped[i] : scores[i] < 0.f;
      return arch::multiply_add(is_dropped ? 0.f : gradients[i], common.dropout.scale, -delta);
    };
    // P as dv sees it has holes, dS needs P without them.
    const auto to_operands = [&](int part) {
#pragma unroll
      for (int i = part * kPart; i < (part + 1) * kPart; ++i) {
        const float factor = Config::softcap ? gradients[i] : centred(i);
        gradients[i] = (Config::dropout ? arch::absolute(scores[i]) : scores[i]) * factor;
        if (i % 2)
          p[i / 2] = Config::dropout ? arch::pack_relu<Element>(scores[i - 1], scores[i])
                                     : arch::pack<Element>(scores[i - 1], scores[i]);
      }
      float(&part_gradients)[kPart] = tile::part_of<kPart>(gradients, part);
      if (cut) band.template select<KeyRows>(part_gradients, 0.f, query + part * kPartQueries, key);
      tile::to_operand<Element>(tile::part_of<kPart / 2>(ds, part), part_gradients);
    };
    arch::product_wait<1>();
    arch::pin(scores);
    if constexpr (Config::softcap) {
      // Probabilities wait for dP: the derivative of the cap goes there, as it has no registers to wait in.
      modifier.cap(scores);
      row_delta.load_ahead();
      arch::product_wait_here(shape.num_heads);
      arch::pin(gradients);
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
#pragma unroll
        for (int i = part * kPart; i < (part + 1) * kPart; ++i) gradients[i] = centred(i) * modifier.derivative(scores[i]);
        to_probabilities(part);
        to_operands(part);
      }
    } else {
#pragma unroll
      for (int part = 0; part < kParts; ++part) to_probabilities(part);
      row_delta.load_ahead();
      arch::product_wait_here(shape.num_heads);
      arch::pin(gradients);
#pragma unroll
      for (int part = 0; part < kParts; ++part) to_operands(part);
    }

    const auto start_dk = [&] {
      tile::start_registers<Element, Config::head_dim, kBlockM>(dk, ds, shared.q.stage(use));
    };
    const auto end_dv = [&] {
      arch::product_wait<1>();
      arch::pin(dv);
      arch::pin(p);
      shared.dout.release(use, arch::lane_index());
    };
    if constexpr (Config::with_dq) tile::store_operand_transposed<kBlockM>(shared.ds_stage(use), warp_key, ds);
    tile::start_registers<Element, Config::head_dim_v, kBlockM>(dv, p, shared.dout.stage(use));
    if constexpr (Config::with_dq) {
      float dq[kDqRegisters];
      start_dq(dq);
      end_dv();
      start_dk();
      if constexpr (kDrawsLast) arch::product_wait_here<1>(shape.num_heads);
      else arch::product_wait<1>();
      arch::pin(dq);
      hand_over_dq(dq);
    } else {
      start_dk();
      arch::warp_barrier();  // all lanes have read the statistics of the buffers that the leader releases
      end_dv();
    }

    decide_dropped(work.next(here));  // beside the product of dk
    arch::product_wait<0>();
    arch::pin(dk);
    arch::pin(ds);
    shared.q.release(use, arch::lane_index());
  }

  arch::named_barrier_sync(kDsBarrier, kConsumerThreads);  // k and v have been read
  if (arch::thread_index() == arch::kWarpgroupSize) {
    shared.k.release(round);
    shared.v.release(round);
  }
  const tile::TileIndex done = Work::tile_of(shape, index);  // worked out anew: registers less through the loop
  if constexpr (Config::split_groups) {
    add_gradient(common, dv, done, warp_key, Config::head_dim);
    add_gradient(common, dk, done, warp_key, 0);
  } else {
    store_gradient<Config::head_dim_v>(params.dv, shared, dv, Config::dropout ? common.dropout.scale : 1.f, done, consumer);
    store_gradient<Config::head_dim>(params.dk, shared, dk, common.score.scale, done, consumer);
  }
  return use;
}

DEVICE void consume(const BackwardSm90Params& params, const Shared& shared, int consumer) {
  if (Config::with_dq && arch::warp_index() % 4 == 0)
    arch::named_barrier_arrive(kDqEmptyBarrier + consumer, kDqThreads);  // in the store warp's stead
  uint32 use = 0;
#pragma unroll 1
  for (uint32 round = 0;; ++round) {
    const int index = shared.queue.pop(round);
    if (index >= params.common.num_tiles) break;
    use = consume_tile(params, shared, consumer, index, round, use);
  }
  if constexpr (Config::with_dq) DqEnd::convert<4>(params.common);
  if (arch::thread_index() % arch::kWarpgroupSize == 0) arch::copy_to_global_wait_read();
}

}  // namespace

KERNEL(kThreads, 1) backward_sm90(GRID_CONSTANT BackwardSm90Params params) {
  const Shared shared;
  if (arch::thread_index() == 0) {
    shared.k.init(1);
    shared.v.init(1);
    shared.q.init(kReaders);
    shared.dout.init(kReaders);
    shared.queue.init(kReaders + (Config::with_dq ? 2 : 1));  // consumers, the warp that copies queries, the one that adds dq
    arch::barrier_init(shared.copied, 1);
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
    const int warp = arch::warp_index();
    if (warp == 0) produce_queries(params, shared);
    if (warp == 2 && arch::lane_index() == 0) produce_keys(params, shared);
    if constexpr (Config::with_dq) {
      if (warp == 1) store_dq(params.common, shared);
      if (warp == 3) DqEnd::convert<2>(params.common);
    }
  } else {
    arch::raise_registers<kConsumerRegisters>();
    consume(params, shared, warpgroup - 1);
  }
}
