// The engine that copies between global and shared memory at moments of its own.
#pragma once

#include <cstdint>
#include <vector>

#include "machine/machine.h"
#include "machine/shared_memory.h"

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
  Place place;
  int thread;  // that started the copy
  Where where;
  int bytes;  // in shared memory

  bool is_box;
  Map map;
  int column, row, head, batch;

  char* global;  // where it is no box
};

struct Landing {
  Region region;
  Place barrier;
  bool is_word = false;  // sent by a thread, instead of copied
  uint32_t word = 0;
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
  // Does a part of any one of the copies under way. The running cluster is the engine's.
  void work();
  // Ends every copy to global memory: the cluster's last thread has left.
  void finish();

  void begin_landing(const Region& region, Place barrier);
  void begin_sending(Place place, uint32_t word, Place barrier, Where where);
  void begin_departure(const Region& region, Effect effect);
  void commit_departures(int thread) { ++groups_committed_[thread]; }
  void wait_until_read(int thread, int pending_groups);
  void wait_until_written(int thread);
  // A copy that a thread has not waited for, or null.
  const Departure* unread_departure_of(int thread) const;
  // A copy to the shared memory of a block, or null.
  const Landing* landing_in(int rank) const;

 private:
  static void land(const Landing& landing);
  static void land_copy(const Region& region);
  static void read(Departure& departure);
  static void write(Departure& departure);

  std::vector<Landing> landings_;
  std::vector<Departure> departures_;
  std::vector<int> groups_committed_;  // by thread
};

}  // namespace twin
