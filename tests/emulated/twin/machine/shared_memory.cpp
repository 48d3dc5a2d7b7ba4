#include "machine/shared_memory.h"

#include <cstring>

namespace twin {
namespace {

constexpr unsigned char kPoison = 0xff;
constexpr int kGranule = 2;  // the smallest access that a kernel makes

int first_granule(uint32_t offset) { return static_cast<int>(offset / kGranule); }
int end_granule(uint32_t offset, int bytes) { return static_cast<int>((offset + bytes) / kGranule); }

}  // namespace

void SharedMemory::reset(uint32_t bytes, int num_warps, bool detect_races) {
  bytes_.assign(bytes, kPoison);
  shadow_.assign(bytes / kGranule, Shadow());
  warp_fence_.assign(num_warps, 0);
  block_fence_ = clock_ = 0;
  detect_races_ = detect_races;
}

unsigned char* SharedMemory::locate(uint32_t address, int bytes, Where where) {
  const uint32_t size = static_cast<uint32_t>(bytes_.size());
  const uint32_t offset = address - kSharedBase;  // wraps to a large number below the base
  if (offset >= size || size - offset < static_cast<uint32_t>(bytes))
    fail(where, "shared access of %d bytes at offset %d; the block has %u bytes", bytes, static_cast<int>(offset), size);
  if (address % bytes != 0) fail(where, "shared access of %d bytes at offset %u is misaligned", bytes, offset);
  return bytes_.data() + offset;
}

bool SharedMemory::is_ordered(const Access& earlier, int thread) const {
  if (earlier.extent == kNobody || earlier.time < block_fence_) return true;
  if (earlier.extent == kSeveralWarps || earlier.thread / kLanes != thread / kLanes) return false;
  if (earlier.time < warp_fence_[thread / kLanes]) return true;
  return earlier.extent == kOneLane && earlier.thread == thread;
}

void SharedMemory::check_read(int thread, uint32_t offset, int bytes, Where where) {
  for (int granule = first_granule(offset); granule < end_granule(offset, bytes); ++granule) {
    Shadow& shadow = shadow_[granule];
    if (shadow.copies_under_way) fail_race("reads", "is being copied to", shadow.write, granule * kGranule, where);
    if (!is_ordered(shadow.write, thread)) fail_race("reads", "was written", shadow.write, granule * kGranule, where);
    Access& read = shadow.read;
    if (read.extent == kNobody || read.time < block_fence_) {
      read.extent = kOneLane;
    } else if (read.thread / kLanes != thread / kLanes) {
      read.extent = kSeveralWarps;
    } else if (read.extent != kSeveralWarps) {
      const bool alone = read.time < warp_fence_[thread / kLanes] || (read.extent == kOneLane && read.thread == thread);
      read.extent = alone ? kOneLane : kLanesOfOneWarp;
    }
    read.file = where.file;
    read.line = static_cast<uint16_t>(where.line);
    read.thread = static_cast<uint16_t>(thread);
    read.time = clock_;
  }
}

void SharedMemory::check_write(int thread, uint32_t offset, int bytes, Where where) {
  for (int granule = first_granule(offset); granule < end_granule(offset, bytes); ++granule) {
    Shadow& shadow = shadow_[granule];
    if (shadow.copies_under_way) fail_race("writes", "is being copied to", shadow.write, granule * kGranule, where);
    if (!is_ordered(shadow.write, thread)) fail_race("writes", "was written", shadow.write, granule * kGranule, where);
    if (!is_ordered(shadow.read, thread)) fail_race("writes", "was read", shadow.read, granule * kGranule, where);
    shadow.write.extent = kOneLane;
    shadow.write.file = where.file;
    shadow.write.line = static_cast<uint16_t>(where.line);
    shadow.write.thread = static_cast<uint16_t>(thread);
    shadow.write.time = clock_;
  }
}

void SharedMemory::read(int thread, uint32_t address, void* to, int bytes, Where where) {
  const unsigned char* from = locate(address, bytes, where);
  if (detect_races_) check_read(thread, address - kSharedBase, bytes, where);
  std::memcpy(to, from, bytes);
}

void SharedMemory::write(int thread, uint32_t address, const void* from, int bytes, Where where) {
  unsigned char* to = locate(address, bytes, where);
  if (detect_races_) check_write(thread, address - kSharedBase, bytes, where);
  std::memcpy(to, from, bytes);
}

void SharedMemory::begin_copy(int thread, uint32_t address, int bytes, Where where) {
  unsigned char* to = locate(address, bytes, where);
  const uint32_t offset = address - kSharedBase;
  if (detect_races_) {
    check_write(thread, offset, bytes, where);
    for (int granule = first_granule(offset); granule < end_granule(offset, bytes); ++granule)
      ++shadow_[granule].copies_under_way;
  }
  std::memset(to, kPoison, bytes);
}

void SharedMemory::land_copy(int thread, uint32_t address, const void* from, int bytes, Where where) {
  unsigned char* to = locate(address, bytes, where);
  const uint32_t offset = address - kSharedBase;
  if (detect_races_) {
    for (int granule = first_granule(offset); granule < end_granule(offset, bytes); ++granule)
      --shadow_[granule].copies_under_way;
    check_write(thread, offset, bytes, where);
  }
  std::memcpy(to, from, bytes);
}

void SharedMemory::fail_race(const char* verb, const char* earlier_verb, const Access& earlier, uint32_t offset, Where where) {
  fail(where, "race: this thread %s shared offset %u, which %s by warp %d lane %d at %s:%d with no barrier in between", verb,
       offset, earlier_verb, earlier.thread / kLanes, earlier.thread % kLanes, earlier.file, earlier.line);
}

}  // namespace twin
