// The part of SharedMemory that copies and products go through, in pieces of 16 bytes.
#include <cstring>

#include "machine/cluster.h"

namespace twin {

// Ordinary writes from before count as not fenced.
void SharedMemory::begin_pieces() {
  if (!pieces_.empty() || !detect_races_) return;
  pieces_.resize(bytes_.size() / kPiece);
  background_reads_.assign(pieces_.size() * known_.size(), 0);
  for (size_t granule = 0; granule < shadow_.size(); ++granule) {
    const Access& write = shadow_[granule].write;
    if (write.extent == kNobody || shadow_[granule].is_barrier) continue;
    const int index = static_cast<int>(granule) * kGranule / kPiece;
    pieces_[index].was_written = true;
    ++pieces_[index].unfenced_writes;
    unfenced_[write.thread].push_back(index);
  }
}

void SharedMemory::check_ordered_with_background(int thread, const char* verb, int index, Where where) const {
  if (pieces_[index].landings_under_way) fail_background(verb, "is being copied to", index, where);
  if (pieces_[index].reads_under_way) fail_background(verb, "has still to be read", index, where);
  const Knowledge& known = known_[thread / kLanes];
  const Time* const reads = &background_reads_[index * known_.size()];
  for (size_t warp = 0; warp < known_.size(); ++warp)
    if (reads[warp] >= known.until[background_of(static_cast<int>(warp))])
      fail_background(verb, "was read, with no barrier in between,", index, where);
}

void SharedMemory::check_landed(int thread, const char* verb, Place place, int bytes, Where where) const {
  const uint32_t offset = offset_of(place);
  for (int index = first_piece(offset); index < end_piece(offset, bytes); ++index) {
    const Piece& piece = pieces_[index];
    if (piece.landings_under_way) fail_background(verb, "is being copied to", index, where);
    if (piece.landed >= known_[thread / kLanes].until[engine_of(place.rank)])
      fail_background(verb, "was copied to, with no wait for its barrier,", index, where);
  }
}

void SharedMemory::check_fenced(int index, const char* verb, Where where) const {
  const int begin = index * kPiece / kGranule;
  for (int granule = begin; granule < begin + kPiece / kGranule; ++granule) {
    const Access& write = shadow_[granule].write;
    if (write.extent == kNobody) continue;
    fail(where, "missing proxy fence: this thread %s shared offset %s, which %s wrote at %s:%d", verb,
         name_of_offset(place_of(index * kPiece)).c_str(), name_of_thread(write.thread).c_str(), write.file, write.line);
  }
}

void SharedMemory::note_ordinary_write(int thread, uint32_t offset, int bytes, Where where) {
  for (int index = first_piece(offset); index < end_piece(offset, bytes); ++index) {
    Piece& piece = pieces_[index];
    check_ordered_with_background(thread, "writes", index, where);
    piece.was_written = true;
    ++piece.unfenced_writes;
    unfenced_[thread].push_back(index);
  }
}

void SharedMemory::begin_landing(int thread, Place place, int bytes, Where where) {
  begin_pieces();
  unsigned char* to = locate(place, bytes, kPiece, where);
  if (detect_races_) {
    const uint32_t offset = offset_of(place);
    for (int index = first_piece(offset); index < end_piece(offset, bytes); ++index) {
      Piece& piece = pieces_[index];
      check_ordered_with_background(thread, "copies to", index, where);
      if (piece.unfenced_writes) check_fenced(index, "copies to", where);
      piece.was_written = false;
      piece.where = where;
      ++piece.landings_under_way;
    }
    // Writes that their threads have fenced have been done: whoever learns that reads after them have ended may copy there.
    check_write(thread, offset, bytes, where, Kind::kRead);
    for (int granule = first_granule(offset); granule < end_granule(offset, bytes); ++granule) shadow_[granule].write = Access();
  }
  std::memset(to, kPoison, bytes);
}

void SharedMemory::land(Place place, const void* from, int bytes) {
  std::memcpy(bytes_.data() + offset_of(place), from, bytes);
}

void SharedMemory::end_landing(Place place, int bytes) {
  if (!detect_races_) return;
  const uint32_t offset = offset_of(place);
  for (int index = first_piece(offset); index < end_piece(offset, bytes); ++index) {
    --pieces_[index].landings_under_way;
    pieces_[index].landed = clock_;
  }
  arrived_[place.rank] = {clock_, pieces_[first_piece(offset)].where};
}

void SharedMemory::begin_background_read(int thread, Place place, int bytes, Where where) {
  begin_pieces();
  locate(place, bytes, kPiece, where);
  if (!detect_races_) return;
  const uint32_t offset = offset_of(place);
  check_landed(thread, "starts to read", place, bytes, where);
  for (int index = first_piece(offset); index < end_piece(offset, bytes); ++index) {
    Piece& piece = pieces_[index];
    if (piece.unfenced_writes) check_fenced(index, "starts to read", where);
    if (piece.was_written) {
      const int begin = index * kPiece / kGranule;
      for (int granule = begin; granule < begin + kPiece / kGranule; ++granule) {
        const Access& write = shadow_[granule].write;
        if (!is_ordered(write, Kind::kWrite, thread, granule))
          fail_race("starts to read", "was written", write, granule * kGranule, where);
      }
    }
    piece.where = where;
    ++piece.reads_under_way;
  }
}

void SharedMemory::end_background_read(int warp, Place place, int bytes) {
  if (!detect_races_) return;
  const uint32_t offset = offset_of(place);
  for (int index = first_piece(offset); index < end_piece(offset, bytes); ++index) {
    --pieces_[index].reads_under_way;
    background_reads_[index * known_.size() + warp] = clock_;
  }
  known_[warp].until[background_of(warp)] = ++clock_;
}

void SharedMemory::peek(Place place, void* to, int bytes) const {
  std::memcpy(to, bytes_.data() + offset_of(place), bytes);
}

void SharedMemory::fence_proxy(int thread) {
  begin_pieces();
  if (pieces_.empty()) return;
  for (const int index : unfenced_[thread]) --pieces_[index].unfenced_writes;
  unfenced_[thread].clear();
}

void SharedMemory::make_barrier(int thread, Place place, int bytes, Where where) {
  begin_pieces();
  locate(place, bytes, bytes, where);
  if (!detect_races_) return;
  const uint32_t offset = offset_of(place);
  note_accessor(thread);
  check_write(thread, offset, bytes, where);
  for (int granule = first_granule(offset); granule < end_granule(offset, bytes); ++granule) shadow_[granule].is_barrier = true;
}

void SharedMemory::check_barrier(int thread, Place place, Time fenced_at, Where where) {
  if (!detect_races_ || (fenced_at && fenced_at < cluster_fence_)) return;
  const uint32_t offset = offset_of(place);
  const int granule = first_granule(offset);
  if (!is_ordered(shadow_[granule].write, Kind::kWrite, thread, granule))
    fail_race("uses the barrier", "was made", shadow_[granule].write, offset, where);
}

void SharedMemory::fail_background(const char* verb, const char* what, int index, Where where) const {
  const Where earlier = pieces_[index].where;
  fail(where, "race: this thread %s shared offset %s, which %s at %s:%d", verb, name_of_offset(place_of(index * kPiece)).c_str(),
       what, earlier.file, earlier.line);
}

}  // namespace twin
