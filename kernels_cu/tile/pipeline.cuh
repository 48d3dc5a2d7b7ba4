// Buffers between the producer warp and the consumer warpgroups of a Hopper kernel. Every buffer has two barriers: `full` (its
// bytes have arrived) and `empty` (its readers are done). Both sides count buffer uses from 0; use u is in stage u % kStages, and
// its phase there is u / kStages.
//
// The CTAs of a cluster that need the same tiles each copy a part of every tile, to all of them. A buffer is then filled when the
// readers of all CTAs are done with theirs: readers arrive at the `empty` of every CTA, and each producer waits for its own.
#pragma once

#include "arch/sm90.cuh"
#include "tile/scheduler.cuh"
#include "tile/swizzle.cuh"

namespace tile {

constexpr int kBarrierBytes = 8;

// kFillBytes are announced: those of the buffer and of what else is copied and waited for with it. kCtas share what is copied.
template <int kStages, int kStageBytes, int kFillBytes = kStageBytes, int kCtas = 1>
struct Pipeline {
  static_assert(kCtas <= 2, "pairs of SMs fill any GPU, larger clusters leave some idle");
  static constexpr int kBytes = kStages * kStageBytes;
  static constexpr int kBarriersBytes = 2 * kStages * kBarrierBytes;

  SharedAddress data;
  SharedAddress barriers;

  DEVICE void init(int readers) const {
    for (uint32 stage = 0; stage < kStages; ++stage) {
      arch::barrier_init(full(stage), 1);
      arch::barrier_init(empty(stage), kCtas * readers);
    }
  }

  DEVICE SharedAddress stage(uint32 use) const { return data + use % kStages * kStageBytes; }

  // Producer: waits until the buffer is free and announces its bytes. Returns the barrier for the copies.
  DEVICE SharedAddress begin_fill(uint32 use) const {
    arch::barrier_wait(empty(use % kStages), (use / kStages & 1) ^ 1);
    arch::barrier_arrive_expecting(full(use % kStages), kFillBytes);
    return full(use % kStages);
  }
  // Consumer: waits until the buffer has been filled.
  DEVICE void wait_full(uint32 use) const { arch::barrier_wait(full(use % kStages), use / kStages & 1); }
  // Consumer: a warp says that it is done, by the first of its lanes, or by one lane for each CTA. All of it is, therefore.
  DEVICE void release(uint32 use, int lane) const {
    if constexpr (kCtas == 1) {
      if (lane == 0) arch::barrier_arrive(empty(use % kStages));
    } else {
      if (lane < kCtas) arch::barrier_arrive(arch::in_cta(empty(use % kStages), lane));
    }
  }
  // The same by one thread that speaks for all who read.
  DEVICE void release(uint32 use) const {
    static_assert(kCtas == 1, "a reader of a cluster's buffer is a warp");
    arch::barrier_arrive(empty(use % kStages));
  }

 private:
  DEVICE SharedAddress full(uint32 stage) const { return barriers + stage * kBarrierBytes; }
  DEVICE SharedAddress empty(uint32 stage) const { return barriers + (kStages + stage) * kBarrierBytes; }
};

// Which tile a persistent CTA works on next: the producer thread takes numbers from a counter in global memory and hands them to
// the consumers through two slots of shared memory. Whoever draws the last number of a launch sets the counter back to zero.
// A cluster's tiles count as one: the first CTA's producer draws for all, and the producers of the others are readers as well.
template <int kCtas = 1>
struct TileQueue {
  static constexpr int kSlots = 2;
  static constexpr int kBytes = kSlots * 4 + 2 * kSlots * kBarrierBytes + 8;  // a multiple of 16

  SharedAddress slots;

  DEVICE void init(int readers) const {
    for (uint32 slot = 0; slot < kSlots; ++slot) {
      arch::barrier_init(full(slot), 1);
      arch::barrier_init(empty(slot), kCtas * readers + kCtas - 1);
    }
  }
  DEVICE static bool is_first_cta() { return arch::cluster_rank<kCtas>() == 0; }
  DEVICE static int first_tile() { return arch::block_index() / kCtas; }
  // Producer: a number for the tile after the first. Drawn late, so that the order of tiles is the order in which CTAs become
  // free; used later still, so that nobody waits for it.
  DEVICE static int draw(int* counter) { return is_first_cta() ? arch::fetch_add(counter, 1) : kNotDrawn; }
  DEVICE static int tile_of(int drawn, int* counter, int num_tiles) {
    if (drawn == num_tiles - 1) *counter = 0;
    return drawn + arch::grid_size() / kCtas;
  }
  // Producer: the next tile, also for a CTA's first, where tiles wait for earlier ones: whoever has those has begun them.
  DEVICE static int draw_in_order(int* counter, int num_tiles) {
    const int drawn = draw(counter);
    if (drawn == num_tiles - 1 + arch::grid_size() / kCtas) *counter = 0;
    return drawn;
  }
  DEVICE void push(uint32 use, int tile) const {
    arch::barrier_wait(empty(use % kSlots), (use / kSlots & 1) ^ 1);
    arch::store_shared(slot(use), static_cast<uint32>(tile));
    arch::barrier_arrive(full(use % kSlots));
#pragma unroll
    for (int rank = 1; rank < kCtas; ++rank) {
      const arch::ClusterAddress its_full = arch::in_cta(full(use % kSlots), rank);
      arch::barrier_arrive_expecting(its_full, sizeof(uint32));
      arch::send(arch::in_cta(slot(use), rank), static_cast<uint32>(tile), its_full);
    }
  }
  // Producer: hands out a tile, or is handed the one that the cluster's first CTA has drawn. Returns it.
  DEVICE int share(uint32 use, int tile) const {
    if (is_first_cta()) {
      push(use, tile);
      return tile;
    }
    arch::barrier_wait(full(use % kSlots), use / kSlots & 1);
    tile = arch::load_shared_int(slot(use));
    release(use);
    return tile;
  }
  // Consumer: every warp, all lanes.
  DEVICE int pop(uint32 use) const {
    arch::barrier_wait(full(use % kSlots), use / kSlots & 1);
    const int tile = arch::broadcast(arch::load_shared_int(slot(use)));
    arch::warp_barrier();
    if (arch::lane_index() == 0) release(use);
    return tile;
  }

 private:
  static constexpr int kNotDrawn = -1;

  DEVICE void release(uint32 use) const {
    if constexpr (kCtas == 1) arch::barrier_arrive(empty(use % kSlots));
    else arch::barrier_arrive(arch::in_cta(empty(use % kSlots), 0));
  }
  DEVICE SharedAddress slot(uint32 use) const { return slots + use % kSlots * 4; }
  DEVICE SharedAddress full(uint32 slot) const { return slots + kSlots * 4 + slot * kBarrierBytes; }
  DEVICE SharedAddress empty(uint32 slot) const { return full(kSlots + slot); }
};

// Copies rows [row, row + kRows) of a head into a tile, chunk by chunk; rows and columns past the array become zeros.
template <int kRows, int kColumns>
DEVICE void copy_tile(SharedAddress tile, const TensorMap& map, SharedAddress barrier, int row, int head, int batch) {
#pragma unroll
  for (int c = 0; c < chunks(kColumns); ++c)
    arch::copy_box_to_shared(tile + c * kRows * kChunkRowBytes, map, barrier, c * kChunkColumns, row, head, batch);
}

// The part of such a copy that falls to this CTA, to the same place of all CTAs of a cluster. `turn` counts copies: where chunks do
// not go round, CTAs take turns.
template <int kRows, int kColumns, int kCtas>
DEVICE void copy_tile_to_cluster(SharedAddress tile, const TensorMap& map, SharedAddress barrier, int row, int head, int batch,
                                 uint32 turn) {
  if constexpr (kCtas == 1) return copy_tile<kRows, kColumns>(tile, map, barrier, row, head, batch);
  constexpr uint32 kAll = (1u << kCtas) - 1;
#pragma unroll
  for (int c = 0; c < chunks(kColumns); ++c)
    if (static_cast<int>((c + turn) % kCtas) == arch::cluster_rank<kCtas>())
      arch::copy_box_to_cluster(tile + c * kRows * kChunkRowBytes, map, barrier, c * kChunkColumns, row, head, batch, kAll);
}

// Copies rows of a tile, from tile_row on and as many as the map's boxes have, to those of a head from `row` on. The tile holds the
// chunks of columns first_chunk .. end_chunk - 1. One thread, which then commits.
template <int kRows>
DEVICE void copy_rows_out(const TensorMap& map, SharedAddress tile, int tile_row, int first_chunk, int end_chunk, int row, int head,
                          int batch) {
  for (int c = first_chunk; c < end_chunk; ++c)
    arch::copy_box_to_global(map, tile + ((c - first_chunk) * kRows + tile_row) * kChunkRowBytes, c * kChunkColumns, row, head,
                             batch);
}

}  // namespace tile
