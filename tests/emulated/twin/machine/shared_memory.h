// The shared memory of one block, with a shadow that remembers who touched each two bytes last. Two accesses, one of them a write, by
// different threads race unless a barrier that both threads took part in lies between them.
#pragma once

#include <cstdint>
#include <vector>

#include "machine/machine.h"

namespace twin {

// A moment on the block's clock, which ticks at every barrier.
using Time = uint32_t;

class SharedMemory {
 public:
  // A new block: every byte is a NaN in float32, bfloat16 and float16.
  void reset(uint32_t bytes, int num_warps, bool detect_races);

  void read(int thread, uint32_t address, void* to, int bytes, Where where);
  void write(int thread, uint32_t address, const void* from, int bytes, Where where);

  // An asynchronous write: the bytes are poison, and nobody's to touch, from begin_copy to land_copy.
  void begin_copy(int thread, uint32_t address, int bytes, Where where);
  void land_copy(int thread, uint32_t address, const void* from, int bytes, Where where);

  void warp_barrier(int warp) { warp_fence_[warp] = ++clock_; }
  void block_barrier() { block_fence_ = ++clock_; }

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
    int copies_under_way = 0;
  };

  unsigned char* locate(uint32_t address, int bytes, Where where);
  bool is_ordered(const Access& earlier, int thread) const;
  void check_read(int thread, uint32_t offset, int bytes, Where where);
  void check_write(int thread, uint32_t offset, int bytes, Where where);
  [[noreturn]] void fail_race(const char* verb, const char* earlier_verb, const Access& earlier, uint32_t offset, Where where);

  std::vector<unsigned char> bytes_;
  std::vector<Shadow> shadow_;  // one for each two bytes
  std::vector<Time> warp_fence_;
  Time block_fence_ = 0;
  Time clock_ = 0;
  bool detect_races_ = true;
};

}  // namespace twin
