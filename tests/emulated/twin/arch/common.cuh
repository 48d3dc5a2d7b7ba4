// The host twin of kernels_cu/arch/common.cuh: the same names, on the machine of machine/. What has no meaning for one host thread
// (memory order, cache hints) is dropped; everything else is checked.
#pragma once

#include <stdint.h>

#include "machine/machine.h"
#include "params.cuh"

#define DEVICE inline
// TWIN_EXPORT reads how many blocks a cluster has.
#define KERNEL(threads, min_blocks)         \
  using ClusterShape = twin::ClusterOf<1>; \
  extern "C" void
#define GRID_CONSTANT const

using SharedAddress = uint32;

constexpr int kWarpSize = 32;
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// The standard headers that declare such functions take longer to parse than a kernel takes to compile; builtins need none.
template <typename T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
inline int abs(int value) { return __builtin_abs(value); }

struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

namespace arch {

using twin::Where;

template <typename To, typename From>
To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

DEVICE float infinity() { return __builtin_inff(); }
DEVICE int grid_size() { return twin::grid_size(); }
DEVICE int block_index() { return twin::block_index(); }
template <int kCtas>
DEVICE int cluster_rank() {
  return twin::cluster_rank();
}
DEVICE int thread_index() { return twin::thread_index(); }
DEVICE int lane_index() { return twin::thread_index() % kWarpSize; }
DEVICE int warp_index() { return twin::thread_index() / kWarpSize; }

DEVICE void block_barrier(Where where = {}) { twin::block_barrier(where); }
DEVICE void warp_barrier(Where where = {}) { twin::warp_barrier(where); }

struct Shuffle {
  uint32 value;
  int lane_mask;
  uint32 result;
};
DEVICE void exchange(Shuffle* const* lanes) {
  for (int lane = 0; lane < kWarpSize; ++lane) lanes[lane]->result = lanes[lane ^ lanes[lane]->lane_mask]->value;
}
DEVICE uint32 shuffle_xor(uint32 value, int lane_mask, Where where = {}) {
  Shuffle shuffle{value, lane_mask, 0};
  twin::meet<Shuffle, exchange>("shuffle_xor", shuffle, where);
  return shuffle.result;
}
DEVICE float shuffle_xor(float value, int lane_mask, Where where = {}) {
  return bit_cast<float>(shuffle_xor(bit_cast<uint32>(value), lane_mask, where));
}

struct Vote {
  int value;
  int result;
};
DEVICE void give_first(Vote* const* lanes) {
  for (int lane = 0; lane < kWarpSize; ++lane) lanes[lane]->result = lanes[0]->value;
}
DEVICE void give_any(Vote* const* lanes) {
  int any = 0;
  for (int lane = 0; lane < kWarpSize; ++lane) any |= lanes[lane]->value;
  for (int lane = 0; lane < kWarpSize; ++lane) lanes[lane]->result = any;
}
DEVICE int broadcast(int value, Where where = {}) {
  Vote vote{value, 0};
  twin::meet<Vote, give_first>("broadcast", vote, where);
  return vote.result;
}
DEVICE bool any(bool condition, Where where = {}) {
  Vote vote{condition, 0};
  twin::meet<Vote, give_any>("any", vote, where);
  return vote.result;
}

DEVICE float exp2(float x) { return __builtin_exp2f(x); }
DEVICE float log2(float x) { return __builtin_log2f(x); }
DEVICE float reciprocal(float x) { return 1.0f / x; }

DEVICE float maximum(float a, float b) { return __builtin_fmaxf(a, b); }
DEVICE float absolute(float x) { return __builtin_fabsf(x); }
DEVICE float with_sign(float x, uint32 sign) { return bit_cast<float>(bit_cast<uint32>(x) | (sign & 0x80000000u)); }
DEVICE float multiply_add(float a, float b, float c) { return __builtin_fmaf(a, b, c); }

// ---- 16-bit elements: two in a 32-bit register, the lower index in the lower half --------------------------------------------------

template <typename Element>
uint32 round_to(float value);
template <typename Element>
float widen(uint32 bits);

// To nearest, ties to even; the one NaN that the device's conversion gives.
template <>
DEVICE uint32 round_to<Bfloat16>(float value) {
  if (value != value) return 0x7fff;
  const uint32 bits = bit_cast<uint32>(value);
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
template <>
DEVICE float widen<Bfloat16>(uint32 bits) {
  return bit_cast<float>(bits << 16);
}
template <>
DEVICE uint32 round_to<Float16>(float value) {
  if (value != value) return 0x7fff;
  return bit_cast<uint16_t>(static_cast<_Float16>(value));
}
template <>
DEVICE float widen<Float16>(uint32 bits) {
  return static_cast<float>(bit_cast<_Float16>(static_cast<uint16_t>(bits)));
}

template <typename Element>
DEVICE uint32 pack(float low, float high) {
  return round_to<Element>(low) | round_to<Element>(high) << 16;
}
template <typename Element>
DEVICE uint32 pack_relu(float low, float high) {
  return pack<Element>(low < 0.f ? 0.f : low, high < 0.f ? 0.f : high);
}
template <typename Element>
DEVICE float unpack_low(uint32 pair) {
  return widen<Element>(pair & 0xffff);
}
template <typename Element>
DEVICE float unpack_high(uint32 pair) {
  return widen<Element>(pair >> 16);
}

// ---- shared memory ------------------------------------------------------------------------------------------------------------------

DEVICE SharedAddress shared_base() { return twin::shared_base(); }
DEVICE void store_shared(SharedAddress address, uint32 value, Where where = {}) {
  twin::write_shared(address, &value, sizeof value, where);
}
DEVICE void store_shared(SharedAddress address, float value, Where where = {}) {
  twin::write_shared(address, &value, sizeof value, where);
}
DEVICE float load_shared_float(SharedAddress address, Where where = {}) {
  float value;
  twin::read_shared(address, &value, sizeof value, where);
  return value;
}
DEVICE int load_shared_int(SharedAddress address, Where where = {}) {
  int value;
  twin::read_shared(address, &value, sizeof value, where);
  return value;
}
DEVICE float2 load_shared_float2(SharedAddress address, Where where = {}) {
  float2 value;
  twin::read_shared(address, &value, sizeof value, where);
  return value;
}
DEVICE float4 load_shared_float4(SharedAddress address, Where where = {}) {
  float4 value;
  twin::read_shared(address, &value, sizeof value, where);
  return value;
}

template <int kBytes>
DEVICE void copy_shared_to_global(void* global, SharedAddress address, Where where = {}) {
  unsigned char value[kBytes];
  twin::read_shared(address, value, kBytes, where);
  twin::write_global(global, value, kBytes, where);
}

// ---- global memory ------------------------------------------------------------------------------------------------------------------

template <int kBytes>
DEVICE void load_global(uint32 (&words)[kBytes == 2 ? 1 : kBytes / 4], const void* global, Where where = {}) {
  words[0] = 0;
  twin::read_global(global, words, kBytes, where);
}
DEVICE void store_global(void* global, const uint32 (&words)[4], Where where = {}) {
  twin::write_global(global, words, sizeof words, where);
}
DEVICE void store_global(void* global, uint32 low, uint32 high, Where where = {}) {
  const uint32 words[2] = {low, high};
  twin::write_global(global, words, sizeof words, where);
}
DEVICE void prefetch_line(const void* global) {}
DEVICE void reduce_add(float* address, float value, Where where = {}) {
  float sum;
  twin::read_global(address, &sum, sizeof sum, where);
  sum += value;
  twin::write_global(address, &sum, sizeof sum, where);
}
DEVICE int fetch_add(int* address, int value, Where where = {}) {
  int old;
  twin::read_global(address, &old, sizeof old, where);
  const int sum = old + value;
  twin::write_global(address, &sum, sizeof sum, where);
  return old;
}
template <int kNapNanoseconds = 0>
DEVICE void wait_for_turn(const int* turn, int expected, Where where = {}) {
  twin::wait_until_equal(turn, expected, where);
}
DEVICE void pass_turn(int* turn, int next, Where where = {}) { twin::write_global(turn, &next, sizeof next, where); }
DEVICE void memory_fence() {}

}  // namespace arch
