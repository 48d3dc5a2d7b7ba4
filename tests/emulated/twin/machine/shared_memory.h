// The shared memory of one block, with a shadow that remembers who touched each two bytes last. Two accesses, one of them a write, by
// different threads race unless barriers lie between them that pass on the knowledge of the first (clocks.h).
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

class SharedMemory {
 public:
  // A new block: every byte is a NaN in float32, bfloat16 and float16.
  void reset(uint32_t bytes, int num_warps, bool detect_races);

  void read(int thread, uint32_t address, void* to, int bytes, Where where);
  void write(int thread, uint32_t address, const void* from, int bytes, Where where);

  // An asynchronous write: the bytes are poison, and nobody's to touch, from begin_copy to land_copy.
  void begin_copy(int thread, uint32_t address, int bytes, Where where);
  void land_copy(int thread, uint32_t address, const void* from, int bytes, Where where);

  // ---- the other way: addresses and sizes are multiples of 16 bytes -----------------------------------------------------------------

  // The copy engine will write these bytes: they are poison until `land`.
  void begin_landing(int thread, uint32_t address, int bytes, Where where);
  void land(uint32_t address, const void* from, int bytes);
  void end_landing(uint32_t address, int bytes);

  // Something that runs for a warp will read these bytes at any time until `end_background_read`.
  void begin_background_read(int thread, uint32_t address, int bytes, Where where);
  void end_background_read(int warp, uint32_t address, int bytes);
  void peek(uint32_t address, void* to, int bytes) const;

  void fence_proxy(int thread);

  // The bytes belong to a barrier from now on: no ordinary access is right.
  void make_barrier(int thread, uint32_t address, int bytes, Where where);
  // Whether `thread` knows that the barrier has been made.
  void check_barrier(int thread, uint32_t address, Where where);

  // ---- knowledge --------------------------------------------------------------------------------------------------------------------

  void warp_barrier(int warp);
  void block_barrier();

  // What a single thread, or a warp whose lanes arrive together, tells those that wait for it.
  Knowledge told_by_thread(int thread);
  Knowledge told_by_warp(int warp);
  void learn(int warp, const Knowledge& told) { known_[warp].join(told); }
  // What the end of a copy by the engine tells.
  Time told_by_engine() { return ++clock_; }

 private:
  // How many threads a recorded access stands for.
  enum Extent : uint16_t { kNobody, kOneLane, kLanesOfOneWarp, kSeveralWarps };

  struct Access {
    const char* file = nullptr;
    Time time = 0;
    uint16_t line = 0;
    uint16_t thread : 11;
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
    std::array<Time, kMaxWarps> reads = {};  // when the last background read of each warp ended
    Time landed = 0;
    uint16_t landings_under_way = 0;
    uint16_t reads_under_way = 0;
    uint16_t unfenced_writes = 0;
    bool was_written = false;  // by an ordinary write
    Where where;               // of the last copy or read
  };

  unsigned char* locate(uint32_t address, int bytes, int alignment, Where where);
  void begin_pieces();
  Access access(int thread, Where where) const;
  bool is_ordered(const Access& earlier, int thread, int granule) const;
  void check_read(int thread, uint32_t offset, int bytes, Where where);
  void check_write(int thread, uint32_t offset, int bytes, Where where);
  void check_landed(int thread, const char* verb, uint32_t offset, int bytes, Where where) const;
  void check_fenced(int index, const char* verb, Where where) const;
  void note_ordinary_write(int thread, uint32_t offset, int bytes, Where where);
  void check_ordered_with_background(const Piece& piece, int thread, const char* verb, int index, Where where) const;
  void note_accessor(int thread);
  [[noreturn]] void fail_race(const char* verb, const char* earlier_verb, const Access& earlier, uint32_t offset, Where where) const;
  [[noreturn]] void fail_background(const char* verb, const char* what, const Piece& piece, int index, Where where) const;

  std::vector<unsigned char> bytes_;
  std::vector<Shadow> shadow_;  // one for each two bytes
  std::vector<Piece> pieces_;   // one for each 16 bytes, from the first use of the other way on
  std::unordered_map<int, std::array<Time, kMaxWarps>> readers_;  // by granule, where several warps have read and pieces_ are kept
  std::vector<std::vector<int>> unfenced_;                        // by thread, pieces written since its last fence
  std::vector<int> accessor_;  // by warp: the only thread that has accessed since the warp's barrier, or kNone, or kSeveral
  std::vector<Knowledge> known_;
  Time block_fence_ = 0;
  Time clock_ = 1;
  bool detect_races_ = true;

  static constexpr int kNone = -1, kSeveral = -2;  // of accessor_
  static constexpr unsigned char kPoison = 0xff;
  static constexpr int kGranule = 2;  // the smallest access that a kernel makes

  static int first_granule(uint32_t offset) { return static_cast<int>(offset / kGranule); }
  static int end_granule(uint32_t offset, int bytes) { return static_cast<int>((offset + bytes) / kGranule); }
};

}  // namespace twin
