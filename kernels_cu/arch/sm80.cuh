// Instructions that sm_80 introduced: asynchronous copies to shared memory, ldmatrix, mma.sync with float32 accumulation.
#pragma once

#include "arch/common.cuh"

namespace arch {

// Copies kBytes from global to shared memory, or writes zeros where `valid` is false (nothing is read then).
// It is complete for the issuing thread after copy_async_wait; 2 bytes have no asynchronous form and are copied at once.
template <int kBytes>
DEVICE void copy_async(SharedAddress shared, const void* global, bool valid) {
  if constexpr (kBytes == 16) {
    const int size = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared), "l"(global), "r"(size) : "memory");
  } else if constexpr (kBytes == 8 || kBytes == 4) {
    const int size = valid ? kBytes : 0;
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(shared), "l"(global), "n"(kBytes), "r"(size) : "memory");
  } else {
    unsigned short value = 0;
    if (valid) value = *static_cast<const unsigned short*>(global);
    asm volatile("st.shared.u16 [%0], %1;" ::"r"(shared), "h"(value) : "memory");
  }
}
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's youngest groups are under way.
template <int kPending>
DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8 and receives
// elements (row lane / 4, columns 2 * (lane % 4) and + 1) of each matrix, or of its transpose.
DEVICE void load_matrix(uint32 (&matrices)[4], SharedAddress address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(address)
               : "memory");
}
DEVICE void load_matrix_transposed(uint32 (&matrices)[4], SharedAddress address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
               : "r"(address)
               : "memory");
}

// d (16 x 8, 4 registers) += a (16 x 16, 4 registers) * b (16 x 8). Fragments: tile/fragment.cuh.
// Not volatile: a pure function of its operands, which the compiler may move freely.
template <typename Element>
DEVICE void mma_m16n8k16(float* d, const uint32* a, uint32 b0, uint32 b1);

template <>
DEVICE void mma_m16n8k16<Bfloat16>(float* d, const uint32* a, uint32 b0, uint32 b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <>
DEVICE void mma_m16n8k16<Float16>(float* d, const uint32* a, uint32 b0, uint32 b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace arch
