// Eight scalars at a time, sixteen bytes: how memory-bound kernels move them.
#pragma once

#include "common.cuh"

constexpr int VECTOR = 8;

// Of what an earlier kernel wrote. Past the L1 cache: with programmatic dependent launch this
// kernel may have begun before those writes.
__device__ __forceinline__ uint4 load_vector(const scalar* address) {
  return __ldcg(reinterpret_cast<const uint4*>(address));
}

// Of what no kernel writes: weights.
__device__ __forceinline__ uint4 load_constant_vector(const scalar* address) {
  return __ldg(reinterpret_cast<const uint4*>(address));
}

__device__ __forceinline__ void store_vector(scalar* address, uint4 vector) {
  *reinterpret_cast<uint4*>(address) = vector;
}

__device__ __forceinline__ void unpack_vector(uint4 vector, float (&values)[VECTOR]) {
  const uint32 words[4] = {vector.x, vector.y, vector.z, vector.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = unpack(words[i]);
    values[2 * i] = pair.x;
    values[2 * i + 1] = pair.y;
  }
}

__device__ __forceinline__ uint4 pack_vector(const float (&values)[VECTOR]) {
  return make_uint4(pack(values[0], values[1]), pack(values[2], values[3]),
                    pack(values[4], values[5]), pack(values[6], values[7]));
}

__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }
