// A row of logits as sampling sees it: sixteen bytes at a time, the row's edits applied: penalties,
// biases, and which tokens may be drawn.
#pragma once

#include "common.cuh"
#include "sampling_table.cuh"

constexpr float LOWEST = -3.402823466e38f;
#define INFINITE __int_as_float(0x7f800000)

__device__ __forceinline__ float4 fill(float x) { return make_float4(x, x, x, x); }

__device__ __forceinline__ float4 max_of_each(float4 x, float4 y) {
  return make_float4(fmaxf(x.x, y.x), fmaxf(x.y, y.y), fmaxf(x.z, y.z), fmaxf(x.w, y.w));
}

__device__ __forceinline__ float max_of(float4 x) {
  return fmaxf(fmaxf(x.x, x.y), fmaxf(x.z, x.w));
}

// What the block's row is edited with, in shared memory: few rows are, and registers are dear.
struct Edits {
  float repetition, presence, frequency;
  int num_biases;
  const uint32 *seen, *biased, *allowed, *suppressed;
  const uint2* counts;  // of four tokens
  const int* bias_token_ids;
  const float* biases;
};

__shared__ Edits edits;

__device__ __forceinline__ uint32 bits_of(const uint32* mask, int group) {
  return __ldcg(mask + group / 8) >> (group % 8 * 4);
}

// Of a token that has one.
__device__ __forceinline__ float bias_of(int token) {
  int low = 0, high = edits.num_biases - 1;
  while (low < high) {
    const int middle = (low + high) / 2;
    if (__ldcg(edits.bias_token_ids + middle) < token) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return __ldcg(edits.biases + low);
}

// A group of logits, edited: every operation rounds as the reference's does. which: bits of Edit.
__device__ __noinline__ float4 edited(int which, int group, float4 x) {
  const uint32 seen = which & REPETITION ? bits_of(edits.seen, group) : 0;
  const uint2 counts = which & OUTPUT ? __ldcg(edits.counts + group) : make_uint2(0, 0);
  const uint32 biased = which & BIASES ? bits_of(edits.biased, group) : 0;
  uint32 banned = which & ALLOWED ? ~bits_of(edits.allowed, group) : 0;
  if (which & SUPPRESSED) banned |= bits_of(edits.suppressed, group);
  float z[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32 count = (i < 2 ? counts.x : counts.y) >> (i % 2 * 16) & MAX_COUNT;
    if (seen >> i & 1)
      z[i] = z[i] > 0.f ? __fdiv_rn(z[i], edits.repetition) : __fmul_rn(z[i], edits.repetition);
    if (count) {
      const float penalty = __fmul_rn(edits.frequency, float(count));
      z[i] = __fsub_rn(z[i], __fadd_rn(penalty, edits.presence));
    }
    if (biased >> i & 1) z[i] = __fadd_rn(z[i], bias_of(4 * group + i));
    if (banned >> i & 1) z[i] = -INFINITE;
  }
  return make_float4(z[0], z[1], z[2], z[3]);
}

struct Row {
  const float* logits;
  int vocab_size;
  bool aligned;  // logits, to 16 bytes
  int which;     // bits of Edit

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
    return which == 0 || group >= groups() ? x : edited(which, group, x);
  }
};

// The row that sample `sample` is drawn from: logits [samples, vocab_size], table row `row`. The
// block's first thread writes `edits` where there are any: the others wait for it.
__device__ __forceinline__ Row row_of(const float* logits, int vocab_size, int sample,
                                      const SamplingTable& table, int row, int position) {
  const float* own = logits + size_t(sample) * vocab_size;
  int which = __ldcg(table.edits + row);
  if (position >= __ldcg(table.suppress_until + row)) which &= ~SUPPRESSED;
  if (which && threadIdx.x == 0) {
    const size_t words = (vocab_size + 31) / 32, mask = row * words;
    const size_t first_bias = size_t(row) * MAX_BIASES;
    edits = {__ldcg(table.repetition_penalty + row),
             __ldcg(table.presence_penalty + row),
             __ldcg(table.frequency_penalty + row),
             __ldcg(table.num_biases + row),
             table.seen + mask,
             table.biased + mask,
             table.allowed_mask + mask,
             table.suppressed + mask,
             reinterpret_cast<const uint2*>(table.output_counts + 32 * mask),
             table.bias_token_ids + first_bias,
             table.biases + first_bias};
  }
  return {own, vocab_size, reinterpret_cast<size_t>(own) % sizeof(float4) == 0, which};
}
