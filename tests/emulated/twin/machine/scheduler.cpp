// Runs a grid: blocks start in the order of their index, `resident_blocks` of them interleaved; a seeded schedule decides which warp runs
// and how far it runs ahead before another one may.
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <memory>
#include <sys/mman.h>
#include <vector>

#include "machine/block.h"

namespace twin {

const Launch* launch;
Block* block;
Warp* warp;
int thread;
Random schedule(0);

namespace {

constexpr size_t kStackBytes = 256 * 1024;  // reserved; only what a kernel touches becomes memory
constexpr int kWarpsOfGroup = 4;

struct Failure {};

class Stacks {
 public:
  explicit Stacks(size_t count) : bytes_(count * kStackBytes) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    memory_ = static_cast<char*>(mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, flags, -1, 0));
    for (size_t i = 0; i < count; ++i) mprotect(memory_ + i * kStackBytes, 4096, PROT_NONE);
  }
  ~Stacks() { munmap(memory_, bytes_); }
  char* operator[](size_t i) { return memory_ + i * kStackBytes + 4096; }
  static constexpr size_t usable_bytes() { return kStackBytes - 4096; }

 private:
  size_t bytes_;
  char* memory_;
};

// ---- the running launch -------------------------------------------------------------------------------------------------------------

void (*kernel_body)(const void* params);
const void* kernel_params;
bool failed;
jmp_buf scheduler;

Lane& this_lane() { return block->lanes[thread]; }
uint32_t this_bit() { return 1u << (thread % kLanes); }

void switch_to_scheduler() { switch_fiber(this_lane().fiber.point, scheduler); }

int next_ready_lane(const Warp& warp) {
  const uint32_t later = warp.ready & (kAllLanes << warp.first_lane);
  return __builtin_ctz(later ? later : warp.ready);
}

// The running lane cannot go on: another lane of its warp does, or the scheduler decides.
void run_another_lane() {
  Lane& mine = this_lane();
  if (warp->ready == 0) {
    switch_fiber(mine.fiber.point, scheduler);
    return;
  }
  thread = thread / kLanes * kLanes + next_ready_lane(*warp);
  switch_fiber(mine.fiber.point, this_lane().fiber.point);
}

void exit_lane() {
  if (warp->meeting) fail(warp->where, "lane %d leaves the kernel while others wait in %s", thread % kLanes, warp->verb);
  if (const Departure* departure = block->engine.unread_departure_of(thread))
    fail(departure->region.where, "this thread leaves the kernel without a wait until its copy to global memory has read shared memory");
  warp->ready &= ~this_bit();
  warp->exited |= this_bit();
  if (warp->exited == kAllLanes) {
    check_products_at_exit();
    ++block->warps_exited;
    for (const Warp& other : block->warps)
      if (other.at_block_barrier) fail(other.where, "this warp leaves the kernel while others wait at a block barrier");
  }
  run_another_lane();
}

// Every fiber runs this: one kernel thread after another, as blocks come and go.
void fiber_body() {
  for (;;) {
    try {
      kernel_body(kernel_params);
      exit_lane();
    } catch (const Failure&) {
      failed = true;
    }
    if (failed) switch_to_scheduler();
  }
}

void start_block(Block& fresh, int index) {
  fresh.index = index;
  fresh.shared.reset(launch->shared_bytes, static_cast<int>(fresh.warps.size()), launch->detect_races);
  fresh.warps_at_barrier = fresh.warps_exited = 0;
  for (Warp& each : fresh.warps) {
    each = Warp();
    each.ready = kAllLanes;
  }
  fresh.barriers = Barriers();
  fresh.registers.reset(static_cast<int>(fresh.warps.size()));
  fresh.engine.reset(static_cast<int>(fresh.lanes.size()));
  fresh.histories.assign(fresh.warps.size() / kWarpsOfGroup, {});
  for (Lane& lane : fresh.lanes) {
    lane.copies.clear();
    lane.groups_committed = 0;
  }
}

bool is_runnable(Block& candidate, int index) {
  Warp& each = candidate.warps[index];
  for (uint32_t polling = each.polling; polling; polling &= polling - 1) {
    const int bit = __builtin_ctz(polling);
    const Lane& lane = candidate.lanes[index * kLanes + bit];
    if (__atomic_load_n(lane.awaited, __ATOMIC_RELAXED) == lane.expected) each.polling ^= 1u << bit, each.ready |= 1u << bit;
  }
  return each.ready != 0;
}

// Run lengths of 1, up to 8, up to 64 or no limit: tight interleavings as well as warps that run far ahead.
int random_run_length() {
  static const uint32_t limits[] = {1, 8, 64, 1u << 30};
  return 1 + static_cast<int>(schedule.below(limits[schedule.below(4)]));
}

[[noreturn]] void fail_deadlock(const std::vector<std::unique_ptr<Block>>& blocks) {
  for (const auto& each : blocks) {
    for (size_t i = 0; i < each->lanes.size(); ++i) {
      const Warp& its_warp = each->warps[i / kLanes];
      const Lane& lane = each->lanes[i];
      block = each.get(), thread = static_cast<int>(i);
      if (its_warp.parked >> (i % kLanes) & 1) fail(lane.waits_at, "deadlock: waits for %s", lane.waits_for);
      if (its_warp.polling >> (i % kLanes) & 1)
        fail(lane.waits_at, "deadlock: waits for turn %d, and no earlier block can pass it", lane.expected);
    }
  }
  fail(Where(), "deadlock");
}

// How often copy engines work when warps could run too: never, as often as a warp, or first of all.
enum class Eagerness { kLast, kFair, kFirst };

struct Candidate {
  Block* block;
  int warp;  // or kEngine
};
constexpr int kEngine = -1;

void find_candidates(const std::vector<std::unique_ptr<Block>>& blocks, Eagerness eagerness, std::vector<Candidate>& candidates) {
  candidates.clear();
  const auto add_engines = [&] {
    for (const auto& each : blocks)
      if (each->engine.has_work()) candidates.push_back({each.get(), kEngine});
  };
  if (eagerness != Eagerness::kLast) add_engines();
  if (eagerness == Eagerness::kFirst && !candidates.empty()) return;
  for (const auto& each : blocks)
    for (int i = 0; i < static_cast<int>(each->warps.size()); ++i)
      if (is_runnable(*each, i)) candidates.push_back({each.get(), i});
  if (candidates.empty()) add_engines();
}

void run_warp(int index) {
  warp = &block->warps[index];
  warp->first_lane = static_cast<int>(schedule.below(kLanes));
  warp->meetings_left = random_run_length();
  thread = index * kLanes + next_ready_lane(*warp);
  switch_fiber(scheduler, this_lane().fiber.point);
}

void run_blocks(std::vector<std::unique_ptr<Block>>& blocks) {
  int next_index = 0;
  for (auto& each : blocks) start_block(*each, next_index++);
  const auto eagerness = static_cast<Eagerness>(schedule.below(3));
  std::vector<Candidate> candidates;
  while (!blocks.empty()) {
    find_candidates(blocks, eagerness, candidates);
    if (candidates.empty()) fail_deadlock(blocks);
    const Candidate chosen = candidates[schedule.below(static_cast<uint32_t>(candidates.size()))];
    block = chosen.block;
    if (chosen.warp == kEngine) {
      block->engine.work();
      continue;
    }
    run_warp(chosen.warp);
    if (failed) return;
    if (block->warps_exited < static_cast<int>(block->warps.size())) continue;
    if (const Landing* landing = block->engine.landing())
      fail(landing->region.where, "the block ends while this copy to its shared memory is under way");
    block->engine.finish();
    if (next_index < launch->grid) {
      start_block(*block, next_index++);
    } else {
      for (auto& each : blocks)
        if (each.get() == block) {
          each.swap(blocks.back());
          break;
        }
      blocks.pop_back();
    }
  }
}

bool is_same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

}  // namespace

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

// ---- launches -----------------------------------------------------------------------------------------------------------------------

int run(const Launch& new_launch, void (*kernel)(const void* params), const void* params) {
  launch = &new_launch;
  kernel_body = kernel;
  kernel_params = params;
  failed = false;
  schedule = Random(launch->seed);
  const int resident = launch->resident_blocks < launch->grid ? launch->resident_blocks : launch->grid;
  Stacks stacks(static_cast<size_t>(resident) * launch->threads);
  std::vector<std::unique_ptr<Block>> blocks;
  for (int i = 0; i < resident; ++i) {
    blocks.push_back(std::make_unique<Block>());
    blocks[i]->warps.resize(launch->threads / kLanes);
    blocks[i]->lanes.resize(launch->threads);
    for (int j = 0; j < launch->threads; ++j)
      blocks[i]->lanes[j].fiber.start(stacks[static_cast<size_t>(i) * launch->threads + j], Stacks::usable_bytes(), fiber_body);
  }
  try {
    run_blocks(blocks);
  } catch (const Failure&) {
    failed = true;
  }
  return failed;
}

}  // namespace twin
