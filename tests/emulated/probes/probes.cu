// Small kernels that show what the twin computes, and that it notices what it should: test_twin.py runs them.
#include "arch/sm80.cuh"

struct ProbeParams {
  const void* in;
  void* out;
  int* turn;
  int variant;  // which of a probe's ways to go wrong; 0 is right
};

namespace {

template <class T>
DEVICE T* at(void* data, int index) {
  return static_cast<T*>(data) + index;
}
template <class T>
DEVICE const T* at(const void* data, int index) {
  return static_cast<const T*>(data) + index;
}

// out[lane][4]: the registers that a lane receives from a 16x16 tile of 16-bit elements in shared memory.
template <bool kTransposed>
DEVICE void load_probe(const ProbeParams& params) {
  const int lane = arch::lane_index();
  const SharedAddress tile = arch::shared_base();
  arch::copy_async<16>(tile + 16 * lane, at<char>(params.in, 16 * lane), true);
  arch::copy_async_commit();
  arch::copy_async_wait<0>();
  arch::warp_barrier();
  uint32 registers[4];
  const SharedAddress address = tile + 16 * lane;
  if constexpr (kTransposed) {
    arch::load_matrix_transposed(registers, address);
  } else {
    arch::load_matrix(registers, address);
  }
  for (int i = 0; i < 4; ++i) *at<uint32>(params.out, 4 * lane + i) = registers[i];
}

// out (16 x 8) = 1 + a (16 x 16) . b (8 x 16)^T; in holds a, then b.
template <class Element>
DEVICE void mma_probe(const ProbeParams& params) {
  const int row = arch::lane_index() / 4, pair = arch::lane_index() % 4;
  const uint32* a = at<uint32>(params.in, 0);
  const uint32* b = a + 16 * 8;
  const uint32 operand[4] = {a[row * 8 + pair], a[(row + 8) * 8 + pair], a[row * 8 + pair + 4], a[(row + 8) * 8 + pair + 4]};
  float d[4] = {1.f, 1.f, 1.f, 1.f};
  arch::mma_m16n8k16<Element>(d, operand, b[row * 8 + pair], b[row * 8 + pair + 4]);
  for (int i = 0; i < 4; ++i) *at<float>(params.out, (row + i / 2 * 8) * 8 + 2 * pair + i % 2) = d[i];
}

// out[i] = pack(in[i], in[i]); out[n + i] = the two halves of it, widened again.
template <class Element>
DEVICE void convert_probe(const ProbeParams& params) {
  const int i = arch::block_index() * kWarpSize + arch::lane_index();
  const uint32 pair = arch::pack<Element>(*at<float>(params.in, i), -*at<float>(params.in, i));
  *at<uint32>(params.out, 3 * i) = pair;
  *at<float>(params.out, 3 * i + 1) = arch::unpack_low<Element>(pair);
  *at<float>(params.out, 3 * i + 2) = arch::unpack_high<Element>(pair);
}

}  // namespace

KERNEL(32, 1) load_plain(GRID_CONSTANT ProbeParams params) { load_probe<false>(params); }
KERNEL(32, 1) load_transposed(GRID_CONSTANT ProbeParams params) { load_probe<true>(params); }
KERNEL(32, 1) mma_bfloat16(GRID_CONSTANT ProbeParams params) { mma_probe<Bfloat16>(params); }
KERNEL(32, 1) mma_float16(GRID_CONSTANT ProbeParams params) { mma_probe<Float16>(params); }
KERNEL(32, 1) convert_bfloat16(GRID_CONSTANT ProbeParams params) { convert_probe<Bfloat16>(params); }
KERNEL(32, 1) convert_float16(GRID_CONSTANT ProbeParams params) { convert_probe<Float16>(params); }

// out[lane] = lane 0's value + 100 * (whether any lane has `variant`) + 1000 * (the value that an atomic add found)
KERNEL(32, 1) votes(GRID_CONSTANT ProbeParams params) {
  const int lane = arch::lane_index();
  const int value = *at<int>(params.in, lane);
  const int found = arch::any(value == params.variant) ? 100 : 0;
  *at<int>(params.out, lane) = arch::broadcast(value) + found + 1000 * arch::fetch_add(params.turn, arch::grid_size());
}

KERNEL(32, 1) shuffle(GRID_CONSTANT ProbeParams params) {
  const int lane = arch::lane_index();
  *at<float>(params.out, lane) = arch::shuffle_xor(*at<float>(params.in, lane), params.variant);
}

// Four warps sum tiles of in (8 tiles of 128 floats) that a two-stage pipeline brings; each reads what another warp's threads copied.
KERNEL(128, 1) pipeline(GRID_CONSTANT ProbeParams params) {
  enum { kRight, kNoWait, kNoBarrier, kNoCommit, kOneStage };
  const int thread = arch::thread_index();
  const int num_stages = params.variant == kOneStage ? 1 : 2;
  const auto stage = [&](int tile) { return arch::shared_base() + tile % num_stages * 512; };
  const auto load = [&](int tile) {
    arch::copy_async<4>(stage(tile) + 4 * thread, at<float>(params.in, 128 * tile + thread), true);
    if (params.variant != kNoCommit) arch::copy_async_commit();
  };
  load(0);
  float sum = 0.f;
  for (int tile = 0; tile < 8; ++tile) {
    if (params.variant != kNoWait) arch::copy_async_wait<0>();
    if (params.variant != kNoBarrier) arch::block_barrier();
    if (tile < 7) load(tile + 1);
    sum += arch::load_shared_float(stage(tile) + 4 * (127 - thread));
    sum += arch::shuffle_xor(sum, 1);  // a place where another warp may run ahead
  }
  *at<float>(params.out, thread) = sum;
}

// A copy with valid = false writes zeros and reads nothing; one with valid = true reads `in`, which the caller has not registered.
KERNEL(32, 1) invalid_copy(GRID_CONSTANT ProbeParams params) {
  const SharedAddress mine = arch::shared_base() + 16 * arch::lane_index();
  arch::copy_async<16>(mine, params.in, params.variant != 0);
  arch::copy_async_commit();
  arch::copy_async_wait<0>();
  *at<float>(params.out, arch::lane_index()) = arch::load_shared_float(mine);
}

KERNEL(32, 1) shared_bounds(GRID_CONSTANT ProbeParams params) {
  enum { kRight, kPastEnd, kBeforeBegin, kMisaligned };
  const int shift = params.variant == kPastEnd ? 128 : params.variant == kBeforeBegin ? -4 : params.variant == kMisaligned ? 2 : 0;
  arch::store_shared(arch::shared_base() + 4 * arch::lane_index() + shift, 1.f);
}

KERNEL(32, 1) global_bounds(GRID_CONSTANT ProbeParams params) {
  enum { kRight, kReadPastEnd, kWritePastEnd, kMisaligned, kWriteInput };
  const int lane = arch::lane_index();
  uint32 words[1];
  const int misaligned = params.variant == kMisaligned ? 2 : 0;
  arch::load_global<4>(words, at<char>(params.in, 4 * (lane + (params.variant == kReadPastEnd)) + misaligned));
  float* const out = params.variant == kWriteInput ? static_cast<float*>(const_cast<void*>(params.in)) : at<float>(params.out, 0);
  arch::reduce_add(out + lane + (params.variant == kWritePastEnd), 1.f);
}

// Lanes that do not do the same.
KERNEL(64, 1) divergence(GRID_CONSTANT ProbeParams params) {
  enum { kRight, kOtherCollective, kOtherLine, kLeaves, kLaneMissesBarrier, kWarpMissesBarrier, kWarpLeaves };
  const int lane = arch::lane_index(), warp = arch::warp_index();
  const int variant = params.variant;
  if (variant == kLeaves && lane == 7) return;
  if (variant == kWarpLeaves && warp == 1) return;
  if (variant == kOtherCollective && lane < 16) {
    arch::warp_barrier();
  } else if (variant == kOtherLine && lane < 16) {
    arch::shuffle_xor(1.f, 1);
  } else {
    arch::shuffle_xor(1.f, 1);
  }
  if (variant != kLaneMissesBarrier || lane != 3)
    if (variant != kWarpMissesBarrier || warp != 1) arch::block_barrier();
  *at<float>(params.out, arch::thread_index()) = 1.f;
}

// A value passes from one thread to another through shared memory, in both directions of hazard.
KERNEL(64, 1) races(GRID_CONSTANT ProbeParams params) {
  enum { kRight, kWarpReadsLane, kLaneOverwrites, kReadsOtherWarp, kOverwritesOtherWarp, kSameWord };
  const int thread = arch::thread_index(), variant = params.variant;
  const SharedAddress base = arch::shared_base();
  const int neighbour = thread ^ 1, stranger = thread ^ 32;
  arch::store_shared(base + 4 * thread, static_cast<float>(thread));
  if (variant != kWarpReadsLane) arch::warp_barrier();
  float value = arch::load_shared_float(base + 4 * neighbour);
  if (variant != kLaneOverwrites) arch::warp_barrier();
  arch::store_shared(base + 4 * thread, value);
  if (variant != kReadsOtherWarp) arch::block_barrier();
  value += arch::load_shared_float(base + 4 * stranger);
  if (variant != kOverwritesOtherWarp) arch::block_barrier();
  arch::store_shared(base + 4 * (variant == kSameWord ? thread / 2 : thread), value);
  *at<float>(params.out, thread) = value;
}

// Blocks add to the same floats in the order of their index, as a deterministic reduction does.
KERNEL(64, 1) turns(GRID_CONSTANT ProbeParams params) {
  enum { kRight, kNoWait, kPassesEarly, kReversed };
  const int turn = params.variant == kReversed ? 7 - arch::block_index() : arch::block_index();
  if (params.variant != kNoWait) {
    if (arch::thread_index() == 0) arch::wait_for_turn(params.turn, turn);
    arch::block_barrier();
  }
  if (params.variant == kPassesEarly && arch::thread_index() == 0) arch::pass_turn(params.turn, turn + 1);
  arch::warp_barrier();  // a place where another block may run ahead
  const int thread = arch::thread_index();
  arch::reduce_add(at<float>(params.out, thread), *at<float>(params.in, 64 * arch::block_index() + thread));
  arch::block_barrier();
  if (params.variant != kPassesEarly && arch::thread_index() == 0) arch::pass_turn(params.turn, turn + 1);
}
