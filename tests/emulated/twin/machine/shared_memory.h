// The shared memory of a cluster's blocks, with a shadow that remembers who touched each two bytes last. Two accesses, one of them
// a write, by different threads race unless barriers lie between them that pass on the knowledge of the first (clocks.h).
//
// Copies by tensor map and products go another way than ordinary accesses. For them a second, coarser shadow keeps which pieces of 16
// bytes are on their way in, which are still to be read, and which were written by threads that have not fenced since.
#pragma once

#include <array>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "machine/clocks.h"
#include "machine/machine.h"

namespace twin {

// Every block's shared memory begins here; not at zero, so that a forgotten base is noticed.
constexpr uint32_t kSharedBase = 1024;

// An address in the shared memory of one block of the cluster.
struct Place {
  int rank;
  uint32_t address;  // without the rank
};
inline Place operator+(Place place, uint32_t bytes) { return {place.rank, place.address + bytes}; }
inline bool operator<(Place a, Place b) { return a.rank != b.rank ? a.rank < b.rank : a.address < b.address; }

// Threads and warps are numbered through the cluster.
class SharedMemory {
 public:
  // A new cluster: every byte is a NaN in float32, bfloat16 and float16.
  void reset(uint32_t bytes_of_block, int num_blocks, int num_warps, bool detect_races);

  void read(int thread, Place place, void* to, int bytes, Where where);
  void write(int thread, Place place, const void* from, int bytes, Where where);

  // An asynchronous write: the bytes are poison, and nobody's to touch, from begin_copy to land_copy.
  void begin_copy(int thread, Place place, int bytes, Where where);
  void land_copy(int thread, Place place, const void* from, int bytes, Where where);

  // A word that the engine writes: as such a copy, but ended by the engine.
  void begin_sending(int thread, Place place, Where where);
  void end_sending(Place place, uint32_t word);

  // ---- the other way: addresses and sizes are multiples of 16 bytes -----------------------------------------------------------------

  // The copy engine will write these bytes: they are poison until `land`.
  void begin_landing(int thread, Place place, int bytes, Where where);
  void land(Place place, const void* from, int bytes);
  void end_landing(Place place, int bytes);

  // Something that runs for a warp will read these bytes at any time until `end_background_read`.
  void begin_background_read(int thread, Place place, int bytes, Where where);
  void end_background_read(int warp, Place place, int bytes);
  void peek(Place place, void* to, int bytes) const;

  void fence_proxy(int thread);

  // The bytes belong to a barrier from now on: no ordinary access is right.
  void make_barrier(int thread, Place place, int bytes, Where where);
  // Whether `thread` knows that the barrier has been made: by what it has learnt, or because a barrier of the cluster came after
  // the fence of its maker (0 without one).
  void check_barrier(int thread, Place place, Time fenced_at, Where where);
  Time now() const { return clock_; }

  // ---- knowledge --------------------------------------------------------------------------------------------------------------------

  void warp_barrier(int warp);
  void barrier_of_warps(int first, int end);
  // Passes on that reads have ended and that fenced barriers have been made, not what was written.
  void cluster_barrier();

  // What a single thread, or a warp whose lanes arrive together, tells those that wait for it.
  Knowledge told_by_thread(int thread);
  Knowledge told_by_warp(int warp);
  void learn(int warp, const Knowledge& told) { known_[warp].join(told); }
  // What the end of a copy by the engine tells.
  Time told_by_engine() { return ++clock_; }

  // ---- blocks of a cluster that reach each other ------------------------------------------------------------------------------------

  // Stops the launch unless `thread` knows that another block runs: before, and after, there is nothing to reach.
  void check_begun(int thread, int rank, Where where) const;
  // Another block than the thread's own, at one of whose barriers the thread arrives.
  void note_visit(int thread, int rank, Where where);
  // A block has left: it must know of the end of all visits, and of all copies to its memory.
  void check_end_of_block(int rank) const;

 private:
  // How many threads a recorded access stands for, or that the engine wrote what the thread had sent.
  enum Extent : uint16_t { kNobody, kOneLane, kLanesOfOneWarp, kSeveralWarps, kEngine };
  enum class Kind { kWrite, kRead };

  struct Access {
    const char* file = nullptr;
    Time time = 0;
    uint16_t line = 0;
    uint16_t thread : 11;  // of the cluster
    uint16_t extent : 5;
    Access() : thread(0), extent(kNobody) {}
  };

  struct Shadow {
    Access write;
    Access read;
    uint16_t copies_under_way = 0;
    bool is_barrier = false;
  };

  struct Piece {
    Time landed = 0;
    uint16_t landings_under_way = 0;
    uint16_t reads_under_way = 0;
    uint16_t unfenced_writes = 0;
    bool was_written = false;  // by an ordinary write
    Where where;               // of the last copy or read
  };

  // When a warp last visited a block, or the copy engine last wrote there; 0 is never.
  struct Visit {
    Time time = 0;
    Where where;
  };

  uint32_t offset_of(Place place) const { return place.rank * window_bytes_ + (place.address - kSharedBase); }
  Place place_of(uint32_t offset) const {
    return {static_cast<int>(offset / window_bytes_), offset % window_bytes_ + kSharedBase};
  }
  int warps_of_block() const { return static_cast<int>(known_.size()) / num_blocks_; }
  int first_warp_of(int rank) const { return rank * warps_of_block(); }
  int rank_of(int warp) const { return warp / warps_of_block(); }
  Knowledge known_to_block(int rank) const;
  unsigned char* locate(Place place, int bytes, int alignment, Where where);
  void begin_pieces();
  Access access(int thread, Where where) const;
  bool is_ordered(const Access& earlier, Kind kind, int thread, int granule) const;
  void check_read(int thread, uint32_t offset, int bytes, Where where);
  // `told_of_writes` says what must be known of a write before: that it was told of, or only what tells of reads.
  void check_write(int thread, uint32_t offset, int bytes, Where where, Kind told_of_writes = Kind::kWrite);
  void check_landed(int thread, const char* verb, Place place, int bytes, Where where) const;
  void check_fenced(int index, const char* verb, Where where) const;
  void note_ordinary_write(int thread, uint32_t offset, int bytes, Where where);
  void check_ordered_with_background(int thread, const char* verb, int index, Where where) const;
  void note_accessor(int thread);
  [[noreturn]] void fail_race(const char* verb, const char* earlier_verb, const Access& earlier, uint32_t offset, Where where) const;
  [[noreturn]] void fail_background(const char* verb, const char* what, int index, Where where) const;

  std::vector<unsigned char> bytes_;  // the blocks' windows one behind the other
  std::vector<Shadow> shadow_;  // one for each two bytes
  std::vector<Piece> pieces_;   // one for each 16 bytes, from the first use of the other way on
  std::vector<Time> background_reads_;  // by piece and warp, when the last one ended
  std::unordered_map<int, std::array<Time, kMaxWarps>> readers_;  // by granule, where several warps have read and pieces_ are kept
  std::vector<std::vector<int>> unfenced_;                        // by thread, pieces written since its last fence
  std::vector<int> accessor_;  // by warp: the only thread that has accessed since the warp's barrier, or kNone, or kSeveral
  std::vector<Knowledge> known_;
  std::vector<Visit> visits_;   // by rank of the block that is visited, and warp
  std::vector<Visit> arrived_;  // by rank, the last copy by the engine
  Time fence_ = 0;              // the last barrier of all warps that passes on everything
  Time cluster_fence_ = 0;      // the last barrier of the cluster
  Time clock_ = kFirstTime;
  uint32_t bytes_of_block_ = 0;
  uint32_t window_bytes_ = 0;  // of whole pieces
  int num_blocks_ = 1;
  bool detect_races_ = true;

  static constexpr int kNone = -1, kSeveral = -2;  // of accessor_
  static constexpr unsigned char kPoison = 0xff;
  static constexpr int kGranule = 2;  // the smallest access that a kernel makes
  static constexpr int kPiece = 16;

  static int first_granule(uint32_t offset) { return static_cast<int>(offset / kGranule); }
  static int end_granule(uint32_t offset, int bytes) { return static_cast<int>((offset + bytes) / kGranule); }
  static int first_piece(uint32_t offset) { return static_cast<int>(offset / kPiece); }
  static int end_piece(uint32_t offset, int bytes) { return static_cast<int>((offset + bytes + kPiece - 1) / kPiece); }
};

}  // namespace twin
