// What threads do: they meet, wait, access memory, and fail.
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "machine/cluster.h"

namespace twin {
namespace {


bool is_same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

void check_rank(int rank, Where where) {
  const int num_blocks = static_cast<int>(cluster->blocks.size());
  if (rank < 0 || rank >= num_blocks) fail(where, "there is no rank %d in a cluster of %d blocks", rank, num_blocks);
}

const char* name_of(WarpBarrier barrier) { return barrier == WarpBarrier::kOfBlock ? "block" : "cluster"; }

// All lanes of a warp together.
void come_to(WarpBarrier barrier) {
  const int num_warps = barrier == WarpBarrier::kOfBlock ? warps_of_block() : static_cast<int>(cluster->warps.size());
  const int first = warp_index() / num_warps * num_warps, end = first + num_warps;
  int missing = num_warps - 1;
  for (int index = first; index < end; ++index) {
    const Warp& other = cluster->warps[index];
    if (other.exited == kAllLanes) fail(warp->where, "a %s barrier waits for warps that have left the kernel", name_of(barrier));
    if (other.waits_at != barrier) continue;
    if (other.where.line != warp->where.line)
      fail(warp->where, "warps of one %s meet at different barriers: the other at %s:%d", name_of(barrier), other.where.file,
           other.where.line);
    --missing;
  }
  warp->waits_at = barrier;
  if (missing > 0) return;
  if (barrier == WarpBarrier::kOfBlock)
    cluster->shared.barrier_of_warps(first, end);
  else
    cluster->shared.cluster_barrier();
  for (int index = first; index < end; ++index) {
    cluster->warps[index].waits_at = WarpBarrier::kNone;
    cluster->warps[index].ready = kAllLanes;
  }
}

}  // namespace

void fail(Where where, const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  snprintf(launch->message, launch->message_bytes, "%s:%d: block %d warp %d lane %d: %s", where.file, where.line,
           index_of_block(thread / launch->threads), thread % launch->threads / kLanes, thread % kLanes, text);
  throw Failure();
}

int grid_size() { return launch->grid; }
int block_index() { return index_of_block(warp->rank); }
int thread_index() { return thread - warp->rank * launch->threads; }
int cluster_rank() { return warp->rank; }
uint32_t shared_base() { return static_cast<uint32_t>(warp->rank) << kRankShift | kSharedBase; }

std::string name_of_thread(int its_thread) {
  const std::string its_block =
      cluster->blocks.size() > 1 ? "block " + std::to_string(index_of_block(its_thread / launch->threads)) + " " : "";
  return its_block + "warp " + std::to_string(its_thread % launch->threads / kLanes) + " lane " +
         std::to_string(its_thread % kLanes);
}

std::string name_of_offset(Place place) {
  const std::string its_block = cluster->blocks.size() > 1 ? " of block " + std::to_string(index_of_block(place.rank)) : "";
  return std::to_string(static_cast<int>(place.address - kSharedBase)) + its_block;
}

// ---- meetings -----------------------------------------------------------------------------------------------------------------------

void meet(const char* verb, void* mine, void (*complete)(void* const* lanes), Where where) {
  const int lane = thread % kLanes;
  if (warp->exited) fail(where, "%s waits for lanes that have left the kernel (mask %08x)", verb, warp->exited);
  if (warp->meeting == 0) {
    warp->verb = verb;
    warp->where = where;
  } else if (!is_same(warp->verb, verb) || !is_same(warp->where.file, where.file) || warp->where.line != where.line) {
    fail(where, "lanes diverge: %s here, %s at %s:%d", verb, warp->verb, warp->where.file, warp->where.line);
  }
  warp->brought[lane] = mine;
  warp->meeting |= this_bit();
  warp->ready &= ~this_bit();
  if (warp->meeting != kAllLanes) {
    run_another_lane();
    return;
  }
  complete(warp->brought);
  warp->meeting = 0;
  if (warp->waits_at != WarpBarrier::kNone) {
    switch_to_scheduler();
    return;
  }
  warp->ready = kAllLanes;
  if (--warp->meetings_left <= 0) switch_to_scheduler();
}

void warp_barrier(Where where) {
  char nothing = 0;
  meet("warp_barrier", &nothing, [](void* const*) { cluster->shared.warp_barrier(warp_index()); }, where);
}

void block_barrier(Where where) {
  char nothing = 0;
  meet("block_barrier", &nothing, [](void* const*) { come_to(WarpBarrier::kOfBlock); }, where);
}

void cluster_barrier(Where where) {
  char nothing = 0;
  meet("cluster_barrier", &nothing, [](void* const*) { come_to(WarpBarrier::kOfCluster); }, where);
}

void wait_until_equal(const int* value, int expected, Where where) {
  Lane& mine = this_lane();
  mine.awaited = value;
  mine.expected = expected;
  mine.waits_at = where;
  warp->ready &= ~this_bit();
  warp->polling |= this_bit();
  switch_to_scheduler();
}

void park(Where where, const char* format, ...) {
  Lane& mine = this_lane();
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(mine.waits_for, sizeof mine.waits_for, format, arguments);
  va_end(arguments);
  mine.waits_at = where;
  warp->ready &= ~this_bit();
  warp->parked |= this_bit();
  run_another_lane();
}

void unpark(int its_thread) {
  Warp& its_warp = cluster->warps[its_thread / kLanes];
  const uint32_t bit = 1u << (its_thread % kLanes);
  its_warp.parked &= ~bit;
  its_warp.ready |= bit;
}

// ---- memory -------------------------------------------------------------------------------------------------------------------------

void check_global(const void* address, int bytes, int alignment, bool writes, Where where) {
  const uint64_t begin = reinterpret_cast<uint64_t>(address);
  if (begin % alignment != 0) fail(where, "global access of %d bytes at %p is misaligned", bytes, address);
  for (int i = 0; i < launch->num_allocations; ++i) {
    const Allocation& allocation = launch->allocations[i];
    if (begin < allocation.base || begin + bytes > allocation.base + allocation.bytes) continue;
    if (writes && !allocation.writable) fail(where, "writes to array %d, which is an input", i);
    return;
  }
  fail(where, "global %s of %d bytes at %p lies in no array", writes ? "write" : "read", bytes, address);
}

void read_shared(uint32_t address, void* to, int bytes, Where where) {
  cluster->shared.read(thread, here(address), to, bytes, where);
}
void write_shared(uint32_t address, const void* from, int bytes, Where where) {
  cluster->shared.write(thread, here(address), from, bytes, where);
}
void read_shared_for_lane(int lane, uint32_t address, void* to, int bytes, Where where) {
  cluster->shared.read(thread / kLanes * kLanes + lane, here(address), to, bytes, where);
}
void write_shared_for_lane(int lane, uint32_t address, const void* from, int bytes, Where where) {
  cluster->shared.write(thread / kLanes * kLanes + lane, here(address), from, bytes, where);
}

void read_global(const void* from, void* to, int bytes, Where where) {
  check_global(from, bytes, bytes, false, where);
  std::memcpy(to, from, bytes);
}
void write_global(void* to, const void* from, int bytes, Where where) {
  check_global(to, bytes, bytes, true, where);
  std::memcpy(to, from, bytes);
}

void begin_copy(uint32_t address, const void* from, int bytes, Where where) {
  if (from) check_global(from, bytes, bytes, false, where);
  cluster->shared.begin_copy(thread, here(address), bytes, where);
  this_lane().copies.push_back({here(address), from, bytes, this_lane().groups_committed, where});
}
void commit_copies() { ++this_lane().groups_committed; }
void wait_for_copies(int pending_groups) {
  Lane& lane = this_lane();
  size_t landed = 0;
  for (; landed < lane.copies.size(); ++landed) {
    const Copy& copy = lane.copies[landed];
    if (copy.group >= lane.groups_committed - pending_groups) break;
    static const unsigned char zeros[16] = {};
    cluster->shared.land_copy(thread, copy.place, copy.from ? copy.from : zeros, copy.bytes, copy.where);
  }
  lane.copies.erase(lane.copies.begin(), lane.copies.begin() + landed);
}

// ---- the shared memory of another block ---------------------------------------------------------------------------------------------

uint32_t address_in_cluster(uint32_t address, int rank, Where where) {
  check_rank(rank, where);
  const Place place = here(address);
  if (place.address - kSharedBase >= static_cast<uint32_t>(launch->shared_bytes))
    fail(where, "the address of offset %s in another block; blocks have %d bytes", name_of_offset(place).c_str(),
         launch->shared_bytes);
  return static_cast<uint32_t>(rank) << kRankShift | place.address;
}

void check_reach(int rank, Where where) {
  check_rank(rank, where);
  if (rank == warp->rank) return;
  cluster->shared.check_begun(thread, rank, where);
  if (has_left(cluster->blocks[rank])) fail(where, "reaches into block %d, which has left the kernel", index_of_block(rank));
}

Place place_in_cluster(uint32_t cluster_address) {
  return {static_cast<int>(cluster_address >> kRankShift), cluster_address & ((1u << kRankShift) - 1)};
}

}  // namespace twin
