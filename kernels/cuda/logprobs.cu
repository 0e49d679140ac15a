// The logarithm of a token's probability and its rank, and the best tokens of the same row, as
// kernels/reference_logprobs.py defines them. A thread block an entry: one pass over its logits,
// and for each of the best a look at one thread's part of them.
#include "common.cuh"

constexpr int THREADS = 1024;
constexpr float LOWEST = -3.402823466e38f;

// Larger for the larger logit, and of equals for the lower id. 0 is below every token's.
__device__ __forceinline__ uint64 to_order(float logit, int token) {
  const uint32 bits = __float_as_uint(logit + 0.f);  // -0 is 0
  const uint32 rising = bits >> 31 ? ~bits : bits | 0x80000000u;
  return uint64(rising) << 32 | (FULL - uint32(token));
}
__device__ __forceinline__ int token_of(uint64 order) { return int(FULL - uint32(order)); }
__device__ __forceinline__ float logit_of(uint64 order) {
  const uint32 rising = uint32(order >> 32);
  return __uint_as_float(rising >> 31 ? rising & 0x7fffffffu : ~rising);
}

__device__ __forceinline__ uint64 warp_max(uint64 x) {
#pragma unroll
  for (int offset = WARP / 2; offset; offset >>= 1)
    x = max(x, uint64(__shfl_xor_sync(FULL, x, offset)));
  return x;
}

// Every thread gets the largest x of the block's warps, each of which gave its own. warps: [WARP].
__device__ __forceinline__ float block_max(float x, float* warps) {
  x = warp_max(x);
  if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = x;
  __syncthreads();
  return warp_max(warps[threadIdx.x % WARP]);
}

// sources: the row of logits that each entry reads; its token is token_ids[rows, positions], table
// row and position. output, the host's: ids, the bits of log-probabilities and ranks, [entries,
// width] each. Where an entry's logits are NaN, +infinity or all -infinity, faulted[rows] becomes 1.
extern "C" __global__ void __launch_bounds__(THREADS)
    read_logprobs(const float* logits, int vocab_size, const int* sources, const int* rows,
                  const int* positions, const int* token_ids, int token_stride, int width,
                  int* faulted, int* output) {
  __shared__ uint64 best_of_warp[WARP];
  __shared__ float maxima[WARP], scratch[33];
  const int entry = blockIdx.x, lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int row = rows[entry];
  const int own = token_ids[size_t(row) * token_stride + positions[entry]];
  const float* x = logits + size_t(sources[entry]) * vocab_size;
  const bool known = 0 <= own && own < vocab_size;  // else the row is faulted already
  const uint64 own_order = known ? to_order(x[own], own) : 0;

  uint64 best = 0;
  float top = LOWEST, sum = 0.f, better = 0.f;
  for (int token = threadIdx.x; token < vocab_size; token += THREADS) {
    const float logit = x[token];
    const uint64 order = to_order(logit, token);
    best = max(best, order);
    better += order > own_order;
    if (logit > top) {
      sum *= __expf(top - logit);
      top = logit;
    }
    sum += __expf(logit - top);
  }
  const float highest = block_max(top, maxima);
  const float total = highest + logf(block_sum(sum * __expf(top - highest), scratch));
  better = block_sum(better, scratch);
  const uint64 of_warp = warp_max(best);
  if (lane == 0) best_of_warp[warp] = of_warp;

  const size_t at = size_t(entry) * width, size = size_t(gridDim.x) * width;
  const auto write = [&](int column, int token, float logit, int rank) {
    output[at + column] = token;
    output[size + at + column] = __float_as_int(logit - total);
    output[2 * size + at + column] = rank;
  };
  if (threadIdx.x == 0) {
    if (!isfinite(total)) faulted[row] = 1;
    write(0, own, logit_of(own_order), int(better) + 1);
  }
  for (int rank = 1; rank < width; ++rank) {
    __syncthreads();
    const uint64 winner = warp_max(best_of_warp[lane]);
    const int token = token_of(winner), owner = token % THREADS;
    if (threadIdx.x == 0) write(rank, token, logit_of(winner), rank);
    __syncthreads();
    if (warp != owner / WARP) continue;
    uint64 next = 0;  // of the owner's tokens, the best below the winner
    for (int each = owner + lane * THREADS; each < vocab_size; each += WARP * THREADS) {
      const uint64 order = to_order(x[each], each);
      if (order < winner) next = max(next, order);
    }
    next = warp_max(next);
    if (lane == owner % WARP) best = next;
    next = warp_max(best);
    if (lane == 0) best_of_warp[warp] = next;
  }
}
