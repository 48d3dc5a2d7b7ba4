#include "machine/barriers.h"

#include "machine/cluster.h"

namespace twin {
namespace {

constexpr int kBarrierBytes = 8;
constexpr int kMaxArrivals = (1 << 20) - 1;
constexpr int kMaxBytes = (1 << 20) - 1;
constexpr int kRegistersOfBlock = 65536;
constexpr int kLargestEntry = 248;  // registers of a thread at the start of a small block

void wake(std::vector<int>& waiting) {
  for (const int each : waiting) unpark(each);
  waiting.clear();
}

Mbarrier& find(Place place, Where where) {
  const auto found = cluster->barriers.find(place);
  if (found == cluster->barriers.end()) fail(where, "there is no barrier at shared offset %s", name_of_offset(place).c_str());
  cluster->shared.check_barrier(thread, place, found->second.fenced_at, where);
  return found->second;
}

void end_phase_if_complete(Mbarrier& barrier) {
  if (barrier.missing_arrivals > 0 || barrier.missing_bytes != 0) return;
  ++barrier.phase;
  barrier.missing_arrivals = barrier.arrivals_of_phase;
  barrier.told = barrier.gathered;
  barrier.gathered = Knowledge();
  wake(barrier.waiting);
}

void arrive(Place place, int expected_bytes, Where where) {
  Mbarrier& barrier = find(place, where);
  if (barrier.missing_arrivals == 0)
    fail(where, "one arrival too many in a phase of the barrier at shared offset %s, which is for %d",
         name_of_offset(place).c_str(), barrier.arrivals_of_phase);
  if (expected_bytes > kMaxBytes) fail(where, "announces %d bytes; a barrier counts to %d", expected_bytes, kMaxBytes);
  --barrier.missing_arrivals;
  barrier.missing_bytes += expected_bytes;
  const Knowledge told = cluster->shared.told_by_thread(thread);
  if (place.rank == warp->rank)
    barrier.gathered.join(told);
  else
    barrier.gathered.join_ends_of_reads(told, place.rank);
  end_phase_if_complete(barrier);
}

struct Arrival {
  int id;
  int threads;
  bool waits;
  Where where;
  uint32_t use = 0;  // of the barrier that was arrived at
};

void complete(NamedBarrier& barrier) {
  for (const int each : barrier.waiting_warps) cluster->shared.learn(each, barrier.gathered);
  barrier.waiting_warps.clear();
  barrier.gathered = Knowledge();
  barrier.arrived = 0;
  ++barrier.use;
  wake(barrier.waiting);
}

// All lanes of a warp together.
void arrive_at_number(Arrival* const* lanes) {
  const Arrival& mine = *lanes[0];
  for (int lane = 1; lane < kLanes; ++lane)
    if (lanes[lane]->id != mine.id || lanes[lane]->threads != mine.threads)
      fail(mine.where, "lanes of a warp come to different named barriers: %d and %d", mine.id, lanes[lane]->id);
  if (mine.id < 1 || mine.id > 15) fail(mine.where, "named barrier %d: 1 to 15 are free", mine.id);
  if (mine.threads % kLanes != 0 || mine.threads <= 0) fail(mine.where, "a named barrier for %d threads", mine.threads);
  NamedBarrier& barrier = this_block().named_barriers[mine.id];
  if (barrier.arrived == 0) {
    barrier.threads = mine.threads;
    barrier.where = mine.where;
  } else if (barrier.threads != mine.threads) {
    fail(mine.where, "named barrier %d is for %d threads here, for %d at %s:%d", mine.id, mine.threads, barrier.threads,
         barrier.where.file, barrier.where.line);
  }
  barrier.arrived += kLanes;
  barrier.gathered.join(cluster->shared.told_by_warp(warp_index()));
  if (mine.waits) barrier.waiting_warps.push_back(warp_index());
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane]->use = barrier.use;
  if (barrier.arrived >= barrier.threads) complete(barrier);
}

struct Registers {
  int count;
  Where where;
};

int& registers_of_this_warp() { return this_block().registers.of_warp[warp_index() % warps_of_block()]; }

// Whether the request is one, and what the warp holds.
int& registers_of_warp(const Registers& wanted) {
  if (wanted.count % 8 != 0 || wanted.count < 24 || wanted.count > 256)
    fail(wanted.where, "%d registers: multiples of 8 from 24 to 256 can be asked for", wanted.count);
  return registers_of_this_warp();
}

void give(Registers* const* lanes) {
  const Registers& wanted = *lanes[0];
  int& mine = registers_of_warp(wanted);
  if (wanted.count > mine) fail(wanted.where, "lowers its registers from %d to %d", mine, wanted.count);
  RegisterPool& pool = this_block().registers;
  pool.free += (mine - wanted.count) * kLanes;
  mine = wanted.count;
  wake(pool.waiting);
}

void ask(Registers* const* lanes) {
  const Registers& wanted = *lanes[0];
  const int mine = registers_of_warp(wanted);
  if (wanted.count < mine) fail(wanted.where, "raises its registers from %d to %d", mine, wanted.count);
}

}  // namespace

// ---- mbarriers ----------------------------------------------------------------------------------------------------------------------

void init_barrier(uint32_t address, int arrivals, Where where) {
  if (arrivals < 1 || arrivals > kMaxArrivals) fail(where, "a barrier for %d arrivals", arrivals);
  cluster->shared.make_barrier(thread, here(address), kBarrierBytes, where);
  Mbarrier& barrier = cluster->barriers[here(address)];
  barrier = Mbarrier();
  barrier.arrivals_of_phase = barrier.missing_arrivals = arrivals;
  barrier.made_by = thread;
}

void fence_barrier_init() {
  for (auto& [place, barrier] : cluster->barriers)
    if (barrier.made_by == thread && !barrier.fenced_at) barrier.fenced_at = cluster->shared.now();
}

void arrive_at_barrier(uint32_t address, int expected_bytes, Where where) { arrive(here(address), expected_bytes, where); }

void arrive_in_cluster(uint32_t cluster_address, int expected_bytes, Where where) {
  const Place place = place_in_cluster(cluster_address);
  check_reach(place.rank, where);
  if (place.rank != warp->rank) cluster->shared.note_visit(thread, place.rank, where);
  arrive(place, expected_bytes, where);
}

void wait_for_phase(uint32_t address, uint32_t parity, Where where) {
  if (parity > 1) fail(where, "a phase of parity %u", parity);
  for (;;) {
    Mbarrier& barrier = find(here(address), where);
    if ((barrier.phase & 1) != parity) {
      cluster->shared.learn(warp_index(), barrier.told);
      return;
    }
    barrier.waiting.push_back(thread);
    park(where, "the end of phase %u of the barrier at shared offset %s, where %d of %d arrivals and %d bytes are missing",
         barrier.phase, name_of_offset(here(address)).c_str(), barrier.missing_arrivals, barrier.arrivals_of_phase, barrier.missing_bytes);
  }
}

void check_barrier_for_copy(Place barrier, Where where) {
  if (!find(barrier, where).fenced_at) fail(where, "the copy engine does not see this barrier: fence_barrier_init is missing");
}

void complete_bytes(Place place, int bytes) {
  Mbarrier& barrier = cluster->barriers.at(place);
  barrier.missing_bytes -= bytes;
  barrier.gathered.until[engine_of(place.rank)] = cluster->shared.told_by_engine();
  end_phase_if_complete(barrier);
}

// ---- barriers of the hardware -------------------------------------------------------------------------------------------------------

void named_barrier(int id, int threads, bool waits, Where where) {
  Arrival arrival{id, threads, waits, where};
  meet<Arrival, arrive_at_number>(waits ? "named_barrier_sync" : "named_barrier_arrive", arrival, where);
  NamedBarrier& barrier = this_block().named_barriers[id];
  while (waits && barrier.use == arrival.use) {
    barrier.waiting.push_back(thread);
    park(where, "named barrier %d, where %d of %d threads are missing", id, threads - barrier.arrived, threads);
  }
}

// ---- registers ----------------------------------------------------------------------------------------------------------------------

void RegisterPool::reset(int num_warps) {
  const int threads = num_warps * kLanes;
  const int entry = kRegistersOfBlock / threads / 8 * 8 < kLargestEntry ? kRegistersOfBlock / threads / 8 * 8 : kLargestEntry;
  of_warp.assign(num_warps, entry);
  free = 0;
  waiting.clear();
}

void lower_registers(int count, Where where) {
  Registers wanted{count, where};
  meet<Registers, give>("lower_registers", wanted, where);
}

void raise_registers(int count, Where where) {
  Registers wanted{count, where};
  meet<Registers, ask>("raise_registers", wanted, where);
  RegisterPool& pool = this_block().registers;
  for (int& mine = registers_of_this_warp(); mine != count;) {
    const int missing = (count - mine) * kLanes;
    if (missing <= pool.free) {
      pool.free -= missing;
      mine = count;  // of all lanes
    } else {
      pool.waiting.push_back(thread);
      park(where, "%d registers; %d are free", missing, pool.free);
    }
  }
}

}  // namespace twin
