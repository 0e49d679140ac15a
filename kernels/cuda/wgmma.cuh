// Hopper's warpgroup matrix instruction: D [64, N] += A [64, 16] x B [16, N], float32 sums.
//
// A lane of warp w holds of D, for every block j of 8 columns, rows 16 w + lane / 4 (words 4 j and
// 4 j + 1, columns 8 j + 2 (lane % 4) and the next) and 8 rows below (words 4 j + 2, 4 j + 3).
// Registers of an instruction that was issued may not be touched before `wgmma_wait` covers it.
#pragma once

#include "matrix.cuh"

// Where an operand lies in shared memory: rows of 128 bytes, groups of 8 rows 1024 bytes apart,
// 16-byte pieces swizzled as TMA's 128-byte mode does. chunk: bytes between regions of 64 columns,
// for an operand whose rows run along k (transposed); others ignore it.
__device__ __forceinline__ uint64 descriptor(uint32 address, uint32 chunk) {
  return static_cast<uint64>((address & 0x3ffff) >> 4) | static_cast<uint64>(chunk >> 4) << 16 |
         static_cast<uint64>(1024 >> 4) << 32 | 1ull << 62;
}

// Before the first instruction, and after ordinary code wrote registers that the next one takes.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most so many committed groups are unfinished.
template <int PENDING>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// The compiler moves no use of these registers over this point.
template <int N>
__device__ __forceinline__ void pin(float (&registers)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

template <int COUNT>
__device__ __forceinline__ void raise_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void lower_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}

#define F8(d, i)                                                                              \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define F32(d, i) F8(d, i), F8(d, i + 8), F8(d, i + 16), F8(d, i + 24)
#define WORDS32 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
#define WORDS64 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "

#define WGMMA_SHARED(type, d)                                               \
  asm volatile(                                                             \
      "{.reg .pred p; setp.ne.b32 p, %66, 0;\n"                             \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " "      \
      WORDS64 "%64, %65, p, 1, 1, 0, 0;}\n"                                 \
      : F32(d, 0), F32(d, 32)                                               \
      : "l"(a), "l"(b), "r"(accumulate))
#define WGMMA_REGISTERS_64(type, d)                                         \
  asm volatile(                                                             \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " "       \
      WORDS32 "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;\n"                    \
      : F32(d, 0)                                                           \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
#define WGMMA_REGISTERS_128(type, d)                                        \
  asm volatile(                                                             \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type " "      \
      WORDS64 "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;\n"                    \
      : F32(d, 0), F32(d, 32)                                               \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

// d [64, 128] += a b^T, both in shared memory with rows along k. accumulate 0: d is overwritten.
__device__ __forceinline__ void wgmma_shared(float (&d)[64], uint64 a, uint64 b, int accumulate) {
  if constexpr (is_bfloat16<scalar>) {
    WGMMA_SHARED("bf16", d);
  } else {
    WGMMA_SHARED("f16", d);
  }
}

// d [64, N] += a b: a in registers (the layout of D, a pair of columns a word: two blocks of 8
// columns), b in shared memory as [k][N].
__device__ __forceinline__ void wgmma_registers(float (&d)[32], const uint32* a, uint64 b) {
  if constexpr (is_bfloat16<scalar>) {
    WGMMA_REGISTERS_64("bf16", d);
  } else {
    WGMMA_REGISTERS_64("f16", d);
  }
}
__device__ __forceinline__ void wgmma_registers(float (&d)[64], const uint32* a, uint64 b) {
  if constexpr (is_bfloat16<scalar>) {
    WGMMA_REGISTERS_128("bf16", d);
  } else {
    WGMMA_REGISTERS_128("f16", d);
  }
}
