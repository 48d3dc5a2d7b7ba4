#include "machine/shared_memory.h"

#include <cstring>

namespace twin {
void SharedMemory::reset(uint32_t bytes, int num_warps, bool detect_races) {
  bytes_.assign(bytes, kPoison);
  shadow_.assign(bytes / kGranule, Shadow());
  pieces_.clear();
  readers_.clear();
  unfenced_.assign(num_warps * kLanes, {});
  accessor_.assign(num_warps, kNone);
  known_.assign(num_warps, Knowledge());
  block_fence_ = 0;
  clock_ = 1;
  detect_races_ = detect_races;
}

unsigned char* SharedMemory::locate(uint32_t address, int bytes, int alignment, Where where) {
  const uint32_t size = static_cast<uint32_t>(bytes_.size());
  const uint32_t offset = address - kSharedBase;  // wraps to a large number below the base
  if (address % alignment != 0) fail(where, "shared access of %d bytes at offset %d is misaligned", bytes, static_cast<int>(offset));
  if (offset >= size || size - offset < static_cast<uint32_t>(bytes))
    fail(where, "shared access of %d bytes at offset %d; the block has %u bytes", bytes, static_cast<int>(offset), size);
  return bytes_.data() + offset;
}

SharedMemory::Access SharedMemory::access(int thread, Where where) const {
  Access access;
  access.extent = kOneLane;
  access.file = where.file;
  access.line = static_cast<uint16_t>(where.line);
  access.thread = static_cast<uint16_t>(thread);
  access.time = clock_;
  return access;
}

bool SharedMemory::is_ordered(const Access& earlier, int thread, int granule) const {
  if (earlier.extent == kNobody || earlier.time < block_fence_) return true;
  const Knowledge& known = known_[thread / kLanes];
  if (earlier.extent == kSeveralWarps) {
    const auto readers = readers_.find(granule);
    if (readers == readers_.end()) return false;
    for (size_t warp = 0; warp < known_.size(); ++warp)
      if (readers->second[warp] >= known.until[warp]) return false;
    return true;
  }
  if (earlier.time < known.until[earlier.thread / kLanes]) return true;
  return earlier.extent == kOneLane && earlier.thread == thread;
}

void SharedMemory::check_read(int thread, uint32_t offset, int bytes, Where where) {
  const int warp = thread / kLanes;
  for (int granule = first_granule(offset); granule < end_granule(offset, bytes); ++granule) {
    Shadow& shadow = shadow_[granule];
    if (shadow.copies_under_way) fail_race("reads", "is being copied to", shadow.write, granule * kGranule, where);
    if (shadow.is_barrier) fail_race("reads", "became a barrier", shadow.write, granule * kGranule, where);
    if (!is_ordered(shadow.write, thread, granule)) fail_race("reads", "was written", shadow.write, granule * kGranule, where);
    Access& read = shadow.read;
    uint16_t extent = kOneLane;
    if (!is_ordered(read, thread, granule)) {
      const int earlier_warp = read.thread / kLanes;
      extent = read.extent == kSeveralWarps || earlier_warp != warp ? kSeveralWarps : kLanesOfOneWarp;
      if (extent == kSeveralWarps && !pieces_.empty()) {
        auto& readers = readers_[granule];
        if (read.extent != kSeveralWarps) readers = {}, readers[earlier_warp] = read.time;
        readers[warp] = clock_;
      }
    }
    read = access(thread, where);
    read.extent = extent;
  }
}

void SharedMemory::check_write(int thread, uint32_t offset, int bytes, Where where) {
  for (int granule = first_granule(offset); granule < end_granule(offset, bytes); ++granule) {
    Shadow& shadow = shadow_[granule];
    if (shadow.copies_under_way) fail_race("writes", "is being copied to", shadow.write, granule * kGranule, where);
    if (shadow.is_barrier) fail_race("writes", "became a barrier", shadow.write, granule * kGranule, where);
    if (!is_ordered(shadow.write, thread, granule)) fail_race("writes", "was written", shadow.write, granule * kGranule, where);
    if (!is_ordered(shadow.read, thread, granule)) fail_race("writes", "was read", shadow.read, granule * kGranule, where);
    shadow.write = access(thread, where);
  }
}

void SharedMemory::read(int thread, uint32_t address, void* to, int bytes, Where where) {
  const unsigned char* from = locate(address, bytes, bytes, where);
  if (detect_races_) {
    const uint32_t offset = address - kSharedBase;
    note_accessor(thread);
    check_read(thread, offset, bytes, where);
    if (!pieces_.empty()) check_landed(thread, "reads", offset, bytes, where);
  }
  std::memcpy(to, from, bytes);
}

void SharedMemory::write(int thread, uint32_t address, const void* from, int bytes, Where where) {
  unsigned char* to = locate(address, bytes, bytes, where);
  if (detect_races_) {
    const uint32_t offset = address - kSharedBase;
    note_accessor(thread);
    check_write(thread, offset, bytes, where);
    if (!pieces_.empty()) note_ordinary_write(thread, offset, bytes, where);
  }
  std::memcpy(to, from, bytes);
}

void SharedMemory::begin_copy(int thread, uint32_t address, int bytes, Where where) {
  unsigned char* to = locate(address, bytes, bytes, where);
  const uint32_t offset = address - kSharedBase;
  if (detect_races_) {
    check_write(thread, offset, bytes, where);
    for (int granule = first_granule(offset); granule < end_granule(offset, bytes); ++granule)
      ++shadow_[granule].copies_under_way;
  }
  std::memset(to, kPoison, bytes);
}

void SharedMemory::land_copy(int thread, uint32_t address, const void* from, int bytes, Where where) {
  unsigned char* to = locate(address, bytes, bytes, where);
  const uint32_t offset = address - kSharedBase;
  if (detect_races_) {
    for (int granule = first_granule(offset); granule < end_granule(offset, bytes); ++granule)
      --shadow_[granule].copies_under_way;
    note_accessor(thread);
    check_write(thread, offset, bytes, where);
  }
  std::memcpy(to, from, bytes);
}

// ---- knowledge ----------------------------------------------------------------------------------------------------------------------

void SharedMemory::note_accessor(int thread) {
  int& accessor = accessor_[thread / kLanes];
  accessor = accessor == kNone || accessor == thread ? thread : kSeveral;
}

void SharedMemory::warp_barrier(int warp) {
  known_[warp].until[warp] = ++clock_;
  accessor_[warp] = kNone;
}

void SharedMemory::block_barrier() {
  ++clock_;
  Knowledge all;
  for (const Knowledge& known : known_) all.join(known);
  for (size_t warp = 0; warp < known_.size(); ++warp) all.until[warp] = clock_;
  known_.assign(known_.size(), all);
  accessor_.assign(accessor_.size(), kNone);
  block_fence_ = clock_;
}

// Without a warp barrier a thread can only speak for itself.
Knowledge SharedMemory::told_by_thread(int thread) {
  const int warp = thread / kLanes;
  Knowledge told = known_[warp];
  ++clock_;
  if (accessor_[warp] == kNone || accessor_[warp] == thread) told.until[warp] = clock_;
  told.until[background_of(warp)] = clock_;
  return told;
}

Knowledge SharedMemory::told_by_warp(int warp) {
  warp_barrier(warp);
  known_[warp].until[background_of(warp)] = clock_;
  return known_[warp];
}

void SharedMemory::fail_race(const char* verb, const char* earlier_verb, const Access& earlier, uint32_t offset, Where where) const {
  fail(where, "race: this thread %s shared offset %u, which %s by warp %d lane %d at %s:%d with no barrier in between", verb,
       offset, earlier_verb, earlier.thread / kLanes, earlier.thread % kLanes, earlier.file, earlier.line);
}

}  // namespace twin
