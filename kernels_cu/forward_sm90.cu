// Forward attention on Hopper (sm_90a): persistent CTAs, a producer warp that copies tiles by tensor map, and consumer warpgroups
// of 64 query rows each that multiply with wgmma.
//
// Shared memory:  query_stages x q [block_m][head_dim]  |  out [block_m][64 * out_chunks], or in q's place if out_chunks is 0
//              |  2 x k [block_n][head_dim]  |  2 x v [block_n][head_dim_v]  |  barriers  |  tile queue
//
// A consumer keeps scores, probabilities and output in registers. It starts the scores of the next key block before the product
// of the present probabilities with v, so that the tensor cores work while it exponentiates. From tile to tile it does the same:
// the first scores of the next tile are started before the last product of this one, unless the output goes where q is.
#include "arch/sm90.cuh"
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
constexpr int kThreads = (kConsumers + 1) * arch::kWarpgroupSize;
constexpr int kReaders = kConsumers * arch::kWarpgroupSize / kWarpSize;  // every consumer warp releases buffers for itself
// The pool of 65536 registers, in multiples of 8 a thread: few for the producer, the rest for the consumers.
constexpr int kProducerRegisters = kConsumers == 2 ? 40 : 32, kConsumerRegisters = kConsumers == 2 ? 232 : 160;

// Whether the output is staged in memory of its own, so that the next tile begins before this one ends.
constexpr bool kOwnOut = Config::out_chunks > 0;
constexpr int kOutChunks = kOwnOut ? Config::out_chunks : tile::chunks(Config::head_dim_v);  // staged at a time

using Queries = tile::Pipeline<Config::query_stages, tile::tile_bytes(kBlockM, Config::head_dim)>;
using Keys = tile::Pipeline<2, tile::tile_bytes(kBlockN, Config::head_dim)>;
using Values = tile::Pipeline<2, tile::tile_bytes(kBlockN, Config::head_dim_v)>;

constexpr int kOutBytes = kOutChunks * kBlockM * tile::kChunkRowBytes;
constexpr int kQueryBytes = kOwnOut || Queries::kBytes > kOutBytes ? Queries::kBytes : kOutBytes;

struct True {
  static constexpr bool value = true;
};
struct False {
  static constexpr bool value = false;
};

struct Shared {
  Queries q;
  SharedAddress out;
  Keys k;
  Values v;
  tile::TileQueue queue;

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

// Tiles in the order in which CTAs take them: longest first where they differ in length.
DEVICE int num_tiles(const Shape& shape) {
  return tile::ceil_divide(shape.seqlen_q, kBlockM) * shape.num_heads * shape.batch;
}
DEVICE tile::TileIndex tile_of(const Shape& shape, int index) {
  const int num_blocks = tile::ceil_divide(shape.seqlen_q, kBlockM);
  if constexpr (Config::window_right) {
    const auto at = tile::longest_first(index, num_blocks, shape.num_heads, shape.batch, shape.section_heads);
    return {num_blocks - 1 - at.block, at.head, at.batch};
  } else {
    return tile::head_after_head(index, num_blocks, shape.num_heads);
  }
}

// One thread: keys one block ahead of values, which are needed later; the next tile's first buffers as soon as they are free.
DEVICE void produce(const ForwardSm90Params& params, const Shared& shared) {
  const int tiles = num_tiles(params.shape);
  uint32 use = 0, query_use = 0;  // keys and values are used in step
  int index = arch::block_index();
#pragma unroll 1
  for (uint32 round = 0;; ++round) {
    shared.queue.push(round, index);
    if (index >= tiles) break;
    const tile::TileIndex at = tile_of(params.shape, index);
    const tile::Band<Config> band(params.shape, tile::Sequence(params.shape, at.batch));
    const tile::Range blocks = band.template key_blocks<kBlockM, kBlockN>(at.block * kBlockM);
    const int kv_head = at.head / params.shape.group_size;

    const auto copy_keys = [&](uint32 use, int n_block) {
      const SharedAddress barrier = shared.k.begin_fill(use);
      tile::copy_tile<kBlockN, Config::head_dim>(shared.k.stage(use), params.k, barrier, n_block * kBlockN, kv_head, at.batch);
    };
    const auto copy_values = [&](uint32 use, int n_block) {
      const SharedAddress barrier = shared.v.begin_fill(use);
      tile::copy_tile<kBlockN, Config::head_dim_v>(shared.v.stage(use), params.v, barrier, n_block * kBlockN, kv_head, at.batch);
    };
    int n_block = blocks.end - 1;
    if (n_block >= blocks.begin) copy_keys(use, n_block);
    if (!kOwnOut || n_block >= blocks.begin) {  // a tile without keys, too, stages its output where q goes
      const SharedAddress barrier = shared.q.begin_fill(query_use);
      tile::copy_tile<kBlockM, Config::head_dim>(shared.q.stage(query_use++), params.q, barrier, at.block * kBlockM, at.head,
                                                 at.batch);
    }
#pragma unroll 1
    for (; n_block > blocks.begin; --n_block, ++use) {
      copy_keys(use + 1, n_block - 1);
      copy_values(use, n_block);
    }
    index = tile::TileQueue::draw(params.tile_counter, tiles);
    if (n_block == blocks.begin) copy_values(use++, n_block);
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

constexpr int kStoreBarrier = 8;  // + consumer: the output of a warpgroup is staged

// What a consumer has to do for a tile. Its 64 queries may see fewer key blocks than the tile's.
struct Work {
  tile::TileIndex at;
  int query;           // the warpgroup's first
  tile::Range loaded;  // key blocks of the tile
  tile::Range blocks;  // those of which the warpgroup's queries see some key
  tile::Range whole;   // those that all of its queries see whole

  DEVICE Work(const Shape& shape, int index, int group_row) : at(tile_of(shape, index)), query(at.block * kBlockM + group_row) {
    const tile::Band<Config> band(shape, tile::Sequence(shape, at.batch));
    loaded = band.template key_blocks<kBlockM, kBlockN>(at.block * kBlockM);
    blocks = band.template key_blocks<tile::kWarpgroupRows, kBlockN>(query);
    whole = band.template whole_blocks<tile::kWarpgroupRows, kBlockN>(query);
    if (!visible()) blocks = {loaded.begin, loaded.begin};
  }
  DEVICE bool visible() const { return blocks.begin < blocks.end; }
  // Loaded blocks that are none of the warpgroup's business. Blocks pass from the last to the first.
  DEVICE int before() const { return loaded.end - blocks.end; }
  DEVICE int after() const { return blocks.begin - loaded.begin; }
  // Whether its first scores may be started while the last tile's last product is still to come. That product holds one of the
  // two buffers of values, so that no more than one other block can pass by until then.
  DEVICE bool overlaps() const { return kOwnOut && visible() && before() <= 1; }
};

// A warpgroup of 64 query rows.
struct Consumer {
  static constexpr int kScores = kBlockN / 2;
  using Scores = float[kScores];

  const ForwardSm90Params& params;
  const Shared& shared;
  const Turns turns;
  const int consumer;
  const int group_row;  // the warpgroup's first row in the tile
  const int warp_row;   // the warp's first row in the warpgroup
  const bool leader;    // of the warp
  const bool storer;    // of the warpgroup

  float out[Config::head_dim_v / 2];
  uint32 probabilities[kBlockN / 4];
  tile::RowState state;
  float rescale[2];
  uint32 key_use = 0, query_use = 0;
  uint32 value_use = 0;  // the probabilities' block, whose keys had the same use

  DEVICE Consumer(const ForwardSm90Params& params, const Shared& shared, int consumer)
      : params(params),
        shared(shared),
        turns{consumer},
        consumer(consumer),
        group_row(consumer * tile::kWarpgroupRows),
        warp_row(arch::warp_index() % 4 * tile::kSlabRows),
        leader(arch::lane_index() == 0),
        storer(arch::thread_index() % arch::kWarpgroupSize == 0) {}

  DEVICE void run() {
    const int tiles = num_tiles(params.shape);
    turns.prime();
    Work work(params.shape, 0, group_row);
    bool pending = false;  // the last product and the output of `work` are still to come
#pragma unroll 1
    for (uint32 round = 0;; ++round) {
      const int index = shared.queue.pop(round);
      const bool more = index < tiles;
      const Work next(params.shape, more ? index : 0, group_row);
      const bool overlap = pending && more && next.overlaps();
      if (pending && !overlap) finish(work);
      if (!more) break;
      skip(next.before());
      if (overlap)
        hand_over(work, next);
      else if (next.visible())
        begin(next);
      else
        write_nothing(next);
      work = next;
      pending = work.visible();
      steps(work);
      if (pending && (!kOwnOut || work.after() > 0)) {
        finish(work);
        pending = false;
      }
      skip(work.after());
    }
    if (storer) arch::copy_to_global_wait_read();
  }

  // Lets blocks pass by that only the other warpgroups need.
  DEVICE void skip(int num_blocks) {
#pragma unroll 1
    for (; num_blocks > 0; --num_blocks) {
      shared.k.wait_full(key_use);
      shared.v.wait_full(key_use);
      turns.wait();
      turns.pass();
      if (leader) shared.k.release(key_use);
      if (leader) shared.v.release(key_use);
      ++key_use;
    }
  }

  // The first block of a tile.
  DEVICE void begin(const Work& work) {
    Scores scores;
    shared.q.wait_full(query_use);
    shared.k.wait_full(key_use);
    turns.wait();
    start_scores(scores);
    turns.pass();
    arch::product_wait<0>();
    arch::pin(scores);
    release_keys(work.blocks.end - work.blocks.begin == 1);
    state = tile::RowState();
    softmax(scores, work, work.blocks.end - 1, True{});  // as in hand_over: the same bits whichever tile came before
    to_probabilities(scores, work, work.blocks.end - 1);
    begin_output();
  }

  // The last product and the output of one tile, beside the first block of the next.
  DEVICE void hand_over(const Work& last, const Work& next) {
    Scores scores;
    shared.q.wait_full(query_use);
    shared.k.wait_full(key_use);
    turns.wait();
    start_scores(scores);
    if constexpr (Config::head_dim_v > 128) rescale_output();
    shared.v.wait_full(value_use);
    start_output();
    turns.pass();
    float factor[2];
    bool keep[2];
    finish_rows(last, factor, keep);
    arch::product_wait<1>();
    arch::pin(scores);
    release_keys(next.blocks.end - next.blocks.begin == 1);
    state = tile::RowState();
    softmax(scores, next, next.blocks.end - 1, True{});
    release_values();
    write(last, factor, keep);
    to_probabilities(scores, next, next.blocks.end - 1);
    begin_output();
  }

  // All blocks after the first.
  DEVICE void steps(const Work& work) {
    int n_block = work.blocks.end - 2;
#pragma unroll 1
    for (; n_block >= work.blocks.begin && n_block >= work.whole.end; --n_block) step(work, n_block, True{});
#pragma unroll 1
    for (; n_block >= work.blocks.begin && n_block >= work.whole.begin; --n_block) step(work, n_block, False{});
    if constexpr (Config::window_left) {
#pragma unroll 1
      for (; n_block >= work.blocks.begin; --n_block) step(work, n_block, True{});
    }
  }

  // Starts the scores of a block, then the product of the previous block's probabilities; exponentiates while the latter runs.
  template <class Cut>
  DEVICE void step(const Work& work, int n_block, Cut cut) {
    Scores scores;
    shared.k.wait_full(key_use);
    turns.wait();
    start_scores(scores);
    if constexpr (Config::head_dim_v > 128) rescale_output();  // it has no registers to wait in: scaled before its product
    shared.v.wait_full(value_use);
    start_output();
    turns.pass();
    arch::product_wait<1>();
    arch::pin(scores);
    release_keys(n_block == work.blocks.begin);
    softmax(scores, work, n_block, cut);
    release_values();
    to_probabilities(scores, work, n_block);
    if constexpr (Config::head_dim_v <= 128) rescale_output();
  }

  // The last product and the output of a tile.
  DEVICE void finish(const Work& work) {
    if constexpr (Config::head_dim_v > 128) rescale_output();
    shared.v.wait_full(value_use);
    start_output();
    float factor[2];
    bool keep[2];
    finish_rows(work, factor, keep);
    arch::product_wait<0>();
    arch::pin(out);
    arch::pin(probabilities);
    release_values();
    write(work, factor, keep);
  }

  // The output of queries that see no key.
  DEVICE void write_nothing(const Work& work) {
    float factor[2];
    bool keep[2];
    const bool queries_loaded = !kOwnOut || work.loaded.begin < work.loaded.end;
    if (queries_loaded) shared.q.wait_full(query_use);
    state = tile::RowState();
    tile::clear(out);
    finish_rows(work, factor, keep);
    write(work, factor, keep);
    if (kOwnOut && queries_loaded) release_queries();
  }

  // ---- products ----

  DEVICE void start_scores(Scores& scores) {
    tile::start_transposed<Element, Config::head_dim, kBlockM, kBlockN>(scores, shared.q.stage(query_use), group_row,
                                                                        shared.k.stage(key_use));
  }
  DEVICE void start_output() {
    tile::start_registers<Element, Config::head_dim_v, kBlockN>(out, probabilities, shared.v.stage(value_use));
  }
  DEVICE void release_keys(bool last) {
    if (leader) shared.k.release(key_use);
    ++key_use;
    if (kOwnOut && last) release_queries();
  }
  DEVICE void release_values() {
    if (leader) shared.v.release(value_use);
  }
  DEVICE void release_queries() {
    if (leader) shared.q.release(query_use);
    ++query_use;
  }

  // ---- scores and probabilities ----

  DEVICE float unit(const Work& work) const { return tile::Modifier<Config>(params.score, work.at.batch, work.at.head).unit(); }

  // Scores of a block to what the softmax takes.
  template <class Cut>
  DEVICE void modify(Scores& scores, const Work& work, int n_block, Cut) const {
    const tile::Sequence sequence(params.shape, work.at.batch);
    const int query = work.query + warp_row, key = n_block * kBlockN;
    tile::Modifier<Config>(params.score, work.at.batch, work.at.head)
        .template apply<QueryRows>(scores, query, key, sequence.offset);
    if constexpr (Cut::value)
      tile::Band<Config>(params.shape, sequence).template select<QueryRows>(scores, -arch::infinity(), query, key);
  }
  // Scores to probabilities relative to the new maxima, beside the product that is under way, and its end.
  template <class Cut>
  DEVICE void softmax(Scores& scores, const Work& work, int n_block, Cut cut) {
    modify(scores, work, n_block, cut);
    const float unit = this->unit(work);
    float reference[2];
    reference[0] = tile::raise_maximum<Config::lazy_rescale>(scores, 0, state, unit, rescale[0]);
    reference[1] = tile::raise_maximum<Config::lazy_rescale>(scores, 1, state, unit, rescale[1]);
    constexpr int kRow = kScores / 2;  // scores of one of the thread's two rows
    constexpr int kBefore = kRow * Config::eighths_before_wait / 4;
    tile::exponentiate<0, (kBefore < kRow ? kBefore : kRow)>(scores, 0, state, unit, reference[0]);
    tile::exponentiate<0, (kBefore > kRow ? kBefore - kRow : 0)>(scores, 1, state, unit, reference[1]);
    if constexpr (Config::eighths_before_wait > 0) {
      arch::product_wait_here(params.shape.num_heads);
      arch::pin(out);
    }
    tile::exponentiate<(kBefore < kRow ? kBefore : kRow), kRow>(scores, 0, state, unit, reference[0]);
    tile::exponentiate<(kBefore > kRow ? kBefore - kRow : 0), kRow>(scores, 1, state, unit, reference[1]);
    arch::product_wait<0>();
    arch::pin(out);
    arch::pin(probabilities);
  }
  DEVICE void to_probabilities(Scores& scores, const Work& work, int n_block) {
    if constexpr (Config::dropout)
      tile::Dropout(params.dropout, work.at.batch, work.at.head)
          .template for_each<QueryRows, kScores>(work.query + warp_row, n_block * kBlockN,
                                                 [&](int i, bool kept) { scores[i] = kept ? scores[i] : 0.f; });
    tile::to_operand<Element>(probabilities, scores);
    value_use = key_use - 1;
  }

  // ---- output ----

  DEVICE void begin_output() {
    tile::clear(out);
    rescale[0] = rescale[1] = 1.f;
  }
  DEVICE void rescale_output() {
    if (!Config::lazy_rescale || arch::any(rescale[0] < 1.f || rescale[1] < 1.f)) tile::scale_rows(out, rescale);
  }
  DEVICE void finish_rows(const Work& work, float (&factor)[2], bool (&keep)[2]) {
    tile::finish_rows<Config>(state, unit(work), params.score, params.dropout, params.shape, work.at.batch, work.at.head,
                              work.query + warp_row + tile::lane_row(), tile::Sequence(params.shape, work.at.batch).seqlen_q,
                              params.lse, factor, keep);
  }
  DEVICE void write(const Work& work, const float (&factor)[2], const bool (&keep)[2]) {
#pragma unroll
    for (int c = 0; c < tile::chunks(Config::head_dim_v); c += kOutChunks) {
      if (storer) arch::copy_to_global_wait_read();  // what was staged here before has left
      arch::named_barrier_sync(kStoreBarrier + consumer, arch::kWarpgroupSize);
      tile::stage_slab_by_matrix<Element, kBlockM>(shared.out, group_row + warp_row, out, c, kOutChunks, factor, keep);
      arch::fence_async_proxy();
      arch::named_barrier_sync(kStoreBarrier + consumer, arch::kWarpgroupSize);
      if (storer) {
        for (int staged = c; staged < min(c + kOutChunks, tile::chunks(Config::head_dim_v)); ++staged)
          arch::copy_box_to_global(params.out, shared.out + ((staged - c) * kBlockM + group_row) * tile::kChunkRowBytes,
                                   staged * tile::kChunkColumns, work.query, work.at.head, work.at.batch);
        arch::copy_to_global_commit();
      }
    }
    if constexpr (!kOwnOut) {
      if (storer) arch::copy_to_global_wait_read();  // q's place is free when the output has left it
      release_queries();
    }
  }
};

}  // namespace

KERNEL(kThreads, 1) forward_sm90(GRID_CONSTANT ForwardSm90Params params) {
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
  arch::block_barrier();
  const int warpgroup = arch::warpgroup_index();
  if (warpgroup == 0) {
    arch::lower_registers<kProducerRegisters>();
    if (arch::thread_index() == 0) produce(params, shared);
  } else {
    arch::raise_registers<kConsumerRegisters>();
    Consumer(params, shared, warpgroup - 1).run();
  }
}
