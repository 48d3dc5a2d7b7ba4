#include "machine/shared_memory.h"

#include <cstring>

#include "machine/cluster.h"

namespace twin {

void SharedMemory::reset(uint32_t bytes_of_block, int num_blocks, int num_warps, bool detect_races) {
  bytes_of_block_ = bytes_of_block;
  window_bytes_ = (bytes_of_block + kPiece - 1) / kPiece * kPiece;
  num_blocks_ = num_blocks;
  bytes_.assign(num_blocks * window_bytes_, kPoison);
  shadow_.assign(bytes_.size() / kGranule, Shadow());
  pieces_.clear();
  readers_.clear();
  unfenced_.assign(num_warps * kLanes, {});
  accessor_.assign(num_warps, kNone);
  known_.assign(num_warps, Knowledge());
  visits_.assign(num_blocks * num_warps, Visit());
  arrived_.assign(num_blocks, Visit());
  fence_ = cluster_fence_ = 0;
  clock_ = kFirstTime;
  detect_races_ = detect_races;
  if (num_blocks > 1) begin_pieces();  // readers of several warps are remembered: a block's barrier is no barrier of all warps
}

unsigned char* SharedMemory::locate(Place place, int bytes, int alignment, Where where) {
  const uint32_t offset = place.address - kSharedBase;  // wraps to a large number below the base
  if (place.address % alignment != 0)
    fail(where, "shared access of %d bytes at offset %s is misaligned", bytes, name_of_offset(place).c_str());
  if (offset >= bytes_of_block_ || bytes_of_block_ - offset < static_cast<uint32_t>(bytes))
    fail(where, "shared access of %d bytes at offset %s; the block has %u bytes", bytes, name_of_offset(place).c_str(),
         bytes_of_block_);
  return bytes_.data() + offset_of(place);
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

bool SharedMemory::is_ordered(const Access& earlier, Kind kind, int thread, int granule) const {
  if (earlier.extent == kNobody || earlier.time < fence_) return true;
  const Knowledge& known = known_[thread / kLanes];
  if (earlier.extent == kSeveralWarps) {
    const auto readers = readers_.find(granule);
    if (readers == readers_.end()) return false;
    for (size_t warp = 0; warp < known_.size(); ++warp)
      if (readers->second[warp] >= known.until[reads_of(static_cast<int>(warp))]) return false;
    return true;
  }
  if (earlier.extent == kEngine) return earlier.time < known.until[engine_of(place_of(granule * kGranule).rank)];
  const int warp = earlier.thread / kLanes;
  if (earlier.time < known.until[kind == Kind::kRead ? reads_of(warp) : writes_of(warp)]) return true;
  return earlier.extent == kOneLane && earlier.thread == thread;
}

void SharedMemory::check_read(int thread, uint32_t offset, int bytes, Where where) {
  const int warp = thread / kLanes;
  for (int granule = first_granule(offset); granule < end_granule(offset, bytes); ++granule) {
    Shadow& shadow = shadow_[granule];
    if (shadow.copies_under_way) fail_race("reads", "is being copied to", shadow.write, granule * kGranule, where);
    if (shadow.is_barrier) fail_race("reads", "became a barrier", shadow.write, granule * kGranule, where);
    if (!is_ordered(shadow.write, Kind::kWrite, thread, granule))
      fail_race("reads", "was written", shadow.write, granule * kGranule, where);
    Access& read = shadow.read;
    uint16_t extent = kOneLane;
    if (!is_ordered(read, Kind::kRead, thread, granule)) {
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

void SharedMemory::check_write(int thread, uint32_t offset, int bytes, Where where, Kind told_of_writes) {
  for (int granule = first_granule(offset); granule < end_granule(offset, bytes); ++granule) {
    Shadow& shadow = shadow_[granule];
    if (shadow.copies_under_way) fail_race("writes", "is being copied to", shadow.write, granule * kGranule, where);
    if (shadow.is_barrier) fail_race("writes", "became a barrier", shadow.write, granule * kGranule, where);
    if (!is_ordered(shadow.write, told_of_writes, thread, granule))
      fail_race("writes", "was written", shadow.write, granule * kGranule, where);
    if (!is_ordered(shadow.read, Kind::kRead, thread, granule))
      fail_race("writes", "was read", shadow.read, granule * kGranule, where);
    shadow.write = access(thread, where);
  }
}

void SharedMemory::read(int thread, Place place, void* to, int bytes, Where where) {
  const unsigned char* from = locate(place, bytes, bytes, where);
  if (detect_races_) {
    const uint32_t offset = offset_of(place);
    note_accessor(thread);
    check_read(thread, offset, bytes, where);
    if (!pieces_.empty()) check_landed(thread, "reads", place, bytes, where);
  }
  std::memcpy(to, from, bytes);
}

void SharedMemory::write(int thread, Place place, const void* from, int bytes, Where where) {
  unsigned char* to = locate(place, bytes, bytes, where);
  if (detect_races_) {
    const uint32_t offset = offset_of(place);
    note_accessor(thread);
    check_write(thread, offset, bytes, where);
    if (!pieces_.empty()) note_ordinary_write(thread, offset, bytes, where);
  }
  std::memcpy(to, from, bytes);
}

void SharedMemory::begin_copy(int thread, Place place, int bytes, Where where) {
  unsigned char* to = locate(place, bytes, bytes, where);
  const uint32_t offset = offset_of(place);
  if (detect_races_) {
    check_write(thread, offset, bytes, where);
    for (int granule = first_granule(offset); granule < end_granule(offset, bytes); ++granule)
      ++shadow_[granule].copies_under_way;
  }
  std::memset(to, kPoison, bytes);
}

void SharedMemory::land_copy(int thread, Place place, const void* from, int bytes, Where where) {
  unsigned char* to = locate(place, bytes, bytes, where);
  const uint32_t offset = offset_of(place);
  if (detect_races_) {
    for (int granule = first_granule(offset); granule < end_granule(offset, bytes); ++granule)
      --shadow_[granule].copies_under_way;
    note_accessor(thread);
    check_write(thread, offset, bytes, where);
  }
  std::memcpy(to, from, bytes);
}

void SharedMemory::begin_sending(int thread, Place place, Where where) { begin_copy(thread, place, sizeof(uint32_t), where); }

void SharedMemory::end_sending(Place place, uint32_t word) {
  std::memcpy(bytes_.data() + offset_of(place), &word, sizeof word);
  if (!detect_races_) return;
  const uint32_t offset = offset_of(place);
  for (int granule = first_granule(offset); granule < end_granule(offset, sizeof word); ++granule) {
    --shadow_[granule].copies_under_way;
    shadow_[granule].write.extent = kEngine;
    shadow_[granule].write.time = clock_;
  }
}

// ---- knowledge ----------------------------------------------------------------------------------------------------------------------

void SharedMemory::note_accessor(int thread) {
  int& accessor = accessor_[thread / kLanes];
  accessor = accessor == kNone || accessor == thread ? thread : kSeveral;
}

void SharedMemory::warp_barrier(int warp) {
  known_[warp].know_accesses_of(warp, ++clock_);
  accessor_[warp] = kNone;
}

void SharedMemory::barrier_of_warps(int first, int end) {
  ++clock_;
  Knowledge all;
  for (int warp = first; warp < end; ++warp) all.join(known_[warp]);
  for (int warp = first; warp < end; ++warp) all.know_accesses_of(warp, clock_);
  for (int warp = first; warp < end; ++warp) {
    known_[warp] = all;
    accessor_[warp] = kNone;
  }
  if (end - first == static_cast<int>(known_.size())) fence_ = clock_;
}

void SharedMemory::cluster_barrier() {
  ++clock_;
  Knowledge all;
  for (const Knowledge& known : known_) all.join(known);
  const int num_warps = static_cast<int>(known_.size());
  for (int warp = 0; warp < num_warps; ++warp) all.until[reads_of(warp)] = clock_;
  for (int warp = 0; warp < num_warps; ++warp) known_[warp].join_ends_of_reads(all, rank_of(warp));
  cluster_fence_ = clock_;
}

// Without a warp barrier a thread can only speak for itself.
Knowledge SharedMemory::told_by_thread(int thread) {
  const int warp = thread / kLanes;
  Knowledge told = known_[warp];
  ++clock_;
  if (accessor_[warp] == kNone || accessor_[warp] == thread) told.know_accesses_of(warp, clock_);
  told.until[background_of(warp)] = clock_;
  return told;
}

Knowledge SharedMemory::told_by_warp(int warp) {
  warp_barrier(warp);
  known_[warp].until[background_of(warp)] = clock_;
  return known_[warp];
}

// ---- blocks of a cluster that reach each other --------------------------------------------------------------------------------------

void SharedMemory::check_begun(int thread, int rank, Where where) const {
  if (!detect_races_) return;
  const Knowledge& known = known_[thread / kLanes];
  for (int warp = first_warp_of(rank); warp < first_warp_of(rank + 1); ++warp)
    for (const int agent : {reads_of(warp), background_of(warp)})
      if (known.until[agent] > kFirstTime) return;
  fail(where, "reaches into block %d with no barrier of the cluster since it began", index_of_block(rank));
}

// From here on the visit passes from warp to warp as a read in the background does that has ended.
void SharedMemory::note_visit(int thread, int rank, Where where) {
  const int warp = thread / kLanes;
  visits_[rank * known_.size() + warp] = {clock_, where};
  known_[warp].until[background_of(warp)] = ++clock_;
}

Knowledge SharedMemory::known_to_block(int rank) const {
  Knowledge all;
  for (int warp = first_warp_of(rank); warp < first_warp_of(rank + 1); ++warp) all.join(known_[warp]);
  return all;
}

void SharedMemory::check_end_of_block(int rank) const {
  if (num_blocks_ == 1 || !detect_races_) return;
  const Knowledge known = known_to_block(rank);
  for (size_t warp = 0; warp < known_.size(); ++warp) {
    const Visit& visit = visits_[rank * known_.size() + warp];
    if (visit.time >= known.until[background_of(static_cast<int>(warp))])
      fail(visit.where, "race: the block leaves the kernel, with no barrier after this access of %s to its shared memory",
           name_of_thread(static_cast<int>(warp) * kLanes).c_str());
  }
  if (arrived_[rank].time >= known.until[engine_of(rank)])
    fail(arrived_[rank].where, "race: the block leaves the kernel, with no wait for this copy to its shared memory");
}

void SharedMemory::fail_race(const char* verb, const char* earlier_verb, const Access& earlier, uint32_t offset, Where where) const {
  fail(where, "race: this thread %s shared offset %s, which %s by %s at %s:%d with no barrier in between", verb,
       name_of_offset(place_of(offset)).c_str(), earlier_verb, name_of_thread(earlier.thread).c_str(), earlier.file, earlier.line);
}

}  // namespace twin
