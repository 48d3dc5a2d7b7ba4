// The engine that copies between global and shared memory at moments of its own.
#pragma once

#include <cstdint>
#include <vector>

#include "machine/machine.h"

namespace twin {

// What emulation.py writes in place of the driver's tensor map: a (batch, heads, rows, columns) array of 16-bit elements.
struct Map {
  uint64_t mark;
  uint64_t base;
  uint64_t sizes[4];    // columns, rows, heads, batch
  uint64_t strides[3];  // in bytes; columns are adjacent
  uint64_t box_rows;
};

// What a copy moves: a box of a tensor map, or bytes as they are.
struct Region {
  uint32_t address;  // in shared memory
  int thread;        // that started the copy
  Where where;
  int bytes;  // in shared memory

  bool is_box;
  Map map;
  int column, row, head, batch;

  char* global;  // where it is no box
};

struct Landing {
  Region region;
  uint32_t barrier;
};

enum class Effect { kStore, kAddFloats };

// A copy to global memory first reads shared memory, and writes later still.
struct Departure {
  Region region;
  Effect effect;
  int group;
  bool has_been_read = false;
  bool was_waited_for = false;  // until it has been read
  std::vector<unsigned char> bytes;  // in the order of the region's lines
};

class CopyEngine {
 public:
  void reset(int num_threads);
  bool has_work() const;
  // Does a part of any one of the copies under way. The running block is the engine's.
  void work();
  // Ends every copy to global memory: the block's last thread has left.
  void finish();

  void begin_landing(const Region& region, uint32_t barrier);
  void begin_departure(const Region& region, Effect effect);
  void commit_departures(int thread) { ++groups_committed_[thread]; }
  void wait_until_read(int thread, int pending_groups);
  void wait_until_written(int thread);
  // A copy that a thread has not waited for, or null.
  const Departure* unread_departure_of(int thread) const;
  const Landing* landing() const { return landings_.empty() ? nullptr : &landings_.front(); }

 private:
  static void land(const Landing& landing);
  static void read(Departure& departure);
  static void write(Departure& departure);

  std::vector<Landing> landings_;
  std::vector<Departure> departures_;
  std::vector<int> groups_committed_;  // by thread
};

}  // namespace twin
