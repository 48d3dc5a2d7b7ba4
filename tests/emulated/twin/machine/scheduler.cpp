// Runs a grid: blocks start in the order of their index, `resident_blocks` of them interleaved; a seeded schedule decides which warp runs
// and how far it runs ahead before another one may.
#include <cstdio>
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

int next_ready_lane(const Warp& warp) {
  const uint32_t later = warp.ready & (kAllLanes << warp.first_lane);
  return __builtin_ctz(later ? later : warp.ready);
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

}  // namespace

void switch_to_scheduler() { switch_fiber(this_lane().fiber.point, scheduler); }

void run_another_lane() {
  Lane& mine = this_lane();
  if (warp->ready == 0) {
    switch_fiber(mine.fiber.point, scheduler);
    return;
  }
  thread = thread / kLanes * kLanes + next_ready_lane(*warp);
  switch_fiber(mine.fiber.point, this_lane().fiber.point);
}

// ---- launches -----------------------------------------------------------------------------------------------------------------------

int run(const Launch& new_launch, void (*kernel)(const void* params), const void* params) {
  launch = &new_launch;
  kernel_body = kernel;
  kernel_params = params;
  failed = false;
  if (launch->threads % kLanes != 0 || launch->threads > kMaxWarps * kLanes) {
    snprintf(launch->message, launch->message_bytes, "the twin runs blocks of whole warps, at most %d", kMaxWarps);
    return 1;
  }
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
