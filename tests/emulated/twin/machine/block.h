// The state of resident blocks, and of the thread that runs: for the files of the machine itself.
#pragma once

#include <memory>
#include <vector>

#include "machine/barriers.h"
#include "machine/copy_engine.h"
#include "machine/fiber.h"
#include "machine/machine.h"
#include "machine/random.h"
#include "machine/shared_memory.h"
#include "machine/tensor_cores.h"

namespace twin {

constexpr uint32_t kAllLanes = 0xffffffffu;

struct Copy {
  uint32_t address;
  const void* from;
  int bytes;
  int group;
  Where where;
};

struct Lane {
  Fiber fiber;
  std::vector<Copy> copies;  // under way, oldest first
  int groups_committed = 0;
  const int* awaited = nullptr;  // what wait_until_equal waits for
  int expected = 0;
  char waits_for[128] = {};  // in words, where it waits
  Where waits_at;
};

struct Warp {
  // Each lane is in exactly one of these sets, or it is the one that runs, which counts as ready.
  uint32_t ready = 0;
  uint32_t meeting = 0;  // came to the meeting below
  uint32_t polling = 0;  // in wait_until_equal
  uint32_t parked = 0;   // in park
  uint32_t exited = 0;
  bool at_block_barrier = false;  // all lanes have met there

  const char* verb = nullptr;  // the meeting under way
  Where where;
  void* brought[kLanes] = {};

  int first_lane = 0;     // lanes take turns starting here
  int meetings_left = 0;  // until another warp may run

  ProductQueue products;
};

struct Block {
  int index = -1;
  SharedMemory shared;
  std::vector<Warp> warps;
  std::vector<Lane> lanes;
  int warps_at_barrier = 0;
  int warps_exited = 0;

  Barriers barriers;
  RegisterPool registers;
  CopyEngine engine;
  std::vector<ProductHistory> histories;  // one for each warpgroup
};

// ---- the thread that runs -----------------------------------------------------------------------------------------------------------

extern const Launch* launch;
extern Block* block;
extern Warp* warp;
extern int thread;
extern Random schedule;

inline int warp_index() { return thread / kLanes; }
inline Lane& this_lane() { return block->lanes[thread]; }
inline uint32_t this_bit() { return 1u << (thread % kLanes); }

// What `fail` throws.
struct Failure {};

void switch_to_scheduler();
// The running lane cannot go on: another lane of its warp does, or the scheduler decides.
void run_another_lane();
// Takes the running lane out of the race until somebody calls `unpark` for it. `format` says what it waits for.
void park(Where where, const char* format, ...) __attribute__((format(printf, 2, 3)));
void unpark(Block& its_block, int its_thread);

// Stops the launch if the running warp, all of whose lanes have left the kernel, has products under way or has missed some.
void check_products_at_exit();

void check_global(const void* address, int bytes, int alignment, bool writes, Where where);

}  // namespace twin
