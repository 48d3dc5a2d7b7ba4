// Instructions of Hopper (sm_90a): mbarriers, tensor-map copies, warpgroup products, register hand-over, named barriers.
#pragma once

#include "arch/common.cuh"

namespace arch {

constexpr int kWarpgroupSize = 128;

DEVICE int warpgroup_index() { return __shfl_sync(0xffffffffu, threadIdx.x / kWarpgroupSize, 0); }

// ---- clusters: CTAs that run at the same time and reach each other's shared memory ----------------------------------------------

// `size` is a literal, behind any macros. Clusters of one are none: such kernels are launched like any other.
#define CLUSTER_ATTRIBUTE_1
#define CLUSTER_ATTRIBUTE_2 __cluster_dims__(2, 1, 1)
#define CLUSTER_KERNEL_OF(threads, min_blocks, size) \
  extern "C" __global__ void CLUSTER_ATTRIBUTE_##size __launch_bounds__(threads, min_blocks)
#define CLUSTER_KERNEL(threads, min_blocks, size) CLUSTER_KERNEL_OF(threads, min_blocks, size)

// All threads of all CTAs of the cluster, when they begin. Passes on barriers that were initialised and fenced.
DEVICE void cluster_begin() {
  asm volatile("barrier.cluster.arrive.relaxed;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
// The same when they end: what they have done to each other's shared memory has been done, and it may go.
DEVICE void cluster_end() { asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory"); }

// An address in the shared memory of any CTA of the cluster.
struct ClusterAddress {
  uint32 value;
};
// The same place in the shared memory of another CTA.
DEVICE ClusterAddress in_cta(SharedAddress address, int rank) {
  ClusterAddress there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there.value) : "r"(address), "r"(rank));
  return there;
}

// ---- mbarriers: 8 bytes of shared memory; a phase ends when all arrivals and all announced bytes have come -----------------------

DEVICE void barrier_init(SharedAddress barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
// Makes initialised barriers visible to the copy engine and, behind cluster_begin, to other CTAs.
DEVICE void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void barrier_arrive(SharedAddress barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
DEVICE void barrier_arrive_expecting(SharedAddress barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// Waits for the end of the phase of this parity. A fresh barrier counts as having ended a phase of parity 1.
DEVICE void barrier_wait(SharedAddress barrier, uint32 parity) {
  asm volatile(
      "{\n.reg .pred done;\nWAIT: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra DONE;\nbra WAIT;\nDONE:\n}" ::"r"(
          barrier),
      "r"(parity)
      : "memory");
}
// At a barrier of any CTA of the cluster: says that reads have ended. To pass on writes as well it would have to release at the
// cluster's scope, which is a fence of all memory (MEMBAR.ALL.GPU) before every arrival.
DEVICE void barrier_arrive(ClusterAddress barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier.value) : "memory");
}
DEVICE void barrier_arrive_expecting(ClusterAddress barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cluster.b64 _, [%0], %1;" ::"r"(barrier.value), "r"(bytes) : "memory");
}
// Stores a word in any CTA of the cluster, and completes its four bytes at a barrier there.
DEVICE void send(ClusterAddress address, uint32 value, ClusterAddress barrier) {
  asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [%0], %1, [%2];" ::"r"(address.value), "r"(value),
               "r"(barrier.value)
               : "memory");
}

// Barriers of the hardware by number, 1 to 15 (0 is the block barrier), for `threads` threads, arriving or waiting.
DEVICE void named_barrier_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
DEVICE void named_barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- tensor-map copies: boxes of (64 columns, rows) between global memory and a swizzled chunk (tile/swizzle.cuh) -------------------

DEVICE void prefetch(const TensorMap& map) { asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory"); }
DEVICE void copy_box_to_shared(SharedAddress shared, const TensorMap& map, SharedAddress barrier, int column, int row, int head,
                               int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(
          shared),
      "l"(&map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch)
      : "memory");
}
// To this place of every CTA of the cluster whose bit is set in `ranks`; each completes the bytes at its own barrier.
DEVICE void copy_box_to_cluster(SharedAddress shared, const TensorMap& map, SharedAddress barrier, int column, int row, int head,
                                int batch, uint32 ranks) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, %4, %5, "
      "%6}], [%2], %7;" ::"r"(shared),
      "l"(&map), "r"(barrier), "r"(column), "r"(row), "r"(head), "r"(batch), "h"(static_cast<unsigned short>(ranks))
      : "memory");
}
DEVICE void copy_box_to_global(const TensorMap& map, SharedAddress shared, int column, int row, int head, int batch) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
               "r"(shared), "r"(column), "r"(row), "r"(head), "r"(batch)
               : "memory");
}
// Copies `bytes` (a multiple of 16, as are the addresses) between global and shared memory as they are.
DEVICE void copy_bytes_to_shared(SharedAddress shared, const void* global, int bytes, SharedAddress barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared),
               "l"(global), "r"(bytes), "r"(barrier)
               : "memory");
}
// Copies floats in shared memory to global memory, or adds them there.
DEVICE void copy_floats_to_global(float* global, SharedAddress shared, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared), "r"(bytes) : "memory");
}
DEVICE void add_floats_to_global(float* global, SharedAddress shared, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(global), "r"(shared),
               "r"(bytes)
               : "memory");
}
// Adds two floats, 8 bytes aligned, to floats in global memory.
DEVICE void reduce_add(float* global, float x, float y) {
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(global), "f"(x), "f"(y) : "memory");
}
DEVICE void copy_to_global_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's committed groups of copies have yet to read shared memory.
template <int kPending = 0>
DEVICE void copy_to_global_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}
// Waits until all of them have been written.
DEVICE void copy_to_global_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }
// Orders this thread's ordinary accesses to global memory, to a turn say, and its copies there.
DEVICE void fence_async_proxy_global() { asm volatile("fence.proxy.async.global;" ::: "memory"); }
// Makes this thread's ordinary writes to shared memory visible to copies and warpgroup products, which go another way.
DEVICE void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- registers change hands between warpgroups: multiples of 8, the sum over the block within the pool ------------------------------

template <int kRegisters>
DEVICE void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
DEVICE void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Four 8x8 matrices of 16-bit elements to shared memory: lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void store_matrix(SharedAddress address, uint32 m0, uint32 m1, uint32 m2, uint32 m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(m0), "r"(m1), "r"(m2),
               "r"(m3)
               : "memory");
}

// The transposes of four 8x8 matrices.
DEVICE void store_matrix_transposed(SharedAddress address, uint32 m0, uint32 m1, uint32 m2, uint32 m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(m0), "r"(m1),
               "r"(m2), "r"(m3)
               : "memory");
}
DEVICE void store_shared(SharedAddress address, float x, float y, float z, float w) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(x), "f"(y), "f"(z), "f"(w) : "memory");
}

// ---- warpgroup products: asynchronous; accumulators and register operands must not be touched until waited for -----------------------

DEVICE void product_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void product_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most kPending of the youngest committed groups are under way.
template <int kPending>
DEVICE void product_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// The same at this place in the instruction order. ptxas moves a bare wait up across arithmetic; it cannot move one that stands
// behind a branch. `not_negative` is a run-time value that the compiler cannot know: the branch is never taken.
template <int kPending = 0>
DEVICE void product_wait_here(int not_negative) {
  asm volatile(
      "{\n.reg .pred skip;\nsetp.lt.s32 skip, %0, 0;\n@skip bra SKIP_%=;\nwgmma.wait_group.sync.aligned %1;\nSKIP_%=:\n}" ::"r"(
          not_negative),
      "n"(kPending)
      : "memory");
  product_wait<kPending>();
}
// Pins registers: ordinary reads and writes stay on their side of the product that uses them.
template <int kSize>
DEVICE void pin(float (&registers)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}
template <int kSize>
DEVICE void pin(uint32 (&registers)[kSize]) {
#pragma unroll
  for (int i = 0; i < kSize; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// The bits of a shared address that descriptors have room for. The high ones name the CTA in its cluster, and are zeros without one.
#if CLUSTER_SIZE > 1
constexpr uint32 kDescriptorAddressBits = (1u << 18) - 1;
#else
constexpr uint32 kDescriptorAddressBits = ~0u;
#endif

// Shared-memory descriptor of a swizzled tile (128-byte swizzle; 8 rows of 128 bytes repeat every 1024). The low word holds the
// address and the stride between chunks, which only matters where the contraction runs along the rows; advancing adds to it.
struct ProductOperand {
  uint32 low;

  DEVICE ProductOperand(SharedAddress address, int chunk_stride)
      : low(((address & kDescriptorAddressBits) >> 4) + (static_cast<uint32>(chunk_stride >> 4) << 16)) {}
  DEVICE uint64 at(int bytes) const {
    constexpr uint32 kHigh = (1024 >> 4) | (1u << 30);
    uint64 descriptor;
    asm("mov.b64 %0, {%1, %2};" : "=l"(descriptor) : "r"(low + (bytes >> 4)), "r"(kHigh));
    return descriptor;
  }
};

// Product<kN, Element>: d (64 x kN, kN / 2 registers a thread) (+)= a (64 x 16) . b (16 x kN), float32 accumulation.
//   shared:      a and b in shared memory, the contraction along the columns of both
//   shared_rows: a and b in shared memory, the contraction along the columns of a and the rows of b
//   registers:   a in four registers, the contraction along the rows of b
template <int kN, class Element>
struct Product;

// Operand lists, eight registers at a time: text %0 .. and constraints.
#define PRODUCT_TEXT_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define PRODUCT_TEXT_16 PRODUCT_TEXT_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define PRODUCT_TEXT_24 PRODUCT_TEXT_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define PRODUCT_TEXT_32 PRODUCT_TEXT_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define PRODUCT_TEXT_40 PRODUCT_TEXT_32 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define PRODUCT_TEXT_48 PRODUCT_TEXT_40 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define PRODUCT_TEXT_56 PRODUCT_TEXT_48 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define PRODUCT_TEXT_64 PRODUCT_TEXT_56 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define PRODUCT_TEXT_72 PRODUCT_TEXT_64 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define PRODUCT_TEXT_80 PRODUCT_TEXT_72 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define PRODUCT_TEXT_88 PRODUCT_TEXT_80 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define PRODUCT_TEXT_96 PRODUCT_TEXT_88 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define PRODUCT_TEXT_104 PRODUCT_TEXT_96 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define PRODUCT_TEXT_112 PRODUCT_TEXT_104 ", %104, %105, %106, %107, %108, %109, %110, %111"
#define PRODUCT_TEXT_120 PRODUCT_TEXT_112 ", %112, %113, %114, %115, %116, %117, %118, %119"
#define PRODUCT_TEXT_128 PRODUCT_TEXT_120 ", %120, %121, %122, %123, %124, %125, %126, %127"
#define PRODUCT_EIGHT(d, i)                                                                                               \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define PRODUCT_LIST_8(d) PRODUCT_EIGHT(d, 0)
#define PRODUCT_LIST_16(d) PRODUCT_LIST_8(d), PRODUCT_EIGHT(d, 8)
#define PRODUCT_LIST_24(d) PRODUCT_LIST_16(d), PRODUCT_EIGHT(d, 16)
#define PRODUCT_LIST_32(d) PRODUCT_LIST_24(d), PRODUCT_EIGHT(d, 24)
#define PRODUCT_LIST_40(d) PRODUCT_LIST_32(d), PRODUCT_EIGHT(d, 32)
#define PRODUCT_LIST_48(d) PRODUCT_LIST_40(d), PRODUCT_EIGHT(d, 40)
#define PRODUCT_LIST_56(d) PRODUCT_LIST_48(d), PRODUCT_EIGHT(d, 48)
#define PRODUCT_LIST_64(d) PRODUCT_LIST_56(d), PRODUCT_EIGHT(d, 56)
#define PRODUCT_LIST_72(d) PRODUCT_LIST_64(d), PRODUCT_EIGHT(d, 64)
#define PRODUCT_LIST_80(d) PRODUCT_LIST_72(d), PRODUCT_EIGHT(d, 72)
#define PRODUCT_LIST_88(d) PRODUCT_LIST_80(d), PRODUCT_EIGHT(d, 80)
#define PRODUCT_LIST_96(d) PRODUCT_LIST_88(d), PRODUCT_EIGHT(d, 88)
#define PRODUCT_LIST_104(d) PRODUCT_LIST_96(d), PRODUCT_EIGHT(d, 96)
#define PRODUCT_LIST_112(d) PRODUCT_LIST_104(d), PRODUCT_EIGHT(d, 104)
#define PRODUCT_LIST_120(d) PRODUCT_LIST_112(d), PRODUCT_EIGHT(d, 112)
#define PRODUCT_LIST_128(d) PRODUCT_LIST_120(d), PRODUCT_EIGHT(d, 120)

// `count` = n / 2 accumulators; i0 .. i4 are the five operand numbers after them. Operands behind the predicate: scale of a and b, then
// which operands have their contraction along the rows (both, or only b when a is in registers).
#define PRODUCT(n, count, i0, i1, i2, i3, i4, Element, type)                                                           \
  template <>                                                                                                             \
  struct Product<n, Element> {                                                                                            \
    static DEVICE void shared(float (&d)[count], uint64 a, uint64 b, bool accumulate) {                                   \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n                  \
                   "k16.f32." type "." type " {" PRODUCT_TEXT_##count "}, %" #i0 ", %" #i1 ", p, 1, 1, 0, 0;\n}"          \
                   : PRODUCT_LIST_##count(d)                                                                              \
                   : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                                  \
    }                                                                                                                     \
    static DEVICE void shared_rows(float (&d)[count], uint64 a, uint64 b, bool accumulate) {                              \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #i2 ", 0;\nwgmma.mma_async.sync.aligned.m64n" #n                  \
                   "k16.f32." type "." type " {" PRODUCT_TEXT_##count "}, %" #i0 ", %" #i1 ", p, 1, 1, 0, 1;\n}"          \
                   : PRODUCT_LIST_##count(d)                                                                              \
                   : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)));                                                  \
    }                                                                                                                     \
    static DEVICE void registers(float (&d)[count], const uint32* a, uint64 b) {                                          \
      asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 1, 0;\nwgmma.mma_async.sync.aligned.m64n" #n                        \
                   "k16.f32." type "." type " {" PRODUCT_TEXT_##count "}, {%" #i0 ", %" #i1 ", %" #i2 ", %" #i3           \
                   "}, %" #i4 ", p, 1, 1, 1;\n}"                                                                          \
                   : PRODUCT_LIST_##count(d)                                                                              \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                                                 \
    }                                                                                                                     \
  };
#define PRODUCT_OF_BOTH(n, count, i0, i1, i2, i3, i4)               \
  PRODUCT(n, count, i0, i1, i2, i3, i4, Bfloat16, "bf16")           \
  PRODUCT(n, count, i0, i1, i2, i3, i4, Float16, "f16")

PRODUCT_OF_BOTH(16, 8, 8, 9, 10, 11, 12)
PRODUCT_OF_BOTH(32, 16, 16, 17, 18, 19, 20)
PRODUCT_OF_BOTH(48, 24, 24, 25, 26, 27, 28)
PRODUCT_OF_BOTH(64, 32, 32, 33, 34, 35, 36)
PRODUCT_OF_BOTH(80, 40, 40, 41, 42, 43, 44)
PRODUCT_OF_BOTH(96, 48, 48, 49, 50, 51, 52)
PRODUCT_OF_BOTH(112, 56, 56, 57, 58, 59, 60)
PRODUCT_OF_BOTH(128, 64, 64, 65, 66, 67, 68)
PRODUCT_OF_BOTH(144, 72, 72, 73, 74, 75, 76)
PRODUCT_OF_BOTH(160, 80, 80, 81, 82, 83, 84)
PRODUCT_OF_BOTH(176, 88, 88, 89, 90, 91, 92)
PRODUCT_OF_BOTH(192, 96, 96, 97, 98, 99, 100)
PRODUCT_OF_BOTH(208, 104, 104, 105, 106, 107, 108)
PRODUCT_OF_BOTH(224, 112, 112, 113, 114, 115, 116)
PRODUCT_OF_BOTH(240, 120, 120, 121, 122, 123, 124)
PRODUCT_OF_BOTH(256, 128, 128, 129, 130, 131, 132)

#undef PRODUCT_OF_BOTH
#undef PRODUCT

}  // namespace arch
