// Products of warpgroups. Each warp has its own 16 of the 64 rows, and its share of a product starts when the warp comes to it. It reads
// its operands at an unknown moment and delivers its result at the wait that guarantees it; until then the accumulators hold a NaN.
#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <vector>

#include "machine/machine.h"

namespace twin {

// The accumulators of the lanes of a warp while products add to them: 16 rows of n columns.
struct Accumulators {
  float* of_lane[kLanes];
  int columns;
  std::vector<float> values;
  int products_under_way = 0;
};

struct Product {
  ProductOperands operands;
  const uint32_t* registers[kLanes];  // left operands, where they are not in shared memory
  uint32_t registers_at_start[kLanes][4];
  std::shared_ptr<Accumulators> accumulators;
  int group;
  bool has_been_computed = false;
};

// The products of one warp that it has not waited for.
struct ProductQueue {
  std::deque<Product> products;
  int groups_committed = 0;
  size_t num_started = 0;
  bool fenced = false;  // since results were last delivered
};

// What the warps of a warpgroup must all do in the same order.
using ProductHistory = std::vector<ProductOperands>;

}  // namespace twin
