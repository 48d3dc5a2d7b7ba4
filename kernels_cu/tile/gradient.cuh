// How the CTAs of the backward share the gradient of q: each adds its part of a tile to a float32 accumulator, which lies in
// the order of the threads' registers, so that a warp adds 128 consecutive bytes. backward_finish.cu puts it in order again.
#pragma once

#include "tile/fragment.cuh"
#include "tile/sequence.cuh"

namespace tile {

// The part of a dq tile (block_m x head_dim) that a warp owns: slabs of rows by a range of columns.
template <class Config>
struct DqShare {
  static constexpr int kSlabBlocks = Config::block_m / kSlabRows;
  // Nearly square parts read the fewest operands: four warps side by side where head_dim divides and registers allow, else two;
  // more where there are fewer slabs than warps above each other.
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

  static DEVICE void clear(const BackwardParams& params, int batch, int head, int m_block) {
    const int64 row = statistic_offset(params.shape, batch, head, params.padded_seqlen_q, m_block * Config::block_m);
    float4* accumulator = reinterpret_cast<float4*>(params.dq_accum + row * Config::head_dim) + arch::thread_index();
#pragma unroll
    for (int i = 0; i < Config::block_m * Config::head_dim / 4; i += kThreads) accumulator[i] = {0.f, 0.f, 0.f, 0.f};
  }

  // This thread's first float in the accumulator of a tile; the next ones follow at distance kThreads.
  static DEVICE float* accumulator(const BackwardParams& params, int batch, int head, int m_block) {
    const int64 row = statistic_offset(params.shape, batch, head, params.padded_seqlen_q, m_block * Config::block_m);
    return params.dq_accum + row * Config::head_dim + arch::thread_index();
  }
};

}  // namespace tile
