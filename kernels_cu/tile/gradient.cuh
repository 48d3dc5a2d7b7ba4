// How the CTAs of the backward share the gradient of q: each adds its part of a tile to a float32 accumulator, which lies in
// the order of the threads' registers, so that a warp adds 128 consecutive bytes. backward_finish.cu puts it in order again, on Hopper
// tile/dq_end.cuh.
#pragma once

#include "tile/fragment.cuh"
#include "tile/sequence.cuh"

namespace tile {

// Whose turn it is to add to a dq tile: key blocks add one after another where the sum is to be repeatable. Or whether it is begun:
// where the first key block stores its part and the others add to it, nothing has to be cleared.
template <class Config>
DEVICE int* turn_of(const BackwardParams& params, int batch, int head, int m_block) {
  const int64 pair = static_cast<int64>(batch) * params.shape.num_heads + head;
  return params.dq_turn + pair * (params.padded_seqlen_q / Config::block_m) + m_block;
}

// Counts of Hopper's conversion of dq: the parts that have been taken, then for each (batch, head) pair of tiles how many are done.
DEVICE int* parts_taken(const BackwardParams& params) { return params.dq_done; }
DEVICE int* tiles_done(const BackwardParams& params) { return params.dq_done + 1; }

// Per-query values of the thread's elements of a slab with queries as columns: all loaded ahead of their use, or each at its use.
template <int kSize, bool kAhead>
struct RowValues {
  SharedAddress address;
  float2 pairs[kAhead ? kSize / 4 : 1];

  DEVICE explicit RowValues(SharedAddress statistic) : address(statistic + 4 * lane_column()) {}
  DEVICE void load_ahead() {
    if constexpr (kAhead) {
#pragma unroll
      for (int j = 0; j < kSize / 4; ++j) pairs[j] = arch::load_shared_float2(address + 32 * j);
    }
  }
  // Of element i, in ascending order.
  DEVICE float operator[](int i) {
    if constexpr (!kAhead) {
      if (i % 4 == 0) pairs[0] = arch::load_shared_float2(address + 8 * i);
    }
    const float2 pair = pairs[kAhead ? i / 4 : 0];
    return i % 2 ? pair.y : pair.x;
  }
};

// The part of a dq tile (block_m x head_dim) that a warp owns: slabs of rows by a range of columns; and where the accumulator has
// each register of a slab.
template <class Config>
struct DqShare {
  static constexpr int kSlabBlocks = Config::block_m / kSlabRows;
  // Nearly square parts read the fewest operands: four warps side by side where head_dim divides and registers allow, else two; more
  // where slabs are fewer than warps.
  static constexpr int kPreferred = Config::num_warps == 8 && (Config::head_dim == 64 || Config::head_dim == 128) ? 4 : 2;
  static constexpr int kLeast = Config::num_warps / kSlabBlocks;
  static constexpr int kWarpsN = kPreferred > kLeast ? kPreferred : kLeast;
  static constexpr int kWarpsM = Config::num_warps / kWarpsN;
  static constexpr int kSlabs = kSlabBlocks / kWarpsM;
  static constexpr int kColumns = Config::head_dim / kWarpsN;
  static constexpr int kThreads = Config::num_warps * kWarpSize;
  static_assert(kWarpsM * kSlabs == kSlabBlocks && kWarpsN * kWarpsM == Config::num_warps, "warps divide the rows of a dq tile");
  static_assert(kColumns % 16 == 0, "warps divide the columns of a dq tile in multiples of 16");

  static DEVICE int row() { return arch::warp_index() % kWarpsM * kSlabs * kSlabRows; }
  static DEVICE int column() { return arch::warp_index() / kWarpsM * kColumns; }

  // The accumulator of a tile.
  static DEVICE float* accumulator(const BackwardParams& params, int batch, int head, int m_block) {
    const int64 row = statistic_offset(params.shape, batch, head, params.padded_seqlen_q, m_block * Config::block_m);
    return params.dq_accum + row * Config::head_dim;
  }
  // Element i of slab s: threads side by side.
  static DEVICE int offset(int s, int i) { return (s * (kColumns / 2) + i) * kThreads + arch::thread_index(); }

  static DEVICE void clear(const BackwardParams& params, int batch, int head, int m_block) {
    float4* floats = reinterpret_cast<float4*>(accumulator(params, batch, head, m_block)) + arch::thread_index();
#pragma unroll
    for (int i = 0; i < Config::block_m * Config::head_dim / 4; i += kThreads) floats[i] = {0.f, 0.f, 0.f, 0.f};
  }
};

// Where each query head of a group has tiles of its own, dk and dv of the group are summed in float32: rows of dk and dv side by side.
template <class Config>
struct GroupSums {
  static constexpr int kColumns = Config::head_dim + Config::head_dim_v;

  static DEVICE float* row(const BackwardParams& params, int batch, int kv_head, int key) {
    const int64 pair = static_cast<int64>(batch) * params.shape.num_kv_heads + kv_head;
    return params.dkv_accum + (pair * params.padded_seqlen_k + key) * kColumns;
  }

  // All threads of a grid of `threads` share the work.
  static DEVICE void clear(const BackwardParams& params, int64 thread, int64 threads) {
    const int64 rows = static_cast<int64>(params.shape.batch) * params.shape.num_kv_heads * params.padded_seqlen_k;
    float4* floats = reinterpret_cast<float4*>(params.dkv_accum);
    for (int64 i = thread; i < rows * (kColumns / 4); i += threads) floats[i] = {0.f, 0.f, 0.f, 0.f};
  }
};

}  // namespace tile
