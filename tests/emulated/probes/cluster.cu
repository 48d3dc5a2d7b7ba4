// Small kernels of blocks that reach each other's shared memory, in clusters of kBlocks, which the test defines.
#include "arch/sm90.cuh"

struct ClusterParams {
  TensorMap map;  // boxes of 64 columns by kPartRows rows
  int* out;
  int rounds;
  int variant;  // which of a probe's ways to go wrong; 0 is right
};

namespace {

constexpr int kPartRows = 16, kPartBytes = kPartRows * 128, kTileBytes = kBlocks * kPartBytes;
constexpr int kStages = 2, kBarrierBytes = 8;
constexpr uint32 kAll = (1u << kBlocks) - 1;

// The shared tiles, two at a time, with the barriers of their buffers.
struct Ring {
  const ClusterParams& params;
  int variant, rank;

  DEVICE SharedAddress stage(int use) const { return arch::shared_base() + use % kStages * kTileBytes; }
  DEVICE SharedAddress full(int use) const { return arch::shared_base() + kStages * kTileBytes + use % kStages * kBarrierBytes; }
  DEVICE SharedAddress empty(int use) const { return full(use) + kStages * kBarrierBytes; }
};

enum RingVariant {
  kRight,
  kNoWaitForReaders,
  kOwnReadersOnly,
  kReleasedEarly,
  kAnnouncedOnce,
  kNoBarrierAtStart,
  kMadeAfterBarrier,
  kNotFenced,
  kNoBarrierAtEnd,
  kCopyToNoRank,
  kCopyToNobody,
  kArrivesAtNoRank,
  kArrivesAtNoBarrier,
  kLeavesBeforeOthers,
  kOtherBarrierAtEnd,
  kNotRead,
  kClears,  // right as well
  kClearsUnfenced,
};

DEVICE void make_barriers(const Ring& ring) {
  if (arch::thread_index() != 0) return;
  for (int i = 0; i < kStages; ++i) {
    arch::barrier_init(ring.full(i), 1);
    arch::barrier_init(ring.empty(i), ring.variant == kOwnReadersOnly ? 1 : kBlocks);
  }
  if (ring.variant != kNotFenced) arch::fence_barrier_init();
}

// Copies this block's part of every tile to all blocks.
DEVICE void produce(const Ring& ring) {
  const uint32 ranks = ring.variant == kCopyToNoRank ? kAll + 1 : ring.variant == kCopyToNobody ? 0 : kAll;
  for (int use = 0; use < ring.params.rounds; ++use) {
    if (ring.variant != kNoWaitForReaders) arch::barrier_wait(ring.empty(use), (use / kStages & 1) ^ 1);
    if (ring.variant != kAnnouncedOnce || ring.rank == 0) arch::barrier_arrive_expecting(ring.full(use), kTileBytes);
    const int row = (use * kBlocks + ring.rank) * kPartRows;
    arch::copy_box_to_cluster(ring.stage(use) + ring.rank * kPartBytes, ring.params.map, ring.full(use), 0, row, 0, 0, ranks);
  }
}

DEVICE void release(const Ring& ring, int use) {
  arch::warp_barrier();
  if (arch::lane_index() != 0) return;
  if (ring.variant == kOwnReadersOnly) return arch::barrier_arrive(ring.empty(use));
  for (int rank = 0; rank < kBlocks; ++rank) {
    const int to = ring.variant == kArrivesAtNoRank ? kBlocks : rank;
    const SharedAddress at = ring.variant == kArrivesAtNoBarrier && rank > 0 ? ring.stage(use) : ring.empty(use);
    arch::barrier_arrive(arch::in_cta(at, to));
  }
}

// Each lane adds up the words of its column, as the tile lies in shared memory.
DEVICE void consume(const Ring& ring) {
  for (int use = 0; use < ring.params.rounds; ++use) {
    arch::barrier_wait(ring.full(use), use / kStages & 1);
    if (ring.variant == kReleasedEarly) release(ring, use);
    uint32 sum = 0;
    for (int at = 4 * arch::lane_index(); at < kTileBytes; at += 4 * kWarpSize)
      sum += static_cast<uint32>(arch::load_shared_int(ring.stage(use) + at));
    ring.params.out[(arch::block_index() * ring.params.rounds + use) * kWarpSize + arch::lane_index()] = static_cast<int>(sum);
    if (ring.variant == kClears || ring.variant == kClearsUnfenced) {
      arch::warp_barrier();
      arch::store_shared(ring.stage(use) + 4 * arch::lane_index(), 0.f);
    }
    if (ring.variant == kClears) arch::fence_async_proxy();
    if (ring.variant != kReleasedEarly) release(ring, use);
  }
}

}  // namespace

// Every block copies a part of each tile to all blocks; one warp of each block reads all tiles.
CLUSTER_KERNEL(64, 1, kBlocks) shared_tiles(GRID_CONSTANT ClusterParams params) {
  const int variant = params.variant;
  const Ring ring{params, variant, arch::cluster_rank<kBlocks>()};
  if (variant != kMadeAfterBarrier) make_barriers(ring);
  if (variant == kNoBarrierAtStart) {
    arch::block_barrier();
  } else {
    arch::cluster_begin();
  }
  if (variant == kMadeAfterBarrier) {
    make_barriers(ring);
    arch::block_barrier();
  }
  if (arch::thread_index() == 0) produce(ring);
  if (arch::warp_index() == 1 && variant != kNotRead) consume(ring);
  if (variant == kLeavesBeforeOthers && ring.rank == 0 && arch::warp_index() == 1) return;
  if (variant == kOtherBarrierAtEnd && ring.rank == 0 && arch::warp_index() == 1) arch::block_barrier();
  if (variant != kNoBarrierAtEnd) arch::cluster_begin();
}

// The first block sends words to the last one, through two slots; each block adds them up.
CLUSTER_KERNEL(32, 1, kBlocks) sent_words(GRID_CONSTANT ClusterParams params) {
  enum { kRight, kNoWait, kNoWaitForReader, kOtherBlocksBarrier, kNotAnnounced, kArrivesTwice, kLeaves };
  const int variant = params.variant, rank = arch::cluster_rank<kBlocks>(), last = kBlocks - 1;
  const auto slot = [](int use) { return arch::shared_base() + use % 2 * 4; };
  const auto full = [](int use) { return arch::shared_base() + 16 + use % 2 * kBarrierBytes; };
  const auto empty = [&](int use) { return full(use) + 2 * kBarrierBytes; };
  if (arch::thread_index() == 0) {
    for (int i = 0; i < 2; ++i) {
      arch::barrier_init(full(i), 1);
      arch::barrier_init(empty(i), 1);
    }
    arch::fence_barrier_init();
  }
  arch::cluster_begin();
  int sum = 0;
  for (int use = 0; use < params.rounds; ++use) {
    if (rank == 0 && arch::thread_index() == 0) {
      if (variant != kNoWaitForReader) arch::barrier_wait(empty(use), (use / 2 & 1) ^ 1);
      const arch::ClusterAddress its_full = arch::in_cta(full(use), last);
      arch::barrier_arrive_expecting(its_full, variant == kNotAnnounced ? 0 : 4);
      if (variant == kArrivesTwice) arch::barrier_arrive(its_full);
      arch::send(arch::in_cta(slot(use), last), static_cast<uint32>(7 * use),
                 variant == kOtherBlocksBarrier ? arch::in_cta(full(use), 0) : its_full);
    }
    if (rank == last && variant == kLeaves && use == params.rounds - 1) return;
    if (rank == last) {
      if (variant != kNoWait) arch::barrier_wait(full(use), use / 2 & 1);
      sum += arch::load_shared_int(slot(use));
      arch::warp_barrier();
      if (arch::lane_index() == 0) arch::barrier_arrive(arch::in_cta(empty(use), 0));
    }
  }
  if (rank == last) params.out[arch::block_index() / kBlocks * kWarpSize + arch::lane_index()] = sum;
  if (variant != kLeaves) arch::cluster_begin();
}

namespace {

// Warps of a block wait for each other by way of the other block: each arrives there, and once more when it has heard from there.
DEVICE void meet_through_other_block(SharedAddress barriers) {
  const int other = arch::cluster_rank<kBlocks>() ^ 1;
  if (arch::thread_index() == 0) {
    for (int way = 0; way < 2; ++way) arch::barrier_init(barriers + way * kBarrierBytes, 2);
    arch::fence_barrier_init();
  }
  arch::cluster_begin();
  for (int way = 0; way < 2; ++way) {
    arch::warp_barrier();
    if (arch::lane_index() == 0) arch::barrier_arrive(arch::in_cta(barriers + way * kBarrierBytes, other));
    arch::barrier_wait(barriers + way * kBarrierBytes, 0);
  }
}

}  // namespace

// Every block has its own named barriers, block barriers and registers.
CLUSTER_KERNEL(64, 1, kBlocks) own_barriers(GRID_CONSTANT ClusterParams params) {
  enum { kRight, kLeaves, kClusterBarrier, kThroughOtherBlock };
  const SharedAddress mine = arch::shared_base() + 4 * arch::thread_index();
  const SharedAddress other = arch::shared_base() + 4 * ((arch::thread_index() + kWarpSize) % (2 * kWarpSize));
  const int first = arch::block_index() * 100 + arch::thread_index();
  if (arch::cluster_rank<kBlocks>() > 0 && arch::warp_index() == 1) arch::named_barrier_arrive(2, 2 * kWarpSize);
  if (arch::cluster_rank<kBlocks>() > 0 && arch::warp_index() == 0) arch::named_barrier_sync(2, 2 * kWarpSize);
  arch::store_shared(mine, static_cast<uint32>(first));
  if (params.variant == kLeaves && arch::cluster_rank<kBlocks>() == 0 && arch::warp_index() == 1) return;
  if (params.variant == kClusterBarrier) {
    arch::cluster_begin();
  } else if (params.variant == kThroughOtherBlock) {
    meet_through_other_block(arch::shared_base() + 4 * 2 * kWarpSize);
  } else {
    arch::block_barrier();
  }
  const int theirs = arch::load_shared_int(other);
  arch::named_barrier_sync(1, 2 * kWarpSize);
  arch::store_shared(mine, static_cast<uint32>(first + theirs));
  params.out[arch::block_index() * 2 * kWarpSize + arch::thread_index()] = arch::load_shared_int(mine);
}
