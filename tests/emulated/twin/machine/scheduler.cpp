// Runs a grid: clusters start in the order of their index, as many interleaved as have `resident_blocks`; a seeded schedule decides
// which warp runs and how far it runs ahead before another one may.
#include <algorithm>
#include <cstdio>
#include <memory>
#include <sys/mman.h>
#include <vector>

#include "machine/cluster.h"

namespace twin {

const Launch* launch;
Cluster* cluster;
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
  if (const Departure* departure = cluster->engine.unread_departure_of(thread))
    fail(departure->region.where, "this thread leaves the kernel without a wait until its copy to global memory has read shared memory");
  warp->ready &= ~this_bit();
  warp->exited |= this_bit();
  if (warp->exited == kAllLanes) {
    check_products_at_exit();
    ++this_block().warps_exited;
    for (const Warp& other : cluster->warps) {
      if (other.waits_at == WarpBarrier::kOfBlock && other.rank == warp->rank)
        fail(other.where, "this warp leaves the kernel while others wait at a block barrier");
      if (other.waits_at == WarpBarrier::kOfCluster)
        fail(other.where, "this warp leaves the kernel while others wait at a cluster barrier");
    }
  }
  run_another_lane();
}

// Every fiber runs this: one kernel thread after another, as clusters come and go.
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

void start_cluster(Cluster& fresh, int index) {
  fresh.index = index;
  const int num_blocks = static_cast<int>(fresh.blocks.size()), num_warps = static_cast<int>(fresh.warps.size());
  fresh.shared.reset(launch->shared_bytes, num_blocks, num_warps, launch->detect_races);
  for (Block& each : fresh.blocks) {
    each = Block();
    each.registers.reset(warps_of_block());
  }
  for (int i = 0; i < num_warps; ++i) {
    fresh.warps[i] = Warp();
    fresh.warps[i].ready = kAllLanes;
    fresh.warps[i].rank = i / warps_of_block();
  }
  fresh.barriers.clear();
  fresh.engine.reset(static_cast<int>(fresh.lanes.size()));
  fresh.histories.assign((num_warps + kWarpsOfGroup - 1) / kWarpsOfGroup, {});
  for (Lane& lane : fresh.lanes) {
    lane.copies.clear();
    lane.groups_committed = 0;
  }
}

bool is_runnable(Cluster& candidate, int index) {
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

[[noreturn]] void fail_deadlock(const std::vector<std::unique_ptr<Cluster>>& clusters) {
  for (const auto& each : clusters) {
    for (size_t i = 0; i < each->lanes.size(); ++i) {
      const Warp& its_warp = each->warps[i / kLanes];
      const Lane& lane = each->lanes[i];
      cluster = each.get(), thread = static_cast<int>(i);
      if (its_warp.parked >> (i % kLanes) & 1) fail(lane.waits_at, "deadlock: waits for %s", lane.waits_for);
      if (its_warp.polling >> (i % kLanes) & 1)
        fail(lane.waits_at, "deadlock: waits for turn %d, and no earlier block can pass it", lane.expected);
    }
  }
  for (const auto& each : clusters)
    for (size_t i = 0; i < each->warps.size(); ++i) {
      const Warp& its_warp = each->warps[i];
      cluster = each.get(), thread = static_cast<int>(i) * kLanes;
      if (its_warp.waits_at == WarpBarrier::kOfCluster) fail(its_warp.where, "deadlock: waits for warps at a cluster barrier");
    }
  fail(Where(), "deadlock");
}

// How often copy engines work when warps could run too: never, as often as a warp, or first of all.
enum class Eagerness { kLast, kFair, kFirst };

struct Candidate {
  Cluster* cluster;
  int warp;  // or kEngine
};
constexpr int kEngine = -1;

void find_candidates(const std::vector<std::unique_ptr<Cluster>>& clusters, Eagerness eagerness,
                     std::vector<Candidate>& candidates) {
  candidates.clear();
  const auto add_engines = [&] {
    for (const auto& each : clusters)
      if (each->engine.has_work()) candidates.push_back({each.get(), kEngine});
  };
  if (eagerness != Eagerness::kLast) add_engines();
  if (eagerness == Eagerness::kFirst && !candidates.empty()) return;
  for (const auto& each : clusters)
    for (int i = 0; i < static_cast<int>(each->warps.size()); ++i)
      if (is_runnable(*each, i)) candidates.push_back({each.get(), i});
  if (candidates.empty()) add_engines();
}

void run_warp(int index) {
  warp = &cluster->warps[index];
  warp->first_lane = static_cast<int>(schedule.below(kLanes));
  warp->meetings_left = random_run_length();
  thread = index * kLanes + next_ready_lane(*warp);
  switch_fiber(scheduler, this_lane().fiber.point);
}

void end_block(int rank) {
  if (const Landing* landing = cluster->engine.landing_in(rank))
    fail(landing->region.where, "the block ends while this copy to its shared memory is under way");
  cluster->shared.check_end_of_block(rank);
}

void run_clusters(std::vector<std::unique_ptr<Cluster>>& clusters, int num_clusters) {
  int next_index = 0;
  for (auto& each : clusters) start_cluster(*each, next_index++);
  const auto eagerness = static_cast<Eagerness>(schedule.below(3));
  std::vector<Candidate> candidates;
  while (!clusters.empty()) {
    find_candidates(clusters, eagerness, candidates);
    if (candidates.empty()) fail_deadlock(clusters);
    const Candidate chosen = candidates[schedule.below(static_cast<uint32_t>(candidates.size()))];
    cluster = chosen.cluster;
    if (chosen.warp == kEngine) {
      cluster->engine.work();
      continue;
    }
    run_warp(chosen.warp);
    if (failed) return;
    if (!has_left(this_block())) continue;
    end_block(warp->rank);
    if (!std::all_of(cluster->blocks.begin(), cluster->blocks.end(), has_left)) continue;
    cluster->engine.finish();
    if (next_index < num_clusters) {
      start_cluster(*cluster, next_index++);
    } else {
      for (auto& each : clusters)
        if (each.get() == cluster) {
          each.swap(clusters.back());
          break;
        }
      clusters.pop_back();
    }
  }
}

// What the machine cannot run, in words, or null.
const char* unfit(int blocks_of_cluster) {
  if (launch->threads % kLanes != 0 || blocks_of_cluster * launch->threads > kMaxWarps * kLanes)
    return "the twin runs blocks of whole warps, at most 32 in a block or cluster";
  if (blocks_of_cluster < 1 || blocks_of_cluster > kMaxBlocks) return "a cluster has 1 to 8 blocks";
  if (launch->grid % blocks_of_cluster != 0) return "the grid is no multiple of the cluster's size";
  return nullptr;
}

std::unique_ptr<Cluster> made_cluster(int num_blocks, Stacks& stacks, size_t first_stack) {
  auto made = std::make_unique<Cluster>();
  const int threads = num_blocks * launch->threads;
  made->blocks.resize(num_blocks);
  made->warps.resize(threads / kLanes);
  made->lanes.resize(threads);
  for (int i = 0; i < threads; ++i) made->lanes[i].fiber.start(stacks[first_stack + i], Stacks::usable_bytes(), fiber_body);
  return made;
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

int run(const Launch& new_launch, int blocks_of_cluster, void (*kernel)(const void* params), const void* params) {
  launch = &new_launch;
  kernel_body = kernel;
  kernel_params = params;
  failed = false;
  if (const char* reason = unfit(blocks_of_cluster)) {
    snprintf(launch->message, launch->message_bytes, "%s", reason);
    return 1;
  }
  schedule = Random(launch->seed);
  const int num_clusters = launch->grid / blocks_of_cluster;
  const int resident = std::min((launch->resident_blocks + blocks_of_cluster - 1) / blocks_of_cluster, num_clusters);
  const size_t threads = static_cast<size_t>(blocks_of_cluster) * launch->threads;
  Stacks stacks(resident * threads);
  std::vector<std::unique_ptr<Cluster>> clusters;
  for (int i = 0; i < resident; ++i) clusters.push_back(made_cluster(blocks_of_cluster, stacks, i * threads));
  try {
    run_clusters(clusters, num_clusters);
  } catch (const Failure&) {
    failed = true;
  }
  return failed;
}

}  // namespace twin
