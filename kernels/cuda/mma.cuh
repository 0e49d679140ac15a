// Tensor cores as every device from compute capability 8.0 has them: asynchronous copies to shared
// memory, matrix fragments from there, and the warp's product.
#pragma once

#include "matrix.cuh"

// 16 bytes, or zeros.
__device__ __forceinline__ void copy_piece(uint32 target, const scalar* source, bool wanted) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source),
               "r"(wanted ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Until at most so many committed groups of this thread are under way.
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Four 8 x 8 matrices; a lane names a row: lane / 8 the matrix, lane % 8 the row in it.
__device__ __forceinline__ void load_matrices(uint32 (&words)[4], uint32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_transposed(uint32 (&words)[4], uint32 address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
               : "r"(address)
               : "memory");
}

#define MULTIPLY(type)                                                                           \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                            \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"            \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                  \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))

// d += a b: a [16, 16], b [16, 8], d [16, 8] over the warp.
__device__ __forceinline__ void multiply(float* d, const uint32* a, uint32 b0, uint32 b1) {
  if constexpr (is_bfloat16<scalar>) {
    MULTIPLY("bf16");
  } else {
    MULTIPLY("f16");
  }
}
