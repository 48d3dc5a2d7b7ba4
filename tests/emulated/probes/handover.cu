// How backward_keys_sm90.cu hands probabilities over, and nothing else: a warpgroup writes one of two buffers and arrives at a named
// barrier, another waits at it, reads what its threads' counterparts wrote, and arrives at the barrier of the empty buffer. By the rules
// of bar.arrive that is ordered. The twin agrees; whether compute-sanitizer does is asked of it (tests/gpu/sanitize.py).
#include "arch/sm90.cuh"

struct HandoverParams {
  float* out;      // one sum for each thread of the second warpgroup
  int early_read;  // 1: it reads before it waits, which is a race
  int padding;
};

namespace {

constexpr int kUses = 6, kFullBarrier = 4, kEmptyBarrier = 6;
constexpr int kThreads = 2 * arch::kWarpgroupSize, kBufferBytes = 16 * arch::kWarpgroupSize;

DEVICE SharedAddress place(int use) {
  return arch::shared_base() + use % 2 * kBufferBytes + arch::thread_index() % arch::kWarpgroupSize * 16;
}

}  // namespace

KERNEL(kThreads, 1) hand_over(GRID_CONSTANT HandoverParams params) {
  if (arch::warpgroup_index() == 0) {
#pragma unroll 1
    for (int use = 0; use < kUses; ++use) {
      const float value = static_cast<float>(use + arch::thread_index());
      arch::named_barrier_sync(kEmptyBarrier + use % 2, kThreads);
      arch::store_shared(place(use), value, value + 1.f, value + 2.f, value + 3.f);
      arch::named_barrier_arrive(kFullBarrier + use % 2, kThreads);
    }
  } else {
    float sum = 0.f;
    for (int buffer = 0; buffer < 2; ++buffer) arch::named_barrier_arrive(kEmptyBarrier + buffer, kThreads);
#pragma unroll 1
    for (int use = 0; use < kUses; ++use) {
      if (!params.early_read) arch::named_barrier_sync(kFullBarrier + use % 2, kThreads);
      const float4 four = arch::load_shared_float4(place(use));
      sum += four.x + four.y + four.z + four.w;
      if (params.early_read) arch::named_barrier_sync(kFullBarrier + use % 2, kThreads);
      arch::named_barrier_arrive(kEmptyBarrier + use % 2, kThreads);
    }
    params.out[arch::thread_index() % arch::kWarpgroupSize] = sum;
  }
}
