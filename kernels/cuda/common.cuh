// What every kernel shares: the scalar type, 16-byte vectors, and reductions over a warp.
// SCALAR (__nv_bfloat16 or __half) comes with -D. No header here may include cooperative_groups
// (compiles slowly), mma.h or cub (NVRTC does not find them).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

using scalar = SCALAR;

typedef unsigned int uint32;
typedef unsigned long long uint64;

constexpr int WARP = 32;
constexpr unsigned FULL = 0xffffffffu;

struct __align__(4) scalar2 {
  scalar x, y;
};

__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}

// Two scalars in one register, the lower one first.
__device__ __forceinline__ float2 unpack(uint32 word) {
  const scalar2 pair = *reinterpret_cast<const scalar2*>(&word);
  return make_float2(to_float(pair.x), to_float(pair.y));
}
__device__ __forceinline__ uint32 pack(float x, float y) {
  scalar2 pair;
  pair.x = from_float<scalar>(x);
  pair.y = from_float<scalar>(y);
  return *reinterpret_cast<uint32*>(&pair);
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) x += __shfl_xor_sync(FULL, x, offset);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = 16; offset; offset >>= 1) x = fmaxf(x, __shfl_xor_sync(FULL, x, offset));
  return x;
}

// The sum over a block of up to 1024 threads, in every thread. scratch: 33 floats.
__device__ __forceinline__ float block_sum(float x, float* scratch) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  x = warp_sum(x);
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  if (warp == 0) {
    x = lane < (blockDim.x + WARP - 1) / WARP ? scratch[lane] : 0.f;
    x = warp_sum(x);
    if (lane == 0) scratch[32] = x;
  }
  __syncthreads();
  x = scratch[32];
  return x;
}

// Programmatic dependent launch: nothing that the kernel before wrote may be read earlier. A no-op
// where the launch did not ask for it.
__device__ __forceinline__ void wait_for_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void release_successor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
