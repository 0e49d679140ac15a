// The random numbers of sampling: a function of (seed, position, token) alone, as in
// kernels/reference_sampling.py.
#pragma once

#include "common.cuh"

// Philox4x32-10 (Salmon et al. 2011) of the counter (block, position, 0, 0): token t takes word
// t % 4 of block t / 4. key: the seed's low and high half.
__device__ __forceinline__ uint4 philox4x32(uint32 block, uint32 position, uint2 key) {
  uint4 words = make_uint4(block, position, 0u, 0u);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64 first = uint64(words.x) * 0xD2511F53u, second = uint64(words.z) * 0xCD9E8D57u;
    words = make_uint4(uint32(second >> 32) ^ words.y ^ key.x, uint32(second),
                       uint32(first >> 32) ^ words.w ^ key.y, uint32(first));
    key = make_uint2(key.x + 0x9E3779B9u, key.y + 0xBB67AE85u);
  }
  return words;
}

// -log(E) of the exponential variable E = -log(1 - u), u the middle of the bits' interval. Where u
// rounds to 1, E is infinite: a finite stand-in loses to every other token all the same.
__device__ __forceinline__ float gumbel(uint32 bits) {
  const float uniform = __ull2float_rn(2ull * bits + 1) * 0x1p-33f;
  return -fminf(logf(-log1pf(-uniform)), 1e30f);
}

// Of all gumbel()s.
constexpr float LARGEST_GUMBEL = 22.881f;  // 33 log(2), rounded up

// At least gumbel(bits), at a tenth of its cost: E is never below u, and the rest is for rounding.
__device__ __forceinline__ float gumbel_bound(uint32 bits) {
  const float uniform = fmaf(__uint2float_rn(bits), 0x1p-32f, 0x1p-33f);
  return fmaf(__log2f(uniform), -0.693147181f, 1e-4f);
}
