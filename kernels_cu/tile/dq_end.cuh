// How the float32 sums of dq end on Hopper: warps with nothing else to do bring those that are complete to the element type, while
// the tensor cores go on with other tiles. A kernel of its own would read all sums from memory again, and nothing could run beside it.
#pragma once

#include "arch/sm90.cuh"
#include "tile/gradient.cuh"
#include "tile/scheduler.cuh"

namespace tile {

// Tiles of one (batch, head) pair of Work add to the same dq. They are counted when what they add has been written; warps take the
// query blocks of one pair after another, in the order of tiles, and wait for the pair's count. Whoever is waited for is at work.
template <class Config, class Work>
struct DqEnd {
  // As the consumers of backward_sm90 hand dq over: halves of 64 columns or of 64 rows, one of each warpgroup, whose threads lie side
  // by side with four floats each.
  static constexpr int kColumns = 64, kWarps = arch::kWarpgroupSize / kWarpSize, kLaneFloats = 4, kStepColumns = 8;
  static constexpr bool kBySides = Config::block_m == kColumns;
  static constexpr int kHalfFloats = kWarps * kSlabRows * kColumns, kHalves = Config::block_m * Config::head_dim / kHalfFloats;
  static constexpr int kSteps = kColumns / kStepColumns;  // of a warp's rows
  static constexpr int kLineFloats = 32;  // of a cache line
  static_assert(kHalves == 2, "of two warpgroups");
  // Whoever waits is in no hurry: a query block is converted long before the last one.
  static constexpr int kNapNanoseconds = 2000;

  // One thread, once it has added everything that a tile has for dq.
  static DEVICE void tile_is_done(const BackwardParams& params, const Work& work) {
    arch::copy_to_global_wait();
    arch::fence_async_proxy_global();
    arch::memory_fence();
    const uint32 first_pair = work.batch * params.shape.num_heads + work.first_head;
    arch::fetch_add(tiles_done(params) + first_pair / static_cast<uint32>(Work::heads_of_tile(params.shape)), 1);
  }

  // A warp: converts query blocks until none is left, with kAtOnce loads of each lane under way.
  template <int kAtOnce>
  static DEVICE void convert(const BackwardParams& params) {
    const Shape& shape = params.shape;
    const bool leader = arch::lane_index() == 0;
#pragma unroll 1
    for (;;) {
      // Unsigned: divisions by what is not known take fewer registers.
      const uint32 taken = arch::broadcast(leader ? arch::fetch_add(parts_taken(params), 1) : 0);
      const uint32 blocks = static_cast<uint32>(params.padded_seqlen_q) / Config::block_m, pair = taken / kHalves / blocks;
      const uint32 num_heads = shape.num_heads, batch = pair / num_heads;
      if (batch >= static_cast<uint32>(shape.batch)) break;
      const uint32 pair_of_tiles = pair / static_cast<uint32>(Work::heads_of_tile(shape));
      const int tiles = static_cast<uint32>(shape.seqlen_k + Work::kKeys - 1) / Work::kKeys;
      if (leader) arch::wait_for_turn<kNapNanoseconds>(tiles_done(params) + pair_of_tiles, tiles);
      arch::warp_barrier();
      convert_half<kAtOnce>(params, taken, pair % num_heads, batch, taken / kHalves % blocks);
    }
  }

 private:
  template <int kAtOnce>
  static DEVICE void convert_half(const BackwardParams& params, uint32 taken, int head, int batch, int m_block) {
    using Element = typename Config::Element;
    bool begun = true;  // no key block has stored anything for queries that see no key
    if constexpr (Config::first_stores) begun = *turn_of<Config>(params, batch, head, m_block) != 0;
    if constexpr (kAtOnce < kSteps) {  // else everything is under way anyhow
      const float* lines = params.dq_accum + static_cast<int64>(taken) * kHalfFloats + arch::lane_index() * kLineFloats;
#pragma unroll
      for (int i = 0; i < kHalfFloats / (kWarpSize * kLineFloats); ++i) arch::prefetch_line(lines + i * (kWarpSize * kLineFloats));
    }
    const int half = static_cast<int>(taken % kHalves) * kColumns, lane = arch::lane_index();
    const int row = m_block * Config::block_m + (kBySides ? 0 : half) + lane_row();
    // Neighbours exchange: of two steps, one takes four columns of the first, the other four of the second. So a quad writes 32 bytes.
    const bool is_odd = lane % 2;
    const int column = (kBySides ? half : 0) + lane_column() + (is_odd ? kStepColumns - 2 : 0);
    uint32 four_at = taken * (kHalfFloats / kLaneFloats) + lane;
    char* destination = HeadRows<Element>(params.dq, batch, head).row(row) + 2 * column;
    int rows = params.shape.seqlen_q - row, columns = params.shape.head_dim - column;
#pragma unroll 1
    for (int step = 0; step < kWarps * kSteps; step += kAtOnce) {
      float4 four[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        four[i] = reinterpret_cast<const float4*>(params.dq_accum)[four_at + i * arch::kWarpgroupSize];
#pragma unroll
      for (int i = 0; i < kAtOnce; i += 2) {
        const float scale = params.score.scale;
        const uint32 top[2] = {arch::pack<Element>(four[i].x * scale, four[i].y * scale),
                               arch::pack<Element>(four[i + 1].x * scale, four[i + 1].y * scale)};
        const uint32 bottom[2] = {arch::pack<Element>(four[i].z * scale, four[i].w * scale),
                                  arch::pack<Element>(four[i + 1].z * scale, four[i + 1].w * scale)};
        char* const there = destination + 2 * i * kStepColumns;
        const bool inside = columns > i * kStepColumns;
        store_neighbours(there, top, is_odd, begun, inside && rows > 0);
        store_neighbours(there + 16 * params.dq.row_stride, bottom, is_odd, begun, inside && rows > 8);
      }
      four_at += kAtOnce * arch::kWarpgroupSize;
      destination += 2 * kAtOnce * kStepColumns;
      columns -= kAtOnce * kStepColumns;
      if ((step + kAtOnce) % kSteps == 0) {  // the rows of the next warp
        four_at += kWarpSize - kHalfFloats / kLaneFloats;
        destination += 2 * kSlabRows * params.dq.row_stride - 2 * kColumns;
        columns += kColumns;
        rows -= kSlabRows;
      }
    }
  }

  // `pairs` are two columns each of two steps of 8 columns.
  static DEVICE void store_neighbours(char* destination, const uint32 (&pairs)[2], bool is_odd, bool begun, bool inside) {
    const uint32 received = arch::shuffle_xor(is_odd ? pairs[0] : pairs[1], 1);
    const uint32 low = is_odd ? received : pairs[0], high = is_odd ? pairs[1] : received;
    if (inside) arch::store_global(destination, begun ? low : 0u, begun ? high : 0u);
  }
};

}  // namespace tile
