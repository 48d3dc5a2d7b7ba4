#include "machine/copy_engine.h"

#include <cstring>

#include "machine/cluster.h"

namespace twin {
namespace {

constexpr uint64_t kMark = 0x70616d2d6e697774;  // "twin-map"
constexpr int kLineBytes = 128;
constexpr int kPieceBytes = 16;
constexpr int kElementBytes = 2;
constexpr int kBoxColumns = kLineBytes / kElementBytes;

Map decode(const void* map, Where where) {
  Map decoded;
  std::memcpy(&decoded, map, sizeof decoded);
  if (decoded.mark != kMark) fail(where, "this is no tensor map");
  return decoded;
}

// The 128-byte swizzle acts on the bits of the final address.
Place swizzled(Place place) { return {place.rank, place.address ^ (place.address >> 7 & 7) << 4}; }

bool is_inside(int index, uint64_t size) { return index >= 0 && static_cast<uint64_t>(index) < size; }

// At most 128 bytes that lie together in global memory, and in shared memory but for the swizzle.
struct Line {
  Place place;
  int bytes;
  char* global;
  int bytes_in_array;  // the others are zeros, or are not written
};

template <class Visitor>
void for_each_line_of_box(const Region& region, Visitor visit) {
  const Map& map = region.map;
  const bool is_inside_array =
      is_inside(region.column, map.sizes[0]) && is_inside(region.head, map.sizes[2]) && is_inside(region.batch, map.sizes[3]);
  for (int i = 0; i < static_cast<int>(map.box_rows); ++i) {
    const int row = region.row + i;
    uint64_t columns = 0;
    if (is_inside_array && is_inside(row, map.sizes[1])) {
      columns = map.sizes[0] - region.column;
      if (columns > kBoxColumns) columns = kBoxColumns;
    }
    const uint64_t global = map.base + static_cast<uint64_t>(region.column) * kElementBytes + row * map.strides[0] +
                            region.head * map.strides[1] + region.batch * map.strides[2];
    visit(Line{region.place + i * kLineBytes, kLineBytes, reinterpret_cast<char*>(global), static_cast<int>(columns) * kElementBytes});
  }
}

template <class Visitor>
void for_each_line(const Region& region, Visitor visit) {
  if (region.is_box) return for_each_line_of_box(region, visit);
  for (int at = 0; at < region.bytes; at += kLineBytes) {
    const int bytes = region.bytes - at < kLineBytes ? region.bytes - at : kLineBytes;
    visit(Line{region.place + at, bytes, region.global + at, bytes});
  }
}

// Calls visit(place, byte of the line) for each 16 bytes of a line in shared memory.
template <class Visitor>
void for_each_piece(const Region& region, const Line& line, Visitor visit) {
  for (int at = 0; at < line.bytes; at += kPieceBytes) visit(region.is_box ? swizzled(line.place + at) : line.place + at, at);
}

Region box(Place place, const void* map, int column, int row, int head, int batch, Where where) {
  if (place.address % kLineBytes != 0)
    fail(where, "a box at shared offset %s, which is no multiple of 128", name_of_offset(place).c_str());
  const Map decoded = decode(map, where);
  const int bytes = static_cast<int>(decoded.box_rows) * kLineBytes;
  return {place, thread, where, bytes, true, decoded, column, row, head, batch, nullptr};
}

Region plain_bytes(uint32_t address, const void* global, int bytes, Where where) {
  if (address % kPieceBytes || reinterpret_cast<uint64_t>(global) % kPieceBytes || bytes % kPieceBytes || bytes <= 0)
    fail(where, "a copy of %d bytes between shared offset %s and %p: multiples of 16 are needed", bytes,
         name_of_offset(here(address)).c_str(), global);
  return {here(address), thread, where, bytes, false, Map(), 0, 0, 0, 0, const_cast<char*>(static_cast<const char*>(global))};
}

void add_floats(char* global, const unsigned char* bytes, int count) {
  for (int at = 0; at < count; at += 4) {
    float sum, addend;
    std::memcpy(&sum, global + at, 4);
    std::memcpy(&addend, bytes + at, 4);
    sum += addend;
    std::memcpy(global + at, &sum, 4);
  }
}

}  // namespace

void CopyEngine::reset(int num_threads) {
  landings_.clear();
  departures_.clear();
  groups_committed_.assign(num_threads, 0);
}

bool CopyEngine::has_work() const {
  if (!landings_.empty()) return true;
  for (const Departure& departure : departures_)
    if (!departure.has_been_read || departure.was_waited_for) return true;
  return false;
}

void CopyEngine::work() {
  const uint32_t chosen = schedule.below(static_cast<uint32_t>(landings_.size() + departures_.size()));
  if (chosen < landings_.size()) {
    const Landing landing = landings_[chosen];
    landings_.erase(landings_.begin() + chosen);
    land(landing);
    return;
  }
  const auto departure = departures_.begin() + (chosen - landings_.size());
  if (!departure->has_been_read) {
    read(*departure);
  } else if (departure->was_waited_for) {
    write(*departure);
    departures_.erase(departure);
  }
}

void CopyEngine::finish() {
  for (Departure& departure : departures_) write(departure);
  departures_.clear();
}

void CopyEngine::begin_landing(const Region& region, Place barrier) {
  cluster->shared.begin_landing(region.thread, region.place, region.bytes, region.where);
  landings_.push_back({region, barrier});
}

void CopyEngine::begin_sending(Place place, uint32_t word, Place barrier, Where where) {
  cluster->shared.begin_sending(thread, place, where);
  const Region region{place, thread, where, sizeof word, false, Map(), 0, 0, 0, 0, nullptr};
  landings_.push_back({region, barrier, true, word});
}

void CopyEngine::begin_departure(const Region& region, Effect effect) {
  cluster->shared.begin_background_read(region.thread, region.place, region.bytes, region.where);
  Departure departure{};
  departure.region = region;
  departure.effect = effect;
  departure.group = groups_committed_[region.thread];
  departures_.push_back(std::move(departure));
}

void CopyEngine::wait_until_read(int thread, int pending_groups) {
  for (Departure& departure : departures_) {
    const Region& region = departure.region;
    if (region.thread != thread || departure.was_waited_for || departure.group >= groups_committed_[thread] - pending_groups) continue;
    if (!departure.has_been_read) read(departure);
    departure.was_waited_for = true;
    cluster->shared.end_background_read(thread / kLanes, region.place, region.bytes);
  }
}

void CopyEngine::wait_until_written(int waiting) {
  wait_until_read(waiting, 0);
  std::vector<Departure> others;
  for (Departure& departure : departures_) {
    if (departure.region.thread == waiting && departure.was_waited_for)
      write(departure);
    else
      others.push_back(std::move(departure));
  }
  departures_ = std::move(others);
  thread = waiting;
}

const Departure* CopyEngine::unread_departure_of(int thread) const {
  for (const Departure& departure : departures_)
    if (departure.region.thread == thread && !departure.was_waited_for) return &departure;
  return nullptr;
}

const Landing* CopyEngine::landing_in(int rank) const {
  for (const Landing& landing : landings_)
    if (landing.region.place.rank == rank) return &landing;
  return nullptr;
}

void CopyEngine::land(const Landing& landing) {
  if (landing.is_word)
    cluster->shared.end_sending(landing.region.place, landing.word);
  else
    land_copy(landing.region);
  complete_bytes(landing.barrier, landing.region.bytes);
}

void CopyEngine::land_copy(const Region& region) {
  thread = region.thread;
  for_each_line(region, [&](const Line& line) {
    unsigned char bytes[kLineBytes] = {};
    if (line.bytes_in_array) {
      check_global(line.global, line.bytes_in_array, kElementBytes, false, region.where);
      std::memcpy(bytes, line.global, line.bytes_in_array);
    }
    for_each_piece(region, line, [&](Place place, int at) { cluster->shared.land(place, bytes + at, kPieceBytes); });
  });
  cluster->shared.end_landing(region.place, region.bytes);
}

void CopyEngine::read(Departure& departure) {
  departure.has_been_read = true;
  departure.bytes.resize(departure.region.bytes);
  unsigned char* to = departure.bytes.data();
  for_each_line(departure.region, [&](const Line& line) {
    for_each_piece(departure.region, line, [&](Place place, int at) { cluster->shared.peek(place, to + at, kPieceBytes); });
    to += line.bytes;
  });
}

void CopyEngine::write(Departure& departure) {
  const Where where = departure.region.where;
  thread = departure.region.thread;
  const unsigned char* from = departure.bytes.data();
  for_each_line(departure.region, [&](const Line& line) {
    if (line.bytes_in_array) {
      check_global(line.global, line.bytes_in_array, kElementBytes, true, where);
      if (departure.effect == Effect::kAddFloats) {
        add_floats(line.global, from, line.bytes_in_array);
      } else {
        std::memcpy(line.global, from, line.bytes_in_array);
      }
    }
    from += line.bytes;
  });
}

// ---- called by the kernel's threads -------------------------------------------------------------------------------------------------

void check_map(const void* map, Where where) { decode(map, where); }

void copy_box_to_shared(uint32_t address, const void* map, uint32_t barrier, int column, int row, int head, int batch, Where where) {
  check_barrier_for_copy(here(barrier), where);
  cluster->engine.begin_landing(box(here(address), map, column, row, head, batch, where), here(barrier));
}
void send_word(uint32_t cluster_address, uint32_t word, uint32_t cluster_barrier, Where where) {
  const Place place = place_in_cluster(cluster_address), barrier = place_in_cluster(cluster_barrier);
  check_reach(place.rank, where);
  if (barrier.rank != place.rank)
    fail(where, "a word for the block of rank %d, and a barrier of rank %d", place.rank, barrier.rank);
  check_barrier_for_copy(barrier, where);
  cluster->engine.begin_sending(place, word, barrier, where);
}
// The copies land one by one, as the blocks' memories may be written at different moments.
void copy_box_to_cluster(uint32_t address, const void* map, uint32_t barrier, int column, int row, int head, int batch,
                         uint32_t ranks, Where where) {
  if (ranks == 0) fail(where, "a copy to no block of the cluster");
  for (int rank = 0; ranks >> rank; ++rank) {
    if ((ranks >> rank & 1) == 0) continue;
    check_reach(rank, where);
    const Place its_barrier{rank, here(barrier).address};
    check_barrier_for_copy(its_barrier, where);
    cluster->engine.begin_landing(box({rank, here(address).address}, map, column, row, head, batch, where), its_barrier);
  }
}
void copy_bytes_to_shared(uint32_t address, const void* global, int bytes, uint32_t barrier, Where where) {
  check_barrier_for_copy(here(barrier), where);
  cluster->engine.begin_landing(plain_bytes(address, global, bytes, where), here(barrier));
}
void copy_box_to_global(const void* map, uint32_t address, int column, int row, int head, int batch, Where where) {
  cluster->engine.begin_departure(box(here(address), map, column, row, head, batch, where), Effect::kStore);
}
void copy_bytes_to_global(uint32_t address, void* global, int bytes, Where where) {
  cluster->engine.begin_departure(plain_bytes(address, global, bytes, where), Effect::kStore);
}
void add_floats_to_global(void* global, uint32_t address, int bytes, Where where) {
  cluster->engine.begin_departure(plain_bytes(address, global, bytes, where), Effect::kAddFloats);
}

void commit_departures() { cluster->engine.commit_departures(thread); }
void wait_until_read(int pending_groups) { cluster->engine.wait_until_read(thread, pending_groups); }
void wait_until_written() { cluster->engine.wait_until_written(thread); }
void fence_proxy() { cluster->shared.fence_proxy(thread); }

}  // namespace twin
