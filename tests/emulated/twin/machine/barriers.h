// Barriers of Hopper: mbarriers in shared memory, barriers of the hardware by number, and the pool of registers that warps wait for.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

#include "machine/clocks.h"
#include "machine/machine.h"

namespace twin {

// Eight bytes of shared memory. A phase ends when all arrivals and all announced bytes have come; phases are counted from 0.
struct Mbarrier {
  int arrivals_of_phase = 0;
  int missing_arrivals = 0;
  int missing_bytes = 0;
  uint32_t phase = 0;
  int made_by = 0;
  bool engine_sees_it = false;  // fenced since it was made
  Knowledge gathered;           // in this phase
  Knowledge told;               // by the phase that ended last
  std::vector<int> waiting;     // threads
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

struct Barriers {
  std::map<uint32_t, Mbarrier> in_shared_memory;  // by address
  NamedBarrier by_number[16];
};

// What setmaxnreg moves around: registers of the block that no warp holds.
struct RegisterPool {
  int free = 0;
  std::vector<int> of_warp;  // per thread
  std::vector<int> waiting;  // threads

  void reset(int num_warps);
};

// Signals that bytes have landed. Called by the copy engine of the running block.
void complete_bytes(Mbarrier& barrier, int bytes);
// The barrier at an address, as a copy of the running thread finds it.
Mbarrier& barrier_for_copy(uint32_t address, Where where);

}  // namespace twin
