// What both prefill attention kernels share: which queries a tile has, the running softmax over
// the scores of a tile, and how its output is stored.
//
// A warp holds 16 queries. A lane holds, of scores and output, two rows (lane / 4 and 8 below) and
// of every block j of 8 columns the pair at 8 j + 2 (lane % 4): word 4 j + 2 row + column.
#pragma once

#include "common.cuh"

constexpr int QUERIES = 128;  // of a tile
constexpr float SCALE = 1.4426950408889634f * (HEAD_DIM == 64 ? 0.125f : 0.08838834764831845f);
static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "head_dim is 64 or 128");

// The batch in device memory, as the wrapper's docstring says.
struct Batch {
  const int* block_tables;
  int max_blocks;
  const int *rows, *starts, *counts, *first_tokens, *sizes, *tile_offsets;
};

// Neighbouring queries of one row and one head.
struct Tile {
  int head;      // negative: there is no tile
  int queries;   // at most QUERIES
  int token;     // of the first query, in the flat batch
  int position;  // of the first query, in its sequence
  const int* blocks;

  __device__ __forceinline__ int context() const { return position + queries; }
};

// The item-th tile, last queries first, so that those of the longest contexts of a row begin
// first, and all heads of the same queries together. Called by whole warps.
__device__ __forceinline__ Tile find_tile(const Batch& batch, int heads, int item) {
  const int decode_rows = batch.sizes[2];
  const int prefill_rows = batch.sizes[1] - decode_rows;
  const int tiles = batch.tile_offsets[prefill_rows];
  Tile tile = {-1, 0, 0, 0, nullptr};
  if (item >= tiles * heads) return tile;
  const int index = tiles - 1 - item / heads;
  int row = -1;
  for (int first = 0; first < prefill_rows; first += WARP) {
    const int candidate = first + static_cast<int>(threadIdx.x) % WARP;
    const bool begun = candidate < prefill_rows && batch.tile_offsets[candidate] <= index;
    row += __popc(__ballot_sync(FULL, begun));
  }
  const int skipped = (index - batch.tile_offsets[row]) * QUERIES;
  row += decode_rows;
  tile.head = item % heads;
  tile.queries = min(batch.counts[row] - skipped, QUERIES);
  tile.token = batch.first_tokens[row] + skipped;
  tile.position = batch.starts[row] + skipped;
  tile.blocks = batch.block_tables + static_cast<size_t>(batch.rows[row]) * batch.max_blocks;
  return tile;
}

// By the one thread of a block that takes items, after its last: the last block of the grid leaves
// the counters as it found them, for the next launch. scheduler: items taken, blocks done.
__device__ __forceinline__ void end_items(int* scheduler) {
  __threadfence();
  if (atomicAdd(&scheduler[1], 1) == static_cast<int>(gridDim.x) - 1) {
    scheduler[0] = 0;
    scheduler[1] = 0;
  }
}

__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }

// Hides the keys that a row may not see. first: position of the lane's first column; last: the
// last position that each of its rows sees. A select: what is hidden may be NaN.
template <int N>
__device__ __forceinline__ void hide(float (&scores)[N], int first, const int (&last)[2]) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i / 4 * 8 + i % 2 > last[i % 4 / 2] - first) scores[i] = minus_infinity();
  }
}

// Softmax over tiles of keys that come one after another (Milakov & Gimelshein 2018).
struct OnlineSoftmax {
  float top[2];  // the largest score of each row so far
  float sum[2];  // of exp2(SCALE * (score - top)) over the lane's columns

  __device__ __forceinline__ void reset() {
    top[0] = top[1] = minus_infinity();
    sum[0] = sum[1] = 0.f;
  }

  // Turns scores into weights; what was summed under the former top must shrink by `shrink`.
  template <int N>
  __device__ __forceinline__ void update(float (&scores)[N], float (&shrink)[2]) {
    float highest[2] = {top[0], top[1]}, base[2], added[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < N; ++i) highest[i % 4 / 2] = fmaxf(highest[i % 4 / 2], scores[i]);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      highest[row] = fmaxf(highest[row], __shfl_xor_sync(FULL, highest[row], 1));
      highest[row] = fmaxf(highest[row], __shfl_xor_sync(FULL, highest[row], 2));
      // A row that has seen nothing yet: -inf - -inf would be NaN.
      base[row] = highest[row] == minus_infinity() ? 0.f : highest[row] * SCALE;
      shrink[row] = exp2_approximate(top[row] * SCALE - base[row]);
      top[row] = highest[row];
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      scores[i] = exp2_approximate(scores[i] * SCALE - base[i % 4 / 2]);
      added[i % 4 / 2] += scores[i];
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) sum[row] = sum[row] * shrink[row] + added[row];
  }
};

template <int N>
__device__ __forceinline__ void scale_rows(float (&values)[N], const float (&factors)[2]) {
#pragma unroll
  for (int i = 0; i < N; ++i) values[i] *= factors[i % 4 / 2];
}

// Weights as the left operand of the next product: four words for every 16 keys.
template <int N>
__device__ __forceinline__ void pack_weights(uint32 (&words)[N / 2], const float (&weights)[N]) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) words[i] = pack(weights[2 * i], weights[2 * i + 1]);
}

// Exchanges between lanes `distance` apart: the lower one's second word, the upper one's first.
__device__ __forceinline__ void swap_words(uint32& first, uint32& second, bool upper,
                                           int distance) {
  const uint32 received = __shfl_xor_sync(FULL, upper ? first : second, distance);
  first = upper ? received : first;
  second = upper ? second : received;
}

// Divides the output by the softmax's sums and stores the warp's first `rows` rows. target: the
// head's first scalar in the warp's first row; stride: scalars between rows.
template <int N>
__device__ __forceinline__ void store_output(float (&output)[N], const float (&sum)[2],
                                             scalar* target, int stride, int rows) {
  const int lane = threadIdx.x % WARP, column = lane % 4;
  float inverse[2];
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    float total = sum[row] + __shfl_xor_sync(FULL, sum[row], 1);
    total += __shfl_xor_sync(FULL, total, 2);
    inverse[row] = 1.f / total;
  }
  scale_rows(output, inverse);
#pragma unroll
  for (int row = 0; row < 2; ++row) {
    scalar* line = target + static_cast<size_t>(lane / 4 + 8 * row) * stride + 8 * column;
#pragma unroll
    for (int j = 0; j < N / 4; j += 4) {
      // Four lanes have a pair each of four blocks: transposed, a block each, 16 bytes.
      uint32 words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int first = 4 * (j + i) + 2 * row;
        words[i] = pack(output[first], output[first + 1]);
      }
      swap_words(words[0], words[1], column & 1, 1);
      swap_words(words[2], words[3], column & 1, 1);
      swap_words(words[0], words[2], column & 2, 2);
      swap_words(words[1], words[3], column & 2, 2);
      if (lane / 4 + 8 * row < rows) {
        *reinterpret_cast<uint4*>(line + 8 * j) =
            make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
  }
}
