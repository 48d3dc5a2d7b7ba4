#include "machine/tensor_cores.h"

#include <cstring>

#include "machine/cluster.h"

namespace twin {
namespace {

constexpr int kWarpsOfGroup = 4;
constexpr int kRows = 16;  // of a warp
constexpr int kDepth = 16;
constexpr int kPieceElements = 8;
constexpr uint32_t kUnderWay = 0x7fa5a5a5;  // a signalling NaN: arithmetic on it changes its bits

// ---- operands in shared memory ------------------------------------------------------------------------------------------------------

struct Descriptor {
  uint32_t start, leading_stride, stride;
};

Descriptor decode(uint64_t bits, Where where) {
  constexpr uint64_t kFields = 0x3fff | 0x3fffull << 16 | 0x3fffull << 32 | 7ull << 49 | 3ull << 62;
  if (bits & ~kFields) fail(where, "descriptor %016llx has bits outside of its fields", static_cast<unsigned long long>(bits));
  if (bits >> 62 != 1) fail(where, "descriptor with swizzle mode %d; tiles have the 128-byte swizzle, 1", static_cast<int>(bits >> 62));
  if (bits >> 49 & 7) fail(where, "descriptor with base offset %d", static_cast<int>(bits >> 49 & 7));
  const auto field = [&](int first_bit) { return static_cast<uint32_t>(bits >> first_bit & 0x3fff) << 4; };
  return {field(0), field(16), field(32)};
}

// Descriptors have no room for a block's rank: their addresses are those of the own block.
Place operand(uint32_t address) { return {warp->rank, address}; }

uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// Calls visit(address, row, column) for each piece of eight columns of rows [first_row, first_row + rows), 16 columns wide.
template <class Visitor>
void for_each_piece_along_columns(const Descriptor& at, int first_row, int rows, Visitor visit) {
  for (int row = first_row; row < first_row + rows; ++row)
    for (int column = 0; column < kDepth; column += kPieceElements)
      visit(swizzled(at.start + row / 8 * at.stride + row % 8 * 128 + column * 2), row - first_row, column);
}

// The same for 16 rows of `columns` columns: rows in groups of eight, columns in groups of 64.
template <class Visitor>
void for_each_piece_along_rows(const Descriptor& at, int columns, Visitor visit) {
  for (int row = 0; row < kDepth; ++row)
    for (int column = 0; column < columns; column += kPieceElements)
      visit(swizzled(at.start + column / 64 * at.leading_stride + row / 8 * at.stride + row % 8 * 128 + column % 64 * 2), row, column);
}

// Every piece that a warp's share of the product reads, of the left operand and of the right one.
template <class Left, class Right>
void for_each_piece(const ProductOperands& operands, int warp, Left visit_left, Right visit_right) {
  if (operands.left_in_shared)
    for_each_piece_along_columns(decode(operands.a, operands.where), warp % kWarpsOfGroup * kRows, kRows, visit_left);
  const Descriptor right = decode(operands.b, operands.where);
  if (operands.right_along_rows) {
    for_each_piece_along_rows(right, operands.columns, visit_right);
  } else {
    for_each_piece_along_columns(right, 0, operands.columns, visit_right);
  }
}

// ---- one product of one warp --------------------------------------------------------------------------------------------------------

float widen(uint16_t bits, bool is_float16) {
  if (is_float16) {
    _Float16 value;
    std::memcpy(&value, &bits, sizeof value);
    return static_cast<float>(value);
  }
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// Where accumulator i of a lane is in its warp's rows.
int accumulator_row(int lane, int i) { return lane / 4 + (i >> 1 & 1) * 8; }
int accumulator_column(int lane, int i) { return (i >> 2) * 8 + lane % 4 * 2 + (i & 1); }

// Products of 16-bit elements are exact in float32; sums are rounded one by one in the order of the contraction.
void compute(Product& product) {
  product.has_been_computed = true;
  const ProductOperands& operands = product.operands;
  const int columns = operands.columns;
  static float a[kRows][kDepth], b[kDepth][256];
  const auto piece = [&](uint32_t address, auto store) {
    uint16_t elements[kPieceElements];
    cluster->shared.peek(operand(address), elements, sizeof elements);
    for (int i = 0; i < kPieceElements; ++i) store(i, widen(elements[i], operands.is_float16));
  };
  for_each_piece(
      operands, warp_index(),
      [&](uint32_t address, int row, int column) { piece(address, [&](int i, float value) { a[row][column + i] = value; }); },
      [&](uint32_t address, int row, int column) {
        piece(address, [&](int i, float value) { (operands.right_along_rows ? b[row][column + i] : b[column + i][row]) = value; });
      });
  if (!operands.left_in_shared)
    for (int lane = 0; lane < kLanes; ++lane)
      for (int i = 0; i < 8; ++i) {
        const uint32_t pair = product.registers[lane][i / 2];
        const int row = lane / 4 + i / 2 % 2 * 8, column = lane % 4 * 2 + i / 4 * 8 + i % 2;
        a[row][column] = widen(static_cast<uint16_t>(i % 2 ? pair >> 16 : pair), operands.is_float16);
      }
  float* const values = product.accumulators->values.data();
  if (!operands.accumulate) std::memset(values, 0, sizeof(float) * kRows * columns);
  for (int row = 0; row < kRows; ++row)
    for (int k = 0; k < kDepth; ++k) {
      const float factor = a[row][k];
      const float* const b_row = b[k];
      float* const d = values + row * columns;
      for (int column = 0; column < columns; ++column) d[column] += factor * b_row[column];
    }
}

std::shared_ptr<Accumulators> accumulators_of(ProductQueue& queue, ProductLane* const* lanes) {
  const ProductOperands& operands = lanes[0]->operands;
  for (const Product& earlier : queue.products)
    if (earlier.accumulators->of_lane[0] == lanes[0]->accumulators) {
      if (earlier.accumulators->columns != operands.columns)
        fail(operands.where, "products of different shapes add to the same accumulators");
      return earlier.accumulators;
    }
  if (!queue.fenced) fail(operands.where, "accumulators that the warp's threads have used, and no product_fence since");
  auto fresh = std::make_shared<Accumulators>();
  fresh->columns = operands.columns;
  fresh->values.resize(kRows * operands.columns);
  for (int lane = 0; lane < kLanes; ++lane) {
    float* const mine = fresh->of_lane[lane] = lanes[lane]->accumulators;
    for (int i = 0; i < operands.columns / 2; ++i) {
      fresh->values[accumulator_row(lane, i) * operands.columns + accumulator_column(lane, i)] = mine[i];
      std::memcpy(&mine[i], &kUnderWay, sizeof kUnderWay);
    }
  }
  return fresh;
}

void deliver(const Accumulators& accumulators, Where where) {
  for (int lane = 0; lane < kLanes; ++lane) {
    float* const mine = accumulators.of_lane[lane];
    for (int i = 0; i < accumulators.columns / 2; ++i)
      if (std::memcmp(&mine[i], &kUnderWay, sizeof kUnderWay) != 0)
        fail(where, "accumulator %d of lane %d was written while this product was under way", i, lane);
    for (int i = 0; i < accumulators.columns / 2; ++i)
      mine[i] = accumulators.values[accumulator_row(lane, i) * accumulators.columns + accumulator_column(lane, i)];
  }
}

bool is_same(const ProductOperands& x, const ProductOperands& y) {
  return x.a == y.a && x.b == y.b && x.columns == y.columns && x.accumulate == y.accumulate && x.left_in_shared == y.left_in_shared &&
         x.right_along_rows == y.right_along_rows && x.where.line == y.where.line;
}

// All warps of a warpgroup start the same products.
void check_history(const ProductOperands& operands) {
  const int group = warp_index() / kWarpsOfGroup;
  if (warps_of_block() % kWarpsOfGroup != 0) fail(operands.where, "a product in a block of incomplete warpgroups");
  ProductHistory& history = cluster->histories[group];
  const size_t number = warp->products.num_started++;
  if (number < history.size()) {
    if (!is_same(history[number], operands))
      fail(operands.where, "warps of a warpgroup diverge: product %zu has other operands here than at %s:%d", number,
           history[number].where.file, history[number].where.line);
    return;
  }
  for (int sibling = group * kWarpsOfGroup; sibling < (group + 1) * kWarpsOfGroup; ++sibling)
    if (cluster->warps[sibling].exited)
      fail(operands.where, "warps of a warpgroup diverge: one has left the kernel before this product");
  history.push_back(operands);
}

void start(ProductLane* const* lanes) {
  const ProductOperands& operands = lanes[0]->operands;
  for (int lane = 1; lane < kLanes; ++lane)
    if (!is_same(lanes[lane]->operands, operands)) fail(operands.where, "lanes of a warp diverge: product with other operands");
  check_history(operands);
  ProductQueue& queue = warp->products;
  Product product;
  product.operands = operands;
  product.group = queue.groups_committed;
  product.accumulators = accumulators_of(queue, lanes);
  if (!operands.left_in_shared) {
    if (!queue.fenced) fail(operands.where, "an operand in registers, and no product_fence since the last product was waited for");
    for (int lane = 0; lane < kLanes; ++lane) {
      product.registers[lane] = lanes[lane]->registers;
      std::memcpy(product.registers_at_start[lane], lanes[lane]->registers, sizeof product.registers_at_start[lane]);
    }
  }
  const auto claim = [&](uint32_t address, int, int) {
    cluster->shared.begin_background_read(thread, operand(address), 16, operands.where);
  };
  for_each_piece(operands, warp_index(), claim, claim);
  ++product.accumulators->products_under_way;
  queue.products.push_back(std::move(product));
  // Operands are read right away or as late as possible.
  if (schedule.below(2))
    for (Product& each : queue.products)
      if (!each.has_been_computed) compute(each);
}

void finish(Product& product) {
  const Where where = product.operands.where;
  if (!product.operands.left_in_shared)
    for (int lane = 0; lane < kLanes; ++lane)
      if (std::memcmp(product.registers[lane], product.registers_at_start[lane], sizeof product.registers_at_start[lane]) != 0)
        fail(where, "the left operand of lane %d was written while this product was under way", lane);
  if (!product.has_been_computed) compute(product);
  const auto release = [&](uint32_t address, int, int) { cluster->shared.end_background_read(warp_index(), operand(address), 16); };
  for_each_piece(product.operands, warp_index(), release, release);
  if (--product.accumulators->products_under_way == 0) deliver(*product.accumulators, where);
}

void fence(char* const*) { warp->products.fenced = true; }
void commit(char* const*) { ++warp->products.groups_committed; }
void wait(int* const* pending_groups) {
  ProductQueue& queue = warp->products;
  while (!queue.products.empty() && queue.products.front().group < queue.groups_committed - *pending_groups[0]) {
    finish(queue.products.front());
    queue.products.pop_front();
    queue.fenced = false;
  }
}

}  // namespace

void start_product(ProductLane& lane) { meet<ProductLane, start>("product", lane, lane.operands.where); }

void fence_products(Where where) {
  char nothing = 0;
  meet<char, fence>("product_fence", nothing, where);
}
void commit_products(Where where) {
  char nothing = 0;
  meet<char, commit>("product_commit", nothing, where);
}
void wait_for_products(int pending_groups, Where where) { meet<int, wait>("product_wait", pending_groups, where); }

void check_products_at_exit() {
  const ProductQueue& queue = warp->products;
  if (!queue.products.empty()) fail(queue.products.front().operands.where, "the warp leaves the kernel while this product is under way");
  if (cluster->histories.empty()) return;
  const ProductHistory& history = cluster->histories[warp_index() / kWarpsOfGroup];
  if (queue.num_started < history.size())
    fail(history[queue.num_started].where, "warps of a warpgroup diverge: one leaves the kernel without this product");
}

}  // namespace twin
