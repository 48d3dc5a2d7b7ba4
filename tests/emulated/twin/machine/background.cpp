// The part of SharedMemory that copies and products go through, in pieces of 16 bytes.
#include <cstring>

#include "machine/shared_memory.h"

namespace twin {
namespace {

constexpr int kPiece = 16;

int first_piece(uint32_t offset) { return static_cast<int>(offset / kPiece); }
int end_piece(uint32_t offset, int bytes) { return static_cast<int>((offset + bytes + kPiece - 1) / kPiece); }

}  // namespace

// Ordinary writes from before count as not fenced.
void SharedMemory::begin_pieces() {
  if (!pieces_.empty() || !detect_races_) return;
  pieces_.resize((bytes_.size() + kPiece - 1) / kPiece);
  for (size_t granule = 0; granule < shadow_.size(); ++granule) {
    const Access& write = shadow_[granule].write;
    if (write.extent == kNobody || shadow_[granule].is_barrier) continue;
    const int index = static_cast<int>(granule) * kGranule / kPiece;
    pieces_[index].was_written = true;
    ++pieces_[index].unfenced_writes;
    unfenced_[write.thread].push_back(index);
  }
}

void SharedMemory::check_ordered_with_background(const Piece& piece, int thread, const char* verb, int index, Where where) const {
  if (piece.landings_under_way) fail_background(verb, "is being copied to", piece, index, where);
  if (piece.reads_under_way) fail_background(verb, "has still to be read", piece, index, where);
  const Knowledge& known = known_[thread / kLanes];
  for (int warp = 0; warp < kMaxWarps; ++warp)
    if (piece.reads[warp] >= known.until[background_of(warp)])
      fail_background(verb, "was read, with no barrier in between,", piece, index, where);
}

void SharedMemory::check_landed(int thread, const char* verb, uint32_t offset, int bytes, Where where) const {
  for (int index = first_piece(offset); index < end_piece(offset, bytes); ++index) {
    const Piece& piece = pieces_[index];
    if (piece.landings_under_way) fail_background(verb, "is being copied to", piece, index, where);
    if (piece.landed >= known_[thread / kLanes].until[kCopyEngine])
      fail_background(verb, "was copied to, with no wait for its barrier,", piece, index, where);
  }
}

void SharedMemory::check_fenced(int index, const char* verb, Where where) const {
  const int begin = index * kPiece / kGranule;
  for (int granule = begin; granule < begin + kPiece / kGranule; ++granule) {
    const Access& write = shadow_[granule].write;
    if (write.extent == kNobody) continue;
    fail(where, "missing proxy fence: this thread %s shared offset %d, which warp %d lane %d wrote at %s:%d", verb, index * kPiece,
         write.thread / kLanes, write.thread % kLanes, write.file, write.line);
  }
}

void SharedMemory::note_ordinary_write(int thread, uint32_t offset, int bytes, Where where) {
  for (int index = first_piece(offset); index < end_piece(offset, bytes); ++index) {
    Piece& piece = pieces_[index];
    check_ordered_with_background(piece, thread, "writes", index, where);
    piece.was_written = true;
    ++piece.unfenced_writes;
    unfenced_[thread].push_back(index);
  }
}

void SharedMemory::begin_landing(int thread, uint32_t address, int bytes, Where where) {
  begin_pieces();
  unsigned char* to = locate(address, bytes, kPiece, where);
  if (detect_races_) {
    const uint32_t offset = address - kSharedBase;
    for (int index = first_piece(offset); index < end_piece(offset, bytes); ++index) {
      Piece& piece = pieces_[index];
      check_ordered_with_background(piece, thread, "copies to", index, where);
      if (piece.unfenced_writes) check_fenced(index, "copies to", where);
      piece.was_written = false;
      piece.where = where;
      ++piece.landings_under_way;
    }
    check_write(thread, offset, bytes, where);
    for (int granule = first_granule(offset); granule < end_granule(offset, bytes); ++granule) shadow_[granule].write = Access();
  }
  std::memset(to, kPoison, bytes);
}

void SharedMemory::land(uint32_t address, const void* from, int bytes) {
  std::memcpy(bytes_.data() + (address - kSharedBase), from, bytes);
}

void SharedMemory::end_landing(uint32_t address, int bytes) {
  if (!detect_races_) return;
  const uint32_t offset = address - kSharedBase;
  for (int index = first_piece(offset); index < end_piece(offset, bytes); ++index) {
    --pieces_[index].landings_under_way;
    pieces_[index].landed = clock_;
  }
}

void SharedMemory::begin_background_read(int thread, uint32_t address, int bytes, Where where) {
  begin_pieces();
  locate(address, bytes, kPiece, where);
  if (!detect_races_) return;
  const uint32_t offset = address - kSharedBase;
  check_landed(thread, "starts to read", offset, bytes, where);
  for (int index = first_piece(offset); index < end_piece(offset, bytes); ++index) {
    Piece& piece = pieces_[index];
    if (piece.unfenced_writes) check_fenced(index, "starts to read", where);
    if (piece.was_written) {
      const int begin = index * kPiece / kGranule;
      for (int granule = begin; granule < begin + kPiece / kGranule; ++granule) {
        const Access& write = shadow_[granule].write;
        if (!is_ordered(write, thread, granule)) fail_race("starts to read", "was written", write, granule * kGranule, where);
      }
    }
    piece.where = where;
    ++piece.reads_under_way;
  }
}

void SharedMemory::end_background_read(int warp, uint32_t address, int bytes) {
  if (!detect_races_) return;
  const uint32_t offset = address - kSharedBase;
  for (int index = first_piece(offset); index < end_piece(offset, bytes); ++index) {
    --pieces_[index].reads_under_way;
    pieces_[index].reads[warp] = clock_;
  }
  known_[warp].until[background_of(warp)] = ++clock_;
}

void SharedMemory::peek(uint32_t address, void* to, int bytes) const {
  std::memcpy(to, bytes_.data() + (address - kSharedBase), bytes);
}

void SharedMemory::fence_proxy(int thread) {
  begin_pieces();
  if (pieces_.empty()) return;
  for (const int index : unfenced_[thread]) --pieces_[index].unfenced_writes;
  unfenced_[thread].clear();
}

void SharedMemory::make_barrier(int thread, uint32_t address, int bytes, Where where) {
  begin_pieces();
  locate(address, bytes, bytes, where);
  if (!detect_races_) return;
  const uint32_t offset = address - kSharedBase;
  note_accessor(thread);
  check_write(thread, offset, bytes, where);
  for (int granule = first_granule(offset); granule < end_granule(offset, bytes); ++granule) shadow_[granule].is_barrier = true;
}

void SharedMemory::check_barrier(int thread, uint32_t address, Where where) {
  if (!detect_races_) return;
  const uint32_t offset = address - kSharedBase;
  const int granule = first_granule(offset);
  if (!is_ordered(shadow_[granule].write, thread, granule))
    fail_race("uses the barrier", "was made", shadow_[granule].write, offset, where);
}

void SharedMemory::fail_background(const char* verb, const char* what, const Piece& piece, int index, Where where) const {
  fail(where, "race: this thread %s shared offset %d, which %s at %s:%d", verb, index * kPiece, what, piece.where.file,
       piece.where.line);
}

}  // namespace twin
