#include "machine/copy_engine.h"

#include <cstring>

#include "machine/block.h"

namespace twin {
namespace {

constexpr uint64_t kMark = 0x70616d2d6e697774;  // "twin-map"
constexpr int kRowBytes = 128;
constexpr int kPieceBytes = 16;
constexpr int kElementBytes = 2;
constexpr int kBoxColumns = kRowBytes / kElementBytes;

Map decode(const void* map, Where where) {
  Map decoded;
  std::memcpy(&decoded, map, sizeof decoded);
  if (decoded.mark != kMark) fail(where, "this is no tensor map");
  return decoded;
}

// The 128-byte swizzle acts on the bits of the final address.
uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

bool is_inside(int index, uint64_t size) { return index >= 0 && static_cast<uint64_t>(index) < size; }

// Calls visit(address in shared memory, address in global memory, bytes) for each row of the box; bytes inside of the array, at most 128.
template <class Visitor>
void for_each_row(const Box& box, Visitor visit) {
  const Map& map = box.map;
  const bool is_inside_array =
      is_inside(box.column, map.sizes[0]) && is_inside(box.head, map.sizes[2]) && is_inside(box.batch, map.sizes[3]);
  for (int i = 0; i < static_cast<int>(map.box_rows); ++i) {
    const int row = box.row + i;
    int columns = 0;
    if (is_inside_array && is_inside(row, map.sizes[1])) {
      const uint64_t left = map.sizes[0] - box.column;
      columns = left < kBoxColumns ? static_cast<int>(left) : kBoxColumns;
    }
    const uint64_t global = map.base + static_cast<uint64_t>(box.column) * kElementBytes + row * map.strides[0] +
                            box.head * map.strides[1] + box.batch * map.strides[2];
    visit(box.address + i * kRowBytes, reinterpret_cast<char*>(global), columns * kElementBytes);
  }
}

}  // namespace

int Box::bytes() const { return static_cast<int>(map.box_rows) * kRowBytes; }

void CopyEngine::reset(int num_threads) {
  landings_.clear();
  departures_.clear();
  groups_committed_.assign(num_threads, 0);
}

bool CopyEngine::has_work() const {
  if (!landings_.empty()) return true;
  for (const Departure& departure : departures_)
    if (!departure.has_been_read) return true;
  return false;
}

void CopyEngine::work() {
  const uint32_t chosen = schedule.below(static_cast<uint32_t>(landings_.size() + departures_.size()));
  if (chosen >= landings_.size()) {
    depart(departures_[chosen - landings_.size()]);
    return;
  }
  const Landing landing = landings_[chosen];
  landings_.erase(landings_.begin() + chosen);
  land(landing);
}

void CopyEngine::begin_landing(const Box& box, uint32_t barrier) {
  block->shared.begin_landing(box.thread, box.address, box.bytes(), box.where);
  landings_.push_back({box, barrier});
}

void CopyEngine::begin_departure(const Box& box) {
  block->shared.begin_background_read(box.thread, box.address, box.bytes(), box.where);
  departures_.push_back({box, groups_committed_[box.thread], false});
}

void CopyEngine::wait_for_departures(int thread) {
  for (size_t i = 0; i < departures_.size();) {
    Departure& departure = departures_[i];
    if (departure.box.thread != thread || departure.group >= groups_committed_[thread]) {
      ++i;
      continue;
    }
    depart(departure);
    block->shared.end_background_read(thread / kLanes, departure.box.address, departure.box.bytes());
    departures_.erase(departures_.begin() + i);
  }
}

const Departure* CopyEngine::departure_of(int thread) const {
  for (const Departure& departure : departures_)
    if (departure.box.thread == thread) return &departure;
  return nullptr;
}

void CopyEngine::land(const Landing& landing) {
  thread = landing.box.thread;
  for_each_row(landing.box, [&](uint32_t address, const char* global, int bytes) {
    unsigned char row[kRowBytes] = {};
    if (bytes) check_global(global, bytes, kElementBytes, false, landing.box.where);
    if (bytes) std::memcpy(row, global, bytes);
    for (int at = 0; at < kRowBytes; at += kPieceBytes) block->shared.land(swizzled(address + at), row + at, kPieceBytes);
  });
  block->shared.end_landing(landing.box.address, landing.box.bytes());
  complete_bytes(block->barriers.in_shared_memory.at(landing.barrier), landing.box.bytes());
}

void CopyEngine::depart(Departure& departure) {
  if (departure.has_been_read) return;
  departure.has_been_read = true;
  thread = departure.box.thread;
  for_each_row(departure.box, [&](uint32_t address, char* global, int bytes) {
    unsigned char row[kRowBytes];
    for (int at = 0; at < kRowBytes; at += kPieceBytes) block->shared.peek(swizzled(address + at), row + at, kPieceBytes);
    if (bytes) check_global(global, bytes, kElementBytes, true, departure.box.where);
    if (bytes) std::memcpy(global, row, bytes);
  });
}

// ---- called by the kernel's threads -------------------------------------------------------------------------------------------------

void check_map(const void* map, Where where) { decode(map, where); }

void copy_box_to_shared(uint32_t address, const void* map, uint32_t barrier, int column, int row, int head, int batch, Where where) {
  if (address % kRowBytes != 0) fail(where, "a box goes to shared offset %u, which is no multiple of 128", address - kSharedBase);
  barrier_for_copy(barrier, where);
  block->engine.begin_landing({decode(map, where), address, column, row, head, batch, thread, where}, barrier);
}

void copy_box_to_global(const void* map, uint32_t address, int column, int row, int head, int batch, Where where) {
  if (address % kRowBytes != 0) fail(where, "a box leaves shared offset %u, which is no multiple of 128", address - kSharedBase);
  block->engine.begin_departure({decode(map, where), address, column, row, head, batch, thread, where});
}

void commit_boxes() { block->engine.commit_departures(thread); }
void wait_until_boxes_are_read() { block->engine.wait_for_departures(thread); }
void fence_proxy() { block->shared.fence_proxy(thread); }

}  // namespace twin
