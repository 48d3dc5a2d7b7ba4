// Who knows of whose accesses to shared memory. Every warp keeps, for every agent of its block, the moment up to which that agent's
// accesses are ordered before what the warp does next; a barrier passes this knowledge on from those that arrive to those that wait.
#pragma once

#include <cstdint>

namespace twin {

// A moment on the block's clock, which ticks whenever knowledge is passed on.
using Time = uint32_t;

constexpr int kMaxWarps = 16;

// Agents: the warps themselves, the reads that run in the background for each warp (products, copies to global memory), and the engine
// that copies to shared memory.
constexpr int background_of(int warp) { return kMaxWarps + warp; }
constexpr int kCopyEngine = 2 * kMaxWarps;
constexpr int kAgents = 2 * kMaxWarps + 1;

// An access of agent a at time t is known if t < until[a]. Clocks start at 1.
struct Knowledge {
  Time until[kAgents];

  Knowledge() {
    for (Time& each : until) each = 1;
  }
  void join(const Knowledge& other) {
    for (int agent = 0; agent < kAgents; ++agent)
      if (until[agent] < other.until[agent]) until[agent] = other.until[agent];
  }
};

}  // namespace twin
