// What every architecture from sm_80 on shares: types, approximations, shuffles, shared-memory access, barriers, atomics.
// This folder is the only home of inline PTX. tests/emulated/twin holds the same names for the host, so that kernels run without a GPU.
#pragma once

#include "params.cuh"

#define DEVICE __device__ __forceinline__
#define KERNEL(threads, min_blocks) extern "C" __global__ void __launch_bounds__(threads, min_blocks)
#define GRID_CONSTANT const __grid_constant__

// Addresses of shared memory are 32-bit offsets in the shared window: what ldmatrix, cp.async and TMA take.
using SharedAddress = uint32;

constexpr int kWarpSize = 32;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

namespace arch {

DEVICE float infinity() { return __int_as_float(0x7f800000); }
// Volatile, so that a kernel can work out its tile anew at its end instead of holding it in registers through its loop.
DEVICE int block_index() {
  int index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  return index;
}
// Of a CTA in its cluster of kCtas, which only sm_90a has: arch/sm90.cuh. Volatile for the same reason.
template <int kCtas>
DEVICE int cluster_rank() {
  if constexpr (kCtas == 1) return 0;
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
DEVICE int thread_index() { return threadIdx.x; }
DEVICE int lane_index() { return threadIdx.x % kWarpSize; }  // one-dimensional blocks
DEVICE int warp_index() { return threadIdx.x / kWarpSize; }

DEVICE int grid_size() { return gridDim.x; }

DEVICE void block_barrier() { __syncthreads(); }
DEVICE void warp_barrier() { __syncwarp(); }

DEVICE float shuffle_xor(float value, int lane_mask) { return __shfl_xor_sync(0xffffffffu, value, lane_mask); }
DEVICE uint32 shuffle_xor(uint32 value, int lane_mask) { return __shfl_xor_sync(0xffffffffu, value, lane_mask); }

// Lane 0's value in all lanes; the compiler then knows that it is the same in all.
DEVICE int broadcast(int value) { return __shfl_sync(0xffffffffu, value, 0); }
DEVICE bool any(bool condition) { return __any_sync(0xffffffffu, condition); }

// One MUFU instruction each; relative error about 2^-22 (exp2, log2) and 1 ulp (reciprocal).
DEVICE float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float log2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
DEVICE float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

DEVICE float maximum(float a, float b) { return fmaxf(a, b); }
DEVICE float absolute(float x) { return fabsf(x); }
// A positive number with the highest bit of `sign` as its sign.
DEVICE float with_sign(float x, uint32 sign) { return __uint_as_float(__float_as_uint(x) | (sign & 0x80000000u)); }
DEVICE float multiply_add(float a, float b, float c) { return __fmaf_rn(a, b, c); }

// ---- 16-bit elements: two in a 32-bit register, the lower index in the lower half --------------------------------------------------

template <typename Element>
DEVICE uint32 pack(float low, float high);
// Negative numbers become zero.
template <typename Element>
DEVICE uint32 pack_relu(float low, float high);
template <typename Element>
DEVICE float unpack_low(uint32 pair);
template <typename Element>
DEVICE float unpack_high(uint32 pair);

template <>
DEVICE uint32 pack<Bfloat16>(float low, float high) {
  uint32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
DEVICE uint32 pack_relu<Bfloat16>(float low, float high) {
  uint32 pair;
  asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
DEVICE float unpack_low<Bfloat16>(uint32 pair) {
  return __uint_as_float(pair << 16);
}
template <>
DEVICE float unpack_high<Bfloat16>(uint32 pair) {
  return __uint_as_float(pair & 0xffff0000u);
}
template <>
DEVICE uint32 pack<Float16>(float low, float high) {
  uint32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
DEVICE uint32 pack_relu<Float16>(float low, float high) {
  uint32 pair;
  asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <>
DEVICE float unpack_low<Float16>(uint32 pair) {
  float value;
  asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, low;}" : "=f"(value) : "r"(pair));
  return value;
}
template <>
DEVICE float unpack_high<Float16>(uint32 pair) {
  float value;
  asm("{.reg .b16 low, high; mov.b32 {low, high}, %1; cvt.f32.f16 %0, high;}" : "=f"(value) : "r"(pair));
  return value;
}

// ---- shared memory ------------------------------------------------------------------------------------------------------------------

DEVICE SharedAddress shared_base() {
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  return static_cast<SharedAddress>(__cvta_generic_to_shared(shared_memory));
}
DEVICE void store_shared(SharedAddress address, uint32 value) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}
DEVICE void store_shared(SharedAddress address, float value) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}
DEVICE float load_shared_float(SharedAddress address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}
DEVICE int load_shared_int(SharedAddress address) {
  int value;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
  return value;
}
DEVICE float2 load_shared_float2(SharedAddress address) {
  float2 value;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(value.x), "=f"(value.y) : "r"(address) : "memory");
  return value;
}
DEVICE float4 load_shared_float4(SharedAddress address) {
  float4 value;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(value.x), "=f"(value.y), "=f"(value.z), "=f"(value.w)
               : "r"(address)
               : "memory");
  return value;
}

// Copies kBytes (16, 8, 4 or 2) from shared to global memory.
template <int kBytes>
DEVICE void copy_shared_to_global(void* global, SharedAddress address) {
  if constexpr (kBytes == 16) {
    uint4 value;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(address)
                 : "memory");
    *static_cast<uint4*>(global) = value;
  } else if constexpr (kBytes == 8) {
    uint2 value;
    asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(value.x), "=r"(value.y) : "r"(address) : "memory");
    *static_cast<uint2*>(global) = value;
  } else if constexpr (kBytes == 4) {
    uint32 value;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(value) : "r"(address) : "memory");
    *static_cast<uint32*>(global) = value;
  } else {
    unsigned short value;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(address) : "memory");
    *static_cast<unsigned short*>(global) = value;
  }
}

// ---- global memory ------------------------------------------------------------------------------------------------------------------

// kBytes (16, 8, 4 or 2) as 32-bit words, read once: no allocation in L1.
template <int kBytes>
DEVICE void load_global(uint32 (&words)[kBytes == 2 ? 1 : kBytes / 4], const void* global) {
  if constexpr (kBytes == 16) {
    const uint4 value = __ldg(static_cast<const uint4*>(global));
    words[0] = value.x, words[1] = value.y, words[2] = value.z, words[3] = value.w;
  } else if constexpr (kBytes == 8) {
    const uint2 value = __ldg(static_cast<const uint2*>(global));
    words[0] = value.x, words[1] = value.y;
  } else if constexpr (kBytes == 4) {
    words[0] = __ldg(static_cast<const uint32*>(global));
  } else {
    words[0] = __ldg(static_cast<const unsigned short*>(global));
  }
}
// 16 bytes.
DEVICE void store_global(void* global, const uint32 (&words)[4]) {
  *static_cast<uint4*>(global) = {words[0], words[1], words[2], words[3]};
}
DEVICE void store_global(void* global, uint32 low, uint32 high) { *static_cast<uint2*>(global) = {low, high}; }
// Brings a line of global memory near, for a thread that has no registers to wait for it in.
DEVICE void prefetch_line(const void* global) { asm volatile("prefetch.global.L1 [%0];" ::"l"(global) : "memory"); }
DEVICE void reduce_add(float* address, float value) {
  asm volatile("red.global.add.f32 [%0], %1;" ::"l"(address), "f"(value) : "memory");
}
DEVICE int fetch_add(int* address, int value) { return atomicAdd(address, value); }
// Waits until *turn is `expected`, then orders every later access of this thread behind the writes that the previous owner published.
// Whoever waits long sleeps between looks, so that many who look leave memory to those who work.
template <int kNapNanoseconds = 0>
DEVICE void wait_for_turn(const int* turn, int expected) {
  for (;;) {
    int seen;
    asm volatile("ld.acquire.gpu.global.b32 %0, [%1];" : "=r"(seen) : "l"(turn) : "memory");
    if (seen == expected) return;
    if constexpr (kNapNanoseconds > 0) __nanosleep(kNapNanoseconds);
  }
}
// Publishes every earlier write of this thread and hands the turn on.
DEVICE void pass_turn(int* turn, int next) {
  asm volatile("st.release.gpu.global.b32 [%0], %1;" ::"l"(turn), "r"(next) : "memory");
}
DEVICE void memory_fence() { __threadfence(); }

}  // namespace arch
