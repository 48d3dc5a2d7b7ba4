// Who knows of whose accesses to shared memory. Every warp keeps, for every agent of its cluster, the moment up to which that
// agent's accesses are ordered before what the warp does next; a barrier passes this knowledge on from those that arrive to those
// that wait.
#pragma once

#include <cstdint>

namespace twin {

// A moment on the cluster's clock, which ticks whenever knowledge is passed on.
using Time = uint32_t;

// Of a cluster.
constexpr int kMaxWarps = 32;
constexpr int kMaxBlocks = 8;

// Agents: the warps themselves, once for their writes and once for their reads; the reads that run in the background for each warp
// (products, copies to global memory); and the engine that writes to shared memory, once for each block: what arrives in one block
// tells nothing of another.
constexpr int writes_of(int warp) { return warp; }
constexpr int reads_of(int warp) { return kMaxWarps + warp; }
constexpr int background_of(int warp) { return 2 * kMaxWarps + warp; }
constexpr int engine_of(int rank) { return 3 * kMaxWarps + rank; }
constexpr int kAgents = 3 * kMaxWarps + kMaxBlocks;

constexpr Time kFirstTime = 1;

// An access of agent a at time t is known if t < until[a].
struct Knowledge {
  Time until[kAgents];

  Knowledge() {
    for (Time& each : until) each = kFirstTime;
  }
  void join(const Knowledge& other) { join(other, 0, kAgents); }
  // What a block learns from others without a fence of all memory: that reads have ended, and what the engine wrote elsewhere. What
  // other warps wrote may be on its way.
  void join_ends_of_reads(const Knowledge& other, int rank) {
    join(other, reads_of(0), engine_of(rank));
    join(other, engine_of(rank + 1), kAgents);
  }
  void know_accesses_of(int warp, Time now) { until[writes_of(warp)] = until[reads_of(warp)] = now; }

 private:
  void join(const Knowledge& other, int first, int end) {
    for (int agent = first; agent < end; ++agent)
      if (until[agent] < other.until[agent]) until[agent] = other.until[agent];
  }
};

}  // namespace twin
