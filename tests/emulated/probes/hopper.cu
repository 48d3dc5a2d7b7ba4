// Small kernels that show what the twin makes of Hopper's instructions, and that it notices what it should.
#include "arch/sm90.cuh"
#include "tile/pipeline.cuh"
#include "tile/warpgroup.cuh"

struct HopperParams {
  TensorMap a, b;  // boxes of 64 columns by 64 rows (a) or 128 rows (b)
  const void* in;
  float* out;
  int column, row;  // of a box
  int variant;      // which of a probe's ways to go wrong; 0 is right
};

namespace {

constexpr int kBoxBytes = 64 * tile::kChunkRowBytes;

// A barrier for one arrival, made by thread 0 for all.
DEVICE SharedAddress made_barrier(SharedAddress address, bool fenced = true) {
  if (arch::thread_index() == 0) {
    arch::barrier_init(address, 1);
    if (fenced) arch::fence_barrier_init();
  }
  arch::block_barrier();
  return address;
}

DEVICE void dump(const HopperParams& params, SharedAddress from, int floats) {
  for (int i = arch::thread_index(); i < floats; i += kWarpSize) params.out[i] = arch::load_shared_float(from + 4 * i);
}

// out = a (64 x 128) . b (128 x 128)^T, or a . b with the contraction along the rows of b; the left operand in either place.
template <class Element>
DEVICE void product_probe(const HopperParams& params) {
  enum { kShared, kSharedRows, kRegisters };
  const SharedAddress a = arch::shared_base(), b = a + 2 * kBoxBytes, barrier = made_barrier(b + 4 * kBoxBytes);
  if (arch::thread_index() == 0) {
    arch::barrier_arrive_expecting(barrier, 6 * kBoxBytes);
    tile::copy_tile<64, 128>(a, params.a, barrier, 0, 0, 0);
    tile::copy_tile<128, 128>(b, params.b, barrier, 0, 0, 0);
  }
  const int row = arch::warp_index() * tile::kSlabRows + tile::lane_row(), column = tile::lane_column();
  float d[64];
  tile::clear(d);
  uint32 operand[32];
  const uint32* pairs = static_cast<const uint32*>(params.in);  // a, two columns at a time
  for (int k = 0; k < 8; ++k)
    for (int i = 0; i < 4; ++i) operand[4 * k + i] = pairs[(row + i % 2 * 8) * 64 + 8 * k + column / 2 + i / 2 * 4];
  arch::barrier_wait(barrier, 0);
  if (params.variant == kShared) tile::start_transposed<Element, 128, 64, 128>(d, a, 0, b);
  if (params.variant == kSharedRows) tile::start_tiles<Element, 128, 128, 64, 128>(d, a, 0, b, 0);
  if (params.variant == kRegisters) tile::start_registers<Element, 128, 128>(d, operand, b);
  arch::product_wait<0>();
  for (int i = 0; i < 64; ++i) params.out[(row + tile::slab_row(i)) * 128 + column + tile::slab_column(i)] = d[i];
}

}  // namespace

KERNEL(128, 1) product_bfloat16(GRID_CONSTANT HopperParams params) { product_probe<Bfloat16>(params); }
KERNEL(128, 1) product_float16(GRID_CONSTANT HopperParams params) { product_probe<Float16>(params); }

// out = the bytes of a box in shared memory; the box then goes to the same place of the array of map b.
KERNEL(32, 1) boxes(GRID_CONSTANT HopperParams params) {
  const SharedAddress box = arch::shared_base(), barrier = made_barrier(box + kBoxBytes);
  if (arch::thread_index() == 0) {
    arch::barrier_arrive_expecting(barrier, kBoxBytes);
    arch::copy_box_to_shared(box, params.a, barrier, params.column, params.row, 0, 0);
  }
  arch::barrier_wait(barrier, 0);
  dump(params, box, kBoxBytes / 4);
  if (arch::thread_index() == 0) {
    arch::copy_box_to_global(params.b, box, params.column, params.row, 0, 0);
    arch::copy_to_global_commit();
    arch::copy_to_global_wait_read();
  }
}

// out = the 16x16 tile whose four 8x8 matrices the lanes bring in registers, stored as they are or transposed.
KERNEL(32, 1) stored_matrices(GRID_CONSTANT HopperParams params) {
  const SharedAddress tile = arch::shared_base(), mine = tile + 16 * arch::lane_index();
  const uint32* in = static_cast<const uint32*>(params.in) + 4 * arch::lane_index();
  if (params.variant) {
    arch::store_matrix_transposed(mine, in[0], in[1], in[2], in[3]);
  } else {
    arch::store_matrix(mine, in[0], in[1], in[2], in[3]);
  }
  arch::warp_barrier();
  dump(params, tile, 128);
}

// Two blocks of one warp each copy 64 floats of in to shared memory, double them there, and add them to out.
KERNEL(32, 1) added_floats(GRID_CONSTANT HopperParams params) {
  const SharedAddress floats = arch::shared_base(), barrier = made_barrier(floats + 256);
  if (arch::thread_index() == 0) {
    arch::barrier_arrive_expecting(barrier, 256);
    arch::copy_bytes_to_shared(floats, params.in, 256, barrier);
  }
  arch::barrier_wait(barrier, 0);
  for (int i = 0; i < 64; i += kWarpSize) {
    const SharedAddress mine = floats + 4 * (i + arch::lane_index());
    arch::store_shared(mine, 2.f * arch::load_shared_float(mine));
  }
  arch::fence_async_proxy();
  arch::warp_barrier();
  if (arch::thread_index() == 0) {
    arch::add_floats_to_global(params.out, floats, 256);
    arch::copy_to_global_commit();
    arch::copy_to_global_wait_read();
  }
}

// A box comes, and 32 floats of the block's own leave: each variant skips or spoils one step.
KERNEL(32, 1) copy_rules(GRID_CONSTANT HopperParams params) {
  enum { kRight, kNoInitFence, kNoBarrier, kNoWait, kBytes, kArrivals, kMisaligned, kNoMap, kOverflows, kNoProxyFence, kOverwrites };
  enum { kLeaves = kOverwrites + 1 };
  const int variant = params.variant;
  const bool leader = arch::thread_index() == 0;
  const SharedAddress box = arch::shared_base(), floats = box + kBoxBytes;
  const SharedAddress barrier = made_barrier(floats + 128, variant != kNoInitFence);
  if (leader) {
    arch::barrier_arrive_expecting(barrier, variant == kBytes ? kBoxBytes + 16 : kBoxBytes);
    if (variant == kArrivals) arch::barrier_arrive(barrier);
    const SharedAddress to = variant == kMisaligned ? box + 64 : variant == kOverflows ? box + kBoxBytes : box;
    const TensorMap none = {};
    arch::copy_box_to_shared(to, variant == kNoMap ? none : params.a, variant == kNoBarrier ? barrier + 8 : barrier, 0, 0, 0, 0);
  }
  arch::warp_barrier();
  if (variant != kNoWait) arch::barrier_wait(barrier, 0);
  arch::load_shared_float(box + 4 * arch::lane_index());
  arch::store_shared(floats + 4 * arch::lane_index(), 1.f);
  if (variant != kNoProxyFence) arch::fence_async_proxy();
  arch::warp_barrier();
  if (leader) {
    arch::add_floats_to_global(params.out, floats, 128);
    arch::copy_to_global_commit();
    if (variant != kOverwrites && variant != kLeaves) arch::copy_to_global_wait_read();
  }
  arch::warp_barrier();
  if (variant != kLeaves) arch::store_shared(floats + 4 * arch::lane_index(), 2.f);
  if (leader && variant == kOverwrites) arch::copy_to_global_wait_read();
}

// Two warps pass a float on behind numbered barriers.
KERNEL(64, 1) named_rules(GRID_CONSTANT HopperParams params) {
  enum { kRight, kNoBarrier, kCount, kNumber, kNobodyComes, kLanesDiffer };
  const int variant = params.variant, warp = arch::warp_index();
  const SharedAddress mine = arch::shared_base() + 4 * arch::lane_index();
  const int number = variant == kNumber ? 16 : variant == kLanesDiffer && arch::lane_index() == 3 ? 2 : 1;
  if (warp == 0) {
    arch::store_shared(mine, 1.f);
    if (variant != kNobodyComes && variant != kNoBarrier) arch::named_barrier_arrive(number, variant == kCount ? 96 : 64);
  } else {
    if (variant != kNoBarrier) arch::named_barrier_sync(number, 64);
    params.out[arch::lane_index()] = arch::load_shared_float(mine);
  }
}

// One product of a warpgroup on operands that it wrote itself.
KERNEL(128, 1) product_rules(GRID_CONSTANT HopperParams params) {
  enum { kRight, kNoFence, kNoProxyFence, kNoBarrier, kNoWait, kAccumulator, kOperand, kSharedOperand, kWarpsDiffer, kSwizzle };
  enum { kLeaves = kSwizzle + 1, kNoCommit };
  const int variant = params.variant, thread = arch::thread_index();
  const SharedAddress b = arch::shared_base();  // 16 rows of 64 columns
  arch::store_shared(b + 16 * thread, 0.f, 0.f, 0.f, 0.f);
  if (variant != kNoProxyFence) arch::fence_async_proxy();
  if (variant != kNoBarrier) arch::block_barrier();
  float d[32];
  tile::clear(d);
  uint32 operand[4] = {};
  if (variant != kNoFence) arch::product_fence();
  const arch::ProductOperand right(b, 16);
  const uint64 other = variant == kSwizzle ? 1ull << 62 ^ 2ull << 62 : 0;
  if (variant == kWarpsDiffer && arch::warp_index() == 2) {
    arch::Product<64, Bfloat16>::registers(d, operand, right.at(1024));
  } else {
    arch::Product<64, Bfloat16>::registers(d, operand, right.at(0) ^ other);
  }
  if (variant != kNoCommit) arch::product_commit();
  if (variant == kAccumulator) d[5] += 1.f;
  if (variant == kOperand) operand[2] = 7;
  if (variant == kSharedOperand) arch::store_shared(b + 16 * thread, 1.f);
  if (variant == kLeaves) return;
  if (variant != kNoWait) arch::product_wait<0>();
  for (int i = 0; i < 32; ++i) params.out[thread * 32 + i] = d[i];
  if (variant == kNoWait) arch::product_wait<0>();
}

// Half of the block hands registers to the other half.
KERNEL(256, 1) register_rules(GRID_CONSTANT HopperParams params) {
  enum { kRight, kNothingHandedOver, kNoMultiple, kRaises };
  const int variant = params.variant;
  if (arch::warpgroup_index() == 0) {
    if (variant == kRaises) arch::lower_registers<256>();
    if (variant != kNothingHandedOver) arch::lower_registers<240>();
  } else {
    if (variant == kNoMultiple) arch::raise_registers<252>();
    arch::raise_registers<256>();
  }
}
