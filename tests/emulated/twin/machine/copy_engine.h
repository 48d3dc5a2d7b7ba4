// The engine that copies boxes by tensor map, at moments of its own.
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

struct Box {
  Map map;
  uint32_t address;  // of its first row in shared memory
  int column, row, head, batch;
  int thread;  // that started the copy
  Where where;

  int bytes() const;
};

struct Landing {
  Box box;
  uint32_t barrier;
};

struct Departure {
  Box box;
  int group;
  bool has_been_read;
};

class CopyEngine {
 public:
  void reset(int num_threads);
  bool has_work() const;
  // Does any one of the copies under way. The running block is the engine's.
  void work();

  void begin_landing(const Box& box, uint32_t barrier);
  void begin_departure(const Box& box);
  void commit_departures(int thread) { ++groups_committed_[thread]; }
  void wait_for_departures(int thread);
  // Whether a thread has copies to global memory that it has not waited for.
  const Departure* departure_of(int thread) const;
  const Landing* landing() const { return landings_.empty() ? nullptr : &landings_.front(); }

 private:
  static void land(const Landing& landing);
  static void depart(Departure& departure);

  std::vector<Landing> landings_;
  std::vector<Departure> departures_;
  std::vector<int> groups_committed_;  // by thread
};

}  // namespace twin
