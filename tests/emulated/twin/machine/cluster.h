// The state of resident clusters, and of the thread that runs: for the files of the machine itself. A cluster is what runs together;
// without clusters that is one block. Its warps and threads are numbered through its blocks; a block has a rank in it.
#pragma once

#include <map>
#include <string>
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
  Place place;
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

// Barriers of the hardware that whole warps come to, all of them.
enum class WarpBarrier : uint8_t { kNone, kOfBlock, kOfCluster };

struct Warp {
  // Each lane is in exactly one of these sets, or it is the one that runs, which counts as ready.
  uint32_t ready = 0;
  uint32_t meeting = 0;  // came to the meeting below
  uint32_t polling = 0;  // in wait_until_equal
  uint32_t parked = 0;   // in park
  uint32_t exited = 0;
  WarpBarrier waits_at = WarpBarrier::kNone;  // all lanes have met there
  int rank = 0;                               // of its block

  const char* verb = nullptr;  // the meeting under way
  Where where;
  void* brought[kLanes] = {};

  int first_lane = 0;     // lanes take turns starting here
  int meetings_left = 0;  // until another warp may run

  ProductQueue products;
};

// What each block of a cluster has of its own.
struct Block {
  NamedBarrier named_barriers[kNamedBarriers];
  RegisterPool registers;
  int warps_exited = 0;
};

struct Cluster {
  int index = -1;
  SharedMemory shared;
  std::vector<Block> blocks;
  std::vector<Warp> warps;
  std::vector<Lane> lanes;
  std::map<Place, Mbarrier> barriers;
  CopyEngine engine;
  std::vector<ProductHistory> histories;  // one for each warpgroup
};

// ---- the thread that runs -----------------------------------------------------------------------------------------------------------

extern const Launch* launch;
extern Cluster* cluster;
extern Warp* warp;
extern int thread;
extern Random schedule;

inline int warp_index() { return thread / kLanes; }
inline Lane& this_lane() { return cluster->lanes[thread]; }
inline uint32_t this_bit() { return 1u << (thread % kLanes); }
inline Block& this_block() { return cluster->blocks[warp->rank]; }
inline int warps_of_block() { return launch->threads / kLanes; }
constexpr int kRankShift = 24;  // in shared addresses
// The running thread's own shared memory. Another block's address lies far outside of it.
inline Place here(uint32_t address) { return {warp->rank, address - (static_cast<uint32_t>(warp->rank) << kRankShift)}; }

inline int index_of_block(int rank) { return cluster->index * static_cast<int>(cluster->blocks.size()) + rank; }
inline bool has_left(const Block& its_block) { return its_block.warps_exited == warps_of_block(); }
// Stops the launch unless the running thread may touch the shared memory of the block of this rank, and knows that it may.
void check_reach(int rank, Where where);
// What an address of the cluster points at.
Place place_in_cluster(uint32_t cluster_address);
// In messages: with the block where a cluster has several.
std::string name_of_thread(int its_thread);
std::string name_of_offset(Place place);

// What `fail` throws.
struct Failure {};

void switch_to_scheduler();
// The running lane cannot go on: another lane of its warp does, or the scheduler decides.
void run_another_lane();
// Takes the running lane out of the race until somebody calls `unpark` for it. `format` says what it waits for.
void park(Where where, const char* format, ...) __attribute__((format(printf, 2, 3)));
void unpark(int its_thread);

// Stops the launch if the running warp, all of whose lanes have left the kernel, has products under way or has missed some.
void check_products_at_exit();

void check_global(const void* address, int bytes, int alignment, bool writes, Where where);

}  // namespace twin
