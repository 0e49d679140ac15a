// A row of logits as sampling sees it: what the table says about the row, sixteen bytes at a time,
// the repetition penalty and the suppressed tokens applied.
#pragma once

#include "common.cuh"

constexpr float LOWEST = -3.402823466e38f;
#define INFINITE __int_as_float(0x7f800000)

// kernels/sampling.py's, each indexed by table row.
struct SamplingTable {
  const float* temperature;
  const int* top_k;
  const float* top_p;
  const float* min_p;
  const float* repetition_penalty;
  const uint64* seed;
  const int* suppress_until;
  const uint32* suppressed;
  uint32* seen;
};

__device__ __forceinline__ float4 fill(float x) { return make_float4(x, x, x, x); }

__device__ __forceinline__ float4 max_of_each(float4 x, float4 y) {
  return make_float4(fmaxf(x.x, y.x), fmaxf(x.y, y.y), fmaxf(x.z, y.z), fmaxf(x.w, y.w));
}

__device__ __forceinline__ float max_of(float4 x) {
  return fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w));
}

struct Row {
  const float* logits;
  int vocab_size;
  bool aligned;              // logits, to 16 bytes
  float penalty;
  uint32* seen;              // null where there is no penalty
  const uint32* suppressed;  // null where nothing is suppressed

  __device__ __forceinline__ int groups() const { return (vocab_size + 3) / 4; }

  // The model's logits of tokens 4 group to 4 group + 3; -infinity past the vocabulary. Past the L1
  // cache, like all else that an earlier kernel wrote: this one may have begun before it did.
  __device__ __forceinline__ float4 raw(int group) const {
    const int token = 4 * group, left = vocab_size - token;
    if (aligned && left >= 4) return __ldcg(reinterpret_cast<const float4*>(logits + token));
    float x[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = i < left ? __ldcg(logits + token + i) : -INFINITE;
    return make_float4(x[0], x[1], x[2], x[3]);
  }

  // What tokens are drawn from, from the group's raw logits.
  __device__ __forceinline__ float4 adjusted(int group, float4 x) const {
    if (group >= groups()) return x;
    if (seen != nullptr) {
      const uint32 bits = bits_of(seen, group);
      if (bits & 1) x.x = penalized(x.x);
      if (bits & 2) x.y = penalized(x.y);
      if (bits & 4) x.z = penalized(x.z);
      if (bits & 8) x.w = penalized(x.w);
    }
    if (suppressed != nullptr) {
      const uint32 bits = bits_of(suppressed, group);
      if (bits & 1) x.x = -INFINITE;
      if (bits & 2) x.y = -INFINITE;
      if (bits & 4) x.z = -INFINITE;
      if (bits & 8) x.w = -INFINITE;
    }
    return x;
  }

  __device__ __forceinline__ float penalized(float x) const {
    return x > 0.f ? __fdiv_rn(x, penalty) : x * penalty;
  }

  static __device__ __forceinline__ uint32 bits_of(const uint32* mask, int group) {
    return __ldcg(mask + group / 8) >> (group % 8 * 4);
  }
};

// The row that sample `sample` is drawn from: logits [samples, vocab_size], table row `row`.
__device__ __forceinline__ Row row_of(const float* logits, int vocab_size, int sample,
                                      const SamplingTable& table, int row, int position) {
  const float* own = logits + size_t(sample) * vocab_size;
  const size_t words = size_t(row) * ((vocab_size + 31) / 32);
  const float penalty = __ldcg(table.repetition_penalty + row);
  const bool penalizes = penalty != 0.f && penalty != 1.f;
  const bool suppresses = position < __ldcg(table.suppress_until + row);
  return {own,
          vocab_size,
          reinterpret_cast<size_t>(own) % sizeof(float4) == 0,
          penalty,
          penalizes ? table.seen + words : nullptr,
          suppresses ? table.suppressed + words : nullptr};
}
