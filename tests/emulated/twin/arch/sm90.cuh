// The host twin of kernels_cu/arch/sm90.cuh: the same names, on the machine of machine/.
#pragma once

#include "arch/common.cuh"

#define CLUSTER_KERNEL(threads, min_blocks, size) \
  using ClusterShape = twin::ClusterOf<size>;     \
  extern "C" void

namespace arch {

constexpr int kWarpgroupSize = 128;

DEVICE int warpgroup_index() { return twin::thread_index() / kWarpgroupSize; }

// ---- barriers -----------------------------------------------------------------------------------------------------------------------

DEVICE void barrier_init(SharedAddress barrier, int arrivals, Where where = {}) { twin::init_barrier(barrier, arrivals, where); }
DEVICE void fence_barrier_init() { twin::fence_barrier_init(); }
DEVICE void barrier_arrive(SharedAddress barrier, Where where = {}) { twin::arrive_at_barrier(barrier, 0, where); }
DEVICE void barrier_arrive_expecting(SharedAddress barrier, int bytes, Where where = {}) {
  twin::arrive_at_barrier(barrier, bytes, where);
}
DEVICE void barrier_wait(SharedAddress barrier, uint32 parity, Where where = {}) {
  twin::wait_for_phase(barrier, parity, where);
}

DEVICE void named_barrier_sync(int id, int threads, Where where = {}) { twin::named_barrier(id, threads, true, where); }
DEVICE void named_barrier_arrive(int id, int threads, Where where = {}) { twin::named_barrier(id, threads, false, where); }

// ---- tensor-map copies --------------------------------------------------------------------------------------------------------------

DEVICE void prefetch(const TensorMap& map, Where where = {}) { twin::check_map(&map, where); }
DEVICE void copy_box_to_shared(SharedAddress shared, const TensorMap& map, SharedAddress barrier, int column, int row, int head,
                               int batch, Where where = {}) {
  twin::copy_box_to_shared(shared, &map, barrier, column, row, head, batch, where);
}
DEVICE void copy_box_to_global(const TensorMap& map, SharedAddress shared, int column, int row, int head, int batch,
                               Where where = {}) {
  twin::copy_box_to_global(&map, shared, column, row, head, batch, where);
}
DEVICE void copy_bytes_to_shared(SharedAddress shared, const void* global, int bytes, SharedAddress barrier, Where where = {}) {
  twin::copy_bytes_to_shared(shared, global, bytes, barrier, where);
}
DEVICE void copy_floats_to_global(float* global, SharedAddress shared, int bytes, Where where = {}) {
  twin::copy_bytes_to_global(shared, global, bytes, where);
}
DEVICE void add_floats_to_global(float* global, SharedAddress shared, int bytes, Where where = {}) {
  twin::add_floats_to_global(global, shared, bytes, where);
}
DEVICE void reduce_add(float* global, float x, float y, Where where = {}) {
  reduce_add(global, x, where);
  reduce_add(global + 1, y, where);
}
DEVICE void copy_to_global_commit() { twin::commit_departures(); }
template <int kPending = 0>
DEVICE void copy_to_global_wait_read() {
  twin::wait_until_read(kPending);
}
DEVICE void copy_to_global_wait() { twin::wait_until_written(); }
DEVICE void fence_async_proxy_global() {}
DEVICE void fence_async_proxy() { twin::fence_proxy(); }

// ---- clusters -----------------------------------------------------------------------------------------------------------------------

struct ClusterAddress {
  uint32 value;
};

DEVICE void cluster_begin(Where where = {}) { twin::cluster_barrier(where); }
DEVICE void cluster_end(Where where = {}) { twin::cluster_barrier(where); }
DEVICE ClusterAddress in_cta(SharedAddress address, int rank, Where where = {}) {
  return {twin::address_in_cluster(address, rank, where)};
}
DEVICE void barrier_arrive(ClusterAddress barrier, Where where = {}) { twin::arrive_in_cluster(barrier.value, 0, where); }
DEVICE void barrier_arrive_expecting(ClusterAddress barrier, int bytes, Where where = {}) {
  twin::arrive_in_cluster(barrier.value, bytes, where);
}
DEVICE void send(ClusterAddress address, uint32 value, ClusterAddress barrier, Where where = {}) {
  twin::send_word(address.value, value, barrier.value, where);
}
DEVICE void copy_box_to_cluster(SharedAddress shared, const TensorMap& map, SharedAddress barrier, int column, int row, int head,
                                int batch, uint32 ranks, Where where = {}) {
  twin::copy_box_to_cluster(shared, &map, barrier, column, row, head, batch, ranks, where);
}

// ---- registers and matrices ---------------------------------------------------------------------------------------------------------

template <int kRegisters>
DEVICE void raise_registers(Where where = {}) {
  twin::raise_registers(kRegisters, where);
}
template <int kRegisters>
DEVICE void lower_registers(Where where = {}) {
  twin::lower_registers(kRegisters, where);
}

struct MatrixStore {
  SharedAddress address;
  uint32 matrices[4];
  Where where;
};

// Lane l gives the address of row l % 8 of matrix l / 8, and brings (row l / 4, columns 2 * (l % 4) and + 1) of each matrix.
template <bool kTransposed>
void gather_matrices(MatrixStore* const* lanes) {
  uint16_t matrix[4][8][8];
  for (int lane = 0; lane < kWarpSize; ++lane)
    for (int i = 0; i < 4; ++i)
      for (int half = 0; half < 2; ++half) {
        const int row = lane / 4, column = lane % 4 * 2 + half;
        const auto element = static_cast<uint16_t>(lanes[lane]->matrices[i] >> 16 * half);
        (kTransposed ? matrix[i][column][row] : matrix[i][row][column]) = element;
      }
  for (int lane = 0; lane < kWarpSize; ++lane)
    twin::write_shared_for_lane(lane, lanes[lane]->address, matrix[lane / 8][lane % 8], 16, lanes[lane]->where);
}
DEVICE void store_matrix(SharedAddress address, uint32 m0, uint32 m1, uint32 m2, uint32 m3, Where where = {}) {
  MatrixStore store{address, {m0, m1, m2, m3}, where};
  twin::meet<MatrixStore, gather_matrices<false>>("store_matrix", store, where);
}
DEVICE void store_matrix_transposed(SharedAddress address, uint32 m0, uint32 m1, uint32 m2, uint32 m3, Where where = {}) {
  MatrixStore store{address, {m0, m1, m2, m3}, where};
  twin::meet<MatrixStore, gather_matrices<true>>("store_matrix_transposed", store, where);
}
DEVICE void store_shared(SharedAddress address, float x, float y, float z, float w, Where where = {}) {
  const float values[4] = {x, y, z, w};
  twin::write_shared(address, values, sizeof values, where);
}

// ---- warpgroup products -------------------------------------------------------------------------------------------------------------

DEVICE void product_fence(Where where = {}) { twin::fence_products(where); }
DEVICE void product_commit(Where where = {}) { twin::commit_products(where); }
template <int kPending>
DEVICE void product_wait(Where where = {}) {
  twin::wait_for_products(kPending, where);
}
template <int kPending = 0>
DEVICE void product_wait_here(int not_negative, Where where = {}) {
  if (not_negative < 0) twin::fail(where, "product_wait_here(%d): a negative value skips the wait", not_negative);
  twin::wait_for_products(kPending, where);
}

// The order of instructions here is that of the source.
template <int kSize>
DEVICE void pin(float (&)[kSize]) {}
template <int kSize>
DEVICE void pin(uint32 (&)[kSize]) {}

#if CLUSTER_SIZE > 1
constexpr uint32 kDescriptorAddressBits = (1u << 18) - 1;
#else
constexpr uint32 kDescriptorAddressBits = ~0u;
#endif

struct ProductOperand {
  uint32 low;

  DEVICE ProductOperand(SharedAddress address, int chunk_stride)
      : low(((address & kDescriptorAddressBits) >> 4) + (static_cast<uint32>(chunk_stride >> 4) << 16)) {}
  DEVICE uint64 at(int bytes) const {
    constexpr uint32 kHigh = (1024 >> 4) | (1u << 30);
    return low + static_cast<uint32>(bytes >> 4) | static_cast<uint64>(kHigh) << 32;
  }
};

template <class Element>
constexpr bool is_float16 = false;
template <>
constexpr bool is_float16<Float16> = true;

template <int kN, class Element>
struct Product {
  static_assert(kN % 16 == 0 && kN <= 256, "the device has these shapes");

  static DEVICE void shared(float (&d)[kN / 2], uint64 a, uint64 b, bool accumulate, Where where = {}) {
    start(d, nullptr, {a, b, kN, true, false, is_float16<Element>, accumulate, where});
  }
  static DEVICE void shared_rows(float (&d)[kN / 2], uint64 a, uint64 b, bool accumulate, Where where = {}) {
    start(d, nullptr, {a, b, kN, true, true, is_float16<Element>, accumulate, where});
  }
  static DEVICE void registers(float (&d)[kN / 2], const uint32* a, uint64 b, Where where = {}) {
    start(d, a, {0, b, kN, false, true, is_float16<Element>, true, where});
  }

 private:
  static DEVICE void start(float* d, const uint32* a, const twin::ProductOperands& operands) {
    twin::ProductLane lane{operands, d, a};
    twin::start_product(lane);
  }
};

}  // namespace arch
