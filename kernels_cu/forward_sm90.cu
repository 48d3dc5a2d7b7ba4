// Forward attention on Hopper (sm_90a): persistent CTAs, a producer warp that copies tiles by tensor map, and consumer warpgroups
// of 64 query rows each that multiply with wgmma.
//
// Shared memory:  query_stages x q [block_m][head_dim]  |  out [block_m][64 * out_chunks], or in q's place if out_chunks is 0
//              |  2 x k [block_n][head_dim]  |  2 x v [block_n][head_dim_v]  |  barriers  |  tile queue
//
// Where a head has few queries, a tile holds those of several heads that share their keys: the rows of one head after the other,
// so that a slab belongs to one head and everything that depends on the head is the same for all of it.
//
// The CTAs of a cluster have neighbouring query blocks, which all see the same keys: every key block comes from L2 once for them.
//
// A consumer keeps scores, probabilities and output in registers. It starts the scores of the next key block before the product
// of the present probabilities with v, so that the tensor cores work while it exponentiates.
#include "arch/sm90.cuh"
#include "tile/absent.cuh"
#include "tile/dropout.cuh"
#include "tile/epilogue.cuh"
#include "tile/mask.cuh"
#include "tile/modifier.cuh"
#include "tile/pipeline.cuh"
#include "tile/scheduler.cuh"
#include "tile/softmax.cuh"
#include "tile/warpgroup.cuh"

namespace {

using Element = Config::Element;
using tile::QueryRows;

constexpr int kConsumers = Config::num_consumers;
constexpr int kBlockM = kConsumers * tile::kWarpgroupRows, kBlockN = Config::block_n;
constexpr int kQueries = kBlockM / Config::packed_heads;  // of each head of a tile
constexpr int kGroupQueries = kQueries < tile::kWarpgroupRows ? kQueries : tile::kWarpgroupRows;  // of a head of a warpgroup
constexpr int kCtas = Config::cluster_size;
static_assert(kCtas == 1 || !(Config::window_left || Config::window_right), "no block waits where only others see keys");
static_assert(kQueries % tile::kSlabRows == 0 && (kQueries % tile::kWarpgroupRows == 0 || tile::kWarpgroupRows % kQueries == 0),
              "slabs belong to one head, and warpgroups to whole heads or to parts of one");
// The head and the query of a row of a tile, counted from the tile's first.
DEVICE int head_of(int row) { return Config::packed_heads == 1 ? 0 : row / kQueries; }
DEVICE int query_of(int row) { return Config::packed_heads == 1 ? row : row % kQueries; }
constexpr int kThreads = (kConsumers + 1) * arch::kWarpgroupSize;
constexpr int kReaders = kConsumers * arch::kWarpgroupSize / kWarpSize;  // every consumer warp releases buffers for itself
// The pool of 65536 registers, in multiples of 8 a thread: few for the producer, the rest for the consumers.
constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32, kConsumerRegisters = kConsumers == 2 ? 232 : 160;

// Whether the output is staged in memory of its own, so that the next tile's q is loaded meanwhile.
constexpr bool kOwnOut = Config::out_chunks > 0;
constexpr int kOutChunks = kOwnOut ? Config::out_chunks : tile::chunks(Config::head_dim_v);  // staged at a time

using Queries = tile::Pipeline<Config::query_stages, tile::tile_bytes(kBlockM, Config::head_dim)>;
constexpr int kKeyBytes = tile::tile_bytes(kBlockN, Config::head_dim), kValueBytes = tile::tile_bytes(kBlockN, Config::head_dim_v);
using Keys = tile::Pipeline<2, kKeyBytes, kKeyBytes, kCtas>;
using Values = tile::Pipeline<2, kValueBytes, kValueBytes, kCtas>;
using TileQueue = tile::TileQueue<kCtas>;

constexpr int kOutBytes = kOutChunks * kBlockM * tile::kChunkRowBytes;
constexpr int kQueryBytes = kOwnOut || Queries::kBytes > kOutBytes ? Queries::kBytes : kOutBytes;

struct True {
  static constexpr bool value = true;
};
struct False {
  static constexpr bool value = false;
};
template <int kKeys>
struct NumKeys {
  static constexpr int value = kKeys;
};

// For every other warpgroup the diagonal ends in the first half of a block. Without turns it pays to be late: warpgroups that
// begin a tile in step stay in step, and leave the tensor cores idle together.
constexpr bool kHalves = Config::window_right && Config::ping_pong && kBlockN == 2 * tile::kWarpgroupRows;

struct Shared {
  Queries q;
  SharedAddress out;
  Keys k;
  Values v;
  TileQueue queue;

  DEVICE Shared() {
    q.data = arch::shared_base();
    out = kOwnOut ? q.data + kQueryBytes : q.data;
    k.data = q.data + kQueryBytes + (kOwnOut ? kOutBytes : 0);
    v.data = k.data + Keys::kBytes;
    q.barriers = v.data + Values::kBytes;
    k.barriers = q.barriers + Queries::kBarriersBytes;
    v.barriers = k.barriers + Keys::kBarriersBytes;
    queue.slots = v.barriers + Values::kBarriersBytes;
  }
};

// Tiles in the order in which CTAs take them, those of a cluster counted as one: longest first where they differ in length. `head` is
// a tile's first.
DEVICE int num_tiles(const Shape& shape) {
  return tile::ceil_divide(shape.seqlen_q, kCtas * kQueries) * (shape.num_heads / Config::packed_heads) * shape.batch;
}
DEVICE tile::TileIndex tile_of(const Shape& shape, int index) {
  const tile::TileIndex at = tile::query_tile_of<Config>(shape, index, kCtas * kQueries, shape.num_heads / Config::packed_heads,
                                                         shape.section_heads / Config::packed_heads);
  const int block = kCtas == 1 ? at.block : at.block * kCtas + arch::cluster_rank<kCtas>();
  return {block, at.head * Config::packed_heads, at.batch};
}
// What is loaded for a tile, and for the others of its cluster.
DEVICE tile::Range loaded_blocks(const tile::Band<Config>& band, int block) {
  constexpr int kClusterQueries = kCtas * kQueries;
  return band.template key_blocks<kClusterQueries, kBlockN>(block / kCtas * kClusterQueries);
}

// One thread: keys one block ahead of values, which are needed later; the next tile's first buffers as soon as they are free.
DEVICE void produce(const ForwardSm90Params& params, const Shared& shared) {
  const int tiles = num_tiles(params.shape);
  uint32 use = 0, query_use = 0;  // keys and values are used in step
  int index = TileQueue::first_tile();
#pragma unroll 1
  for (uint32 round = 0;; ++round) {
    index = shared.queue.share(round, index);
    if (index >= tiles) break;
    const tile::TileIndex at = tile_of(params.shape, index);
    const tile::Band<Config> band(params.shape, tile::Sequence(params.shape, at.batch));
    const tile::Range blocks = loaded_blocks(band, at.block);
    const int kv_head = at.head / params.shape.group_size;

    const auto copy_keys = [&](uint32 use, int n_block) {
      const SharedAddress barrier = shared.k.begin_fill(use);
      tile::copy_tile_to_cluster<kBlockN, Config::head_dim, kCtas>(shared.k.stage(use), params.k, barrier, n_block * kBlockN,
                                                                   kv_head, at.batch, use);
    };
    const auto copy_values = [&](uint32 use, int n_block) {
      const SharedAddress barrier = shared.v.begin_fill(use);
      tile::copy_tile_to_cluster<kBlockN, Config::head_dim_v, kCtas>(shared.v.stage(use), params.v, barrier, n_block * kBlockN,
                                                                     kv_head, at.batch, use);
    };
    int n_block = blocks.end - 1;
    if (n_block >= blocks.begin) copy_keys(use, n_block);
    if (!kOwnOut || n_block >= blocks.begin) {  // a tile without keys, too, stages its output where q goes
      const SharedAddress barrier = shared.q.begin_fill(query_use), q_tile = shared.q.stage(query_use++);
#pragma unroll
      for (int h = 0; h < Config::packed_heads; ++h)
        tile::copy_tile<kBlockM, Config::head_dim>(q_tile + h * kQueries * tile::kChunkRowBytes, params.q, barrier,
                                                   at.block * kQueries, at.head + h, at.batch);
    }
#pragma unroll 1
    for (; n_block > blocks.begin; --n_block, ++use) {
      copy_keys(use + 1, n_block - 1);
      copy_values(use, n_block);
    }
    const int drawn = TileQueue::draw(params.tile_counter);
    if (n_block == blocks.begin) copy_values(use++, n_block);
    index = TileQueue::tile_of(drawn, params.tile_counter, tiles);
  }
}

// The order of the consumers on the tensor cores (FlashAttention-3's ping-pong): each starts its products when it is its turn, and
// passes the turn on before its softmax. Named barriers 1 .. kConsumers.
struct Turns {
  int consumer;

  DEVICE void prime() const {
    if (Config::ping_pong && consumer == kConsumers - 1) arch::named_barrier_arrive(1, 2 * arch::kWarpgroupSize);
  }
  DEVICE void wait() const {
    if (Config::ping_pong) arch::named_barrier_sync(1 + consumer, 2 * arch::kWarpgroupSize);
  }
  DEVICE void pass() const {
    if (Config::ping_pong) arch::named_barrier_arrive(1 + (consumer + 1) % kConsumers, 2 * arch::kWarpgroupSize);
  }
};

// The output is rescaled right before its product where it has no registers to wait in.
constexpr bool kRescalesFirst = Config::head_dim_v > 128;

// Dropout takes as many instructions as the softmax. What registers allow of it is drawn while the tensor cores are at the scores.
constexpr int kEarlyDraws = Config::dropout && !Config::softcap ? Config::early_draws : 0;

constexpr int kClearBarrier = 4;  // all consumers: values of absent keys are zeros
constexpr int kStoreBarrier = 8;  // + consumer: the output of a warpgroup is staged

// Zeroes the values of absent keys in a tile's first block, the only one that can have them beside used ones. All warpgroups share the
// work, also those that let the block pass by, and before any of them takes its turn, for which others would wait forever.
DEVICE void clear_absent_values(const Shared& shared, uint32 use, const tile::Range& loaded, int used, int allocated) {
  if constexpr (Config::used_keys) {
    const tile::AbsentRows<kBlockN> absent((loaded.end - 1) * kBlockN, used, allocated);
    if (loaded.begin == loaded.end || !absent.exist()) return;
    constexpr int kAll = kConsumers * arch::kWarpgroupSize;
    shared.v.wait_full(use);
    absent.template clear<Config::head_dim_v, kAll>(shared.v.stage(use));
    tile::publish(tile::AtOneBarrier<kAll>{kClearBarrier});
  }
}

DEVICE void consume(const ForwardSm90Params& params, const Shared& shared, int consumer) {
  const Shape& shape = params.shape;
  const int tiles = num_tiles(shape);
  const Turns turns{consumer};
  const int warp_in_group = arch::warp_index() % 4;
  const int group_row = consumer * tile::kWarpgroupRows;
  const int warp_row = group_row + warp_in_group * tile::kSlabRows;  // this warp's first row in the tile
  const bool leader = arch::lane_index() == 0;
  uint32 use = 0, query_use = 0;  // keys and values are used in step
  turns.prime();

#pragma unroll 1
  for (uint32 round = 0;; ++round) {
    const int index = shared.queue.pop(round);
    if (index >= tiles) break;
    const tile::TileIndex at = tile_of(shape, index);
    const tile::Sequence sequence(shape, at.batch);
    const tile::Band<Config> band(shape, sequence);
    const int head = at.head + head_of(warp_row);
    const tile::Modifier<Config> modifier(params.score, at.batch, head);
    const tile::Dropout dropout(params.dropout, at.batch, head);
    const float unit = modifier.unit();
    const int first_query = at.block * kQueries + query_of(group_row);
    const int query = first_query + query_of(warp_in_group * tile::kSlabRows);
    const tile::Range loaded = loaded_blocks(band, at.block);
    tile::Range blocks = band.template key_blocks<kGroupQueries, kBlockN>(first_query);
    const tile::Range whole = band.template whole_blocks<kGroupQueries, kBlockN>(first_query);
    if (blocks.begin == blocks.end) blocks = {loaded.begin, loaded.begin};
    // Lets blocks pass by that only other warpgroups need.
    const auto skip = [&](int num_blocks) {
#pragma unroll 1
      for (; num_blocks > 0; --num_blocks, ++use) {
        shared.k.wait_full(use);
        shared.v.wait_full(use);
        turns.wait();
        turns.pass();
        arch::warp_barrier();  // no lane is left behind in a wait whose phase the leader lets pass
        shared.k.release(use, arch::lane_index());
        shared.v.release(use, arch::lane_index());
      }
    };

    float out[Config::head_dim_v / 2];
    uint32 probabilities[kBlockN / 4];
    tile::RowState state;
    float rescale[2] = {1.f, 1.f};
    tile::clear(out);

    // Scores of a block, or of its first keys, to what the softmax takes.
    const auto modify = [&](auto& scores, int n_block, auto cut) {
      modifier.cap(scores);
      modifier.template shift<QueryRows>(scores, query, n_block * kBlockN, sequence.offset);
      if constexpr (decltype(cut)::value) band.template select<QueryRows>(scores, -arch::infinity(), query, n_block * kBlockN);
    };
    const auto drop = [&](auto& scores, int n_block, const auto& draws) {
      if constexpr (Config::dropout)
        dropout.template for_each<sizeof(scores) / sizeof(float)>(
            draws, query, n_block * kBlockN, [&](int i, bool kept) { scores[i] = kept ? scores[i] : 0.f; });
    };
    const auto rescale_out = [&] {
      if (!Config::lazy_rescale || arch::any(rescale[0] < 1.f || rescale[1] < 1.f)) tile::scale_rows(out, rescale);
    };
    // Starts the scores of a block, then the product of the previous block's probabilities; exponentiates while the latter runs.
    const auto step = [&](int n_block, auto cut) {
      float scores[kBlockN / 2];
      shared.k.wait_full(use + 1);
      turns.wait();
      tile::start_transposed<Element, Config::head_dim, kBlockM, kBlockN>(scores, shared.q.stage(query_use), group_row,
                                                                          shared.k.stage(use + 1));
      if constexpr (kRescalesFirst) rescale_out();
      shared.v.wait_full(use);
      tile::start_registers<Element, Config::head_dim_v, kBlockN>(out, probabilities, shared.v.stage(use));
      turns.pass();
      tile::Draws<kEarlyDraws> draws;
      if constexpr (kEarlyDraws > 0) {
        dropout.draw(draws, query, n_block * kBlockN);
        arch::product_wait_here<1>(draws.known_after(shape.num_heads));
      }
      arch::product_wait<1>();
      arch::pin(scores);
      shared.k.release(use + 1, arch::lane_index());
      if (kOwnOut && (leader & (n_block == blocks.begin))) shared.q.release(query_use);

      modify(scores, n_block, cut);
      float reference[2];
      reference[0] = tile::raise_maximum<Config::lazy_rescale>(scores, 0, state, unit, rescale[0]);
      reference[1] = tile::raise_maximum<Config::lazy_rescale>(scores, 1, state, unit, rescale[1]);
      constexpr int kRow = kBlockN / 4;  // scores of one of the thread's two rows
      constexpr int kBefore = kRow * Config::eighths_before_wait / 4;
      tile::exponentiate<0, (kBefore < kRow ? kBefore : kRow)>(scores, 0, state, unit, reference[0]);
      tile::exponentiate<0, (kBefore > kRow ? kBefore - kRow : 0)>(scores, 1, state, unit, reference[1]);
      if constexpr (Config::eighths_before_wait > 0) {
        arch::product_wait_here(shape.num_heads);
        arch::pin(out);
      }
      tile::exponentiate<(kBefore < kRow ? kBefore : kRow), kRow>(scores, 0, state, unit, reference[0]);
      tile::exponentiate<(kBefore > kRow ? kBefore - kRow : 0), kRow>(scores, 1, state, unit, reference[1]);
      arch::product_wait<0>();
      arch::pin(out);
      arch::pin(probabilities);
      shared.v.release(use, arch::lane_index());
      ++use;
      drop(scores, n_block, draws);
      tile::to_operand<Element>(probabilities, scores);
      if constexpr (!kRescalesFirst) rescale_out();
    };

    // Probabilities of a tile's first block; beyond its first kKeys keys there are none.
    const auto first_step = [&](int n_block, auto keys) {
      constexpr int kKeys = decltype(keys)::value;
      float scores[kKeys / 2];
      shared.k.wait_full(use);
      turns.wait();
      tile::start_transposed<Element, Config::head_dim, kBlockM, kBlockN>(scores, shared.q.stage(query_use), group_row,
                                                                          shared.k.stage(use));
      turns.pass();
      arch::product_wait<0>();
      arch::pin(scores);
      shared.k.release(use, arch::lane_index());
      if (kOwnOut && (leader & (n_block == blocks.begin))) shared.q.release(query_use);
      modify(scores, n_block, True{});
      tile::online_softmax(scores, state, unit, rescale);
      drop(scores, n_block, tile::Draws<0>());
      uint32 visible[kKeys / 4];
      tile::to_operand<Element>(visible, scores);
#pragma unroll
      for (int i = 0; i < kBlockN / 4; ++i) probabilities[i] = i < kKeys / 4 ? visible[i] : 0;
      rescale[0] = rescale[1] = 1.f;  // there is no output yet: 0 times it is not wanted either
    };

    clear_absent_values(shared, use, loaded, sequence.seqlen_k, shape.seqlen_k);
    skip(loaded.end - blocks.end);
    if (blocks.begin < blocks.end) {
      shared.q.wait_full(query_use);
      int n_block = blocks.end - 1;
      if (kHalves && band.template key_blocks<kGroupQueries, kBlockN / 2>(first_query).end < 2 * blocks.end)
        first_step(n_block, NumKeys<kHalves ? kBlockN / 2 : kBlockN>{});
      else
        first_step(n_block, NumKeys<kBlockN>{});
      --n_block;
#pragma unroll 1
      for (; n_block >= blocks.begin && n_block >= whole.end; --n_block) step(n_block, True{});
#pragma unroll 1
      for (; n_block >= blocks.begin && n_block >= whole.begin; --n_block) step(n_block, False{});
      if constexpr (Config::window_left) {
#pragma unroll 1
        for (; n_block >= blocks.begin; --n_block) step(n_block, True{});
      }
      if constexpr (kRescalesFirst) rescale_out();
      shared.v.wait_full(use);
      tile::start_registers<Element, Config::head_dim_v, kBlockN>(out, probabilities, shared.v.stage(use));
      arch::product_wait<0>();
      arch::pin(out);
      arch::pin(probabilities);
      shared.v.release(use, arch::lane_index());
      ++use;
    } else if (!kOwnOut || loaded.begin < loaded.end) {
      shared.q.wait_full(query_use);
      if (kOwnOut && leader) shared.q.release(query_use);
    }

    float factor[2];
    bool keep[2];
    // Worked out anew: a register less through the loop.
    const int done_head = Config::packed_heads == 1 ? head : tile_of(shape, index).head + head_of(warp_row);
    tile::finish_rows<Config>(state, unit, params.score, params.dropout, shape, at.batch, done_head, query + tile::lane_row(),
                              sequence.seqlen_q, params.lse, factor, keep);
    const bool storer = warp_in_group == 0 && leader;
#pragma unroll
    for (int c = 0; c < tile::chunks(Config::head_dim_v); c += kOutChunks) {
      if (storer) arch::copy_to_global_wait_read();  // what was staged here before has left
      arch::named_barrier_sync(kStoreBarrier + consumer, arch::kWarpgroupSize);
      tile::stage_slab_by_matrix<Element, kBlockM>(shared.out, warp_row, out, c, kOutChunks, factor, keep);
      arch::fence_async_proxy();
      arch::named_barrier_sync(kStoreBarrier + consumer, arch::kWarpgroupSize);
      if (storer) {
        for (int row = group_row; row < group_row + tile::kWarpgroupRows; row += kGroupQueries)
          tile::copy_rows_out<kBlockM>(params.out, shared.out, row, c, min(c + kOutChunks, tile::chunks(Config::head_dim_v)),
                                       first_query, at.head + head_of(row), at.batch);
        arch::copy_to_global_commit();
      }
    }
    if (!kOwnOut || loaded.begin < loaded.end) {
      if constexpr (!kOwnOut) {
        if (storer) arch::copy_to_global_wait_read();  // q's place is free when the output has left it
        if (leader) shared.q.release(query_use);
      }
      ++query_use;
    }
    skip(blocks.begin - loaded.begin);
  }
  if (arch::thread_index() % arch::kWarpgroupSize == 0) arch::copy_to_global_wait_read();
}

}  // namespace

CLUSTER_KERNEL(kThreads, 1, CLUSTER_SIZE) forward_sm90(GRID_CONSTANT ForwardSm90Params params) {
  const Shared shared;
  if (arch::thread_index() == 0) {
    shared.q.init(kReaders);
    shared.k.init(kReaders);
    shared.v.init(kReaders);
    shared.queue.init(kReaders);
    arch::fence_barrier_init();
    arch::prefetch(params.q);
    arch::prefetch(params.k);
    arch::prefetch(params.v);
    arch::prefetch(params.out);
  }
  if (kCtas == 1) arch::block_barrier();
  else arch::cluster_begin();
  const int warpgroup = arch::warpgroup_index();
  if (warpgroup == 0) {
    arch::lower_registers<kProducerRegisters>();
    if (arch::thread_index() == 0) produce(params, shared);
  } else {
    arch::raise_registers<kConsumerRegisters>();
    consume(params, shared, warpgroup - 1);
  }
  if (kCtas > 1) arch::cluster_end();
}
