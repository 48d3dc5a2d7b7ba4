// Rows that key padding leaves out although the copy engine brings them. Where such a row meets a 0 in a product, it must not be NaN,
// which a caller may keep there: all consumers zero a part of the rows, and wait for each other before a product reads the tile. Whoever
// gives the buffer back has been at that barrier, behind everybody's fence: the next copy into it comes after these writes, also
// another CTA's of the cluster, whose producer has waited for it.
#pragma once

#include "tile/pipeline.cuh"

namespace tile {

// The absent rows of a block. Past the array the copy engine makes zeros itself, and a block of none but absent rows is never copied.
template <int kRows>
struct AbsentRows {
  int begin;
  int end;

  DEVICE AbsentRows(int first_row, int used, int allocated) : begin(used - first_row), end(min(allocated - first_row, kRows)) {}
  DEVICE bool exist() const { return begin < end; }

  // When the tile has arrived; all kThreads threads of the consumers, which come after the producer's warpgroup. The swizzle stays
  // within rows.
  template <int kColumns, int kThreads>
  DEVICE void clear(SharedAddress tile) const {
    constexpr int kStep = 16;  // bytes that a thread writes at a time
    const int thread = arch::thread_index() - arch::kWarpgroupSize;
#pragma unroll
    for (int c = 0; c < chunks(kColumns); ++c)
#pragma unroll 1
      for (int offset = begin * kChunkRowBytes + thread * kStep; offset < end * kChunkRowBytes; offset += kThreads * kStep)
        arch::store_shared(tile + c * kRows * kChunkRowBytes + offset, 0.f, 0.f, 0.f, 0.f);
  }
};

// Where consumers wait for each other: at one instruction, or two warpgroups at one each, where synccheck wants two barriers.
template <int kThreads>
struct AtOneBarrier {
  int barrier;

  DEVICE void operator()() const { arch::named_barrier_sync(barrier, kThreads); }
};
template <int kThreads>
struct AtOwnBarriers {
  int others, own;

  DEVICE void operator()() const {
    arch::named_barrier_arrive(others, kThreads);
    arch::named_barrier_sync(own, kThreads);
  }
};

// Makes what all consumers have cleared visible to the products of all.
template <class Meet>
DEVICE void publish(const Meet& meet) {
  arch::fence_async_proxy();
  arch::warp_barrier();  // a named barrier counts whole warps, and the leader may be behind with giving a buffer back
  meet();
}

// Zeroes absent queries and their dout: neither the mask nor their log-sum-exp, which is infinite, keeps a NaN out of dk and dv.
template <class Config, int kBlockM, int kThreads, class Queries, class Douts, class Meet>
DEVICE void clear_absent_queries(const Queries& q, const Douts& dout, uint32 use, int query, int used, int allocated,
                                 const Meet& meet) {
  if constexpr (Config::used_queries) {
    const AbsentRows<kBlockM> absent(query, used, allocated);
    if (!absent.exist()) return;
    q.wait_full(use);
    absent.template clear<Config::head_dim, kThreads>(q.stage(use));
    dout.wait_full(use);
    absent.template clear<Config::head_dim_v, kThreads>(dout.stage(use));
    publish(meet);
  }
}

}  // namespace tile
