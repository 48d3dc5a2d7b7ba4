// Barriers of Hopper: mbarriers in shared memory, barriers of the hardware by number, and the pool of registers that warps wait for.
#pragma once

#include <cstdint>
#include <vector>

#include "machine/clocks.h"
#include "machine/machine.h"
#include "machine/shared_memory.h"

namespace twin {

// Eight bytes of shared memory. A phase ends when all arrivals and all announced bytes have come; phases are counted from 0.
// Arrivals of the barrier's own block tell everything to all that wait, as the engine does; those of other blocks only tell that
// reads have ended.
struct Mbarrier {
  int arrivals_of_phase = 0;
  int missing_arrivals = 0;
  int missing_bytes = 0;
  uint32_t phase = 0;
  int made_by = 0;
  Time fenced_at = 0;        // since it was made, so that the engine and other blocks see it
  Knowledge gathered;        // in this phase
  Knowledge told;            // by the phase that ended last
  std::vector<int> waiting;  // threads
};

struct NamedBarrier {
  int threads = 0;  // that it is for
  int arrived = 0;
  uint32_t use = 0;  // how often it has been completed
  Knowledge gathered;
  std::vector<int> waiting_warps;
  std::vector<int> waiting;  // threads that are parked
  Where where;               // of the first arrival
};

constexpr int kNamedBarriers = 16;

// What setmaxnreg moves around: registers of the block that no warp holds.
struct RegisterPool {
  int free = 0;
  std::vector<int> of_warp;  // per thread, by warp of the block
  std::vector<int> waiting;  // threads

  void reset(int num_warps);
};

// Signals that bytes have landed. Called by the copy engine of the running cluster.
void complete_bytes(Place barrier, int bytes);
// Stops the launch unless a copy of the running thread can find a barrier there.
void check_barrier_for_copy(Place barrier, Where where);

}  // namespace twin
