// What threads do: they meet, wait, access memory, and fail.
#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "machine/block.h"

namespace twin {
namespace {

bool is_same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

}  // namespace

void fail(Where where, const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  snprintf(launch->message, launch->message_bytes, "%s:%d: block %d warp %d lane %d: %s", where.file, where.line, block->index,
           thread / kLanes, thread % kLanes, text);
  throw Failure();
}

int grid_size() { return launch->grid; }
int block_index() { return block->index; }
int thread_index() { return thread; }

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
  if (warp->at_block_barrier) {
    switch_to_scheduler();
    return;
  }
  warp->ready = kAllLanes;
  if (--warp->meetings_left <= 0) switch_to_scheduler();
}

void warp_barrier(Where where) {
  char nothing = 0;
  meet("warp_barrier", &nothing, [](void* const*) { block->shared.warp_barrier(thread / kLanes); }, where);
}

void block_barrier(Where where) {
  char nothing = 0;
  meet(
      "block_barrier", &nothing,
      [](void* const*) {
        if (block->warps_exited) fail(warp->where, "a block barrier waits for warps that have left the kernel");
        for (const Warp& other : block->warps)
          if (other.at_block_barrier && other.where.line != warp->where.line)
            fail(warp->where, "warps of one block meet at different barriers: the other at %s:%d", other.where.file, other.where.line);
        warp->at_block_barrier = true;
        if (++block->warps_at_barrier < static_cast<int>(block->warps.size())) return;
        block->warps_at_barrier = 0;
        block->shared.block_barrier();
        for (Warp& each : block->warps) {
          each.at_block_barrier = false;
          each.ready = kAllLanes;
        }
      },
      where);
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

void unpark(Block& its_block, int its_thread) {
  Warp& its_warp = its_block.warps[its_thread / kLanes];
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

void read_shared(uint32_t address, void* to, int bytes, Where where) { block->shared.read(thread, address, to, bytes, where); }
void write_shared(uint32_t address, const void* from, int bytes, Where where) {
  block->shared.write(thread, address, from, bytes, where);
}
void read_shared_for_lane(int lane, uint32_t address, void* to, int bytes, Where where) {
  block->shared.read(thread / kLanes * kLanes + lane, address, to, bytes, where);
}
void write_shared_for_lane(int lane, uint32_t address, const void* from, int bytes, Where where) {
  block->shared.write(thread / kLanes * kLanes + lane, address, from, bytes, where);
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
  block->shared.begin_copy(thread, address, bytes, where);
  this_lane().copies.push_back({address, from, bytes, this_lane().groups_committed, where});
}
void commit_copies() { ++this_lane().groups_committed; }
void wait_for_copies(int pending_groups) {
  Lane& lane = this_lane();
  size_t landed = 0;
  for (; landed < lane.copies.size(); ++landed) {
    const Copy& copy = lane.copies[landed];
    if (copy.group >= lane.groups_committed - pending_groups) break;
    static const unsigned char zeros[16] = {};
    block->shared.land_copy(thread, copy.address, copy.from ? copy.from : zeros, copy.bytes, copy.where);
  }
  lane.copies.erase(lane.copies.begin(), lane.copies.begin() + landed);
}

}  // namespace twin
