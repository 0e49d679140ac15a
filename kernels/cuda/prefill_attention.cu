// Causal attention of rows with several new tokens over their paged context, on mma.sync, after
// FlashAttention-2 (Dao 2023): for every device from compute capability 8.0.
//
// A work item is 128 neighbouring queries of one row and one head; as many blocks as the device has
// multiprocessors take items until none is left. Eight warps hold 16 queries each. Keys and values
// come 64 positions at a time, from the last that the tile sees to the first; the next ones are
// copied while these are multiplied. In shared memory the 16-byte pieces of a row are swizzled by
// the row's number, so that the eight rows of a matrix lie in different banks.
//
// -D: SCALAR, HEAD_DIM (64 or 128).
#include "mma.cuh"
#include "prefill_tile.cuh"

constexpr int STAGES = 2;
constexpr int KEYS = 64;  // positions of a stage
constexpr int THREADS = QUERIES / 16 * WARP;
constexpr int PIECES = HEAD_DIM / 8;  // of 16 bytes in a row
constexpr int ROW_BYTES = PIECES * 16;

struct Shared {
  unsigned char queries[QUERIES * ROW_BYTES];
  unsigned char keys[STAGES][KEYS * ROW_BYTES];
  unsigned char values[STAGES][KEYS * ROW_BYTES];
  int item;
};

// Where a piece of a row lies in a tile.
__device__ __forceinline__ uint32 piece_offset(int row, int piece) {
  return row * ROW_BYTES + ((piece ^ (row & 7)) * 16);
}

// One layer's cache [num_blocks, 2 * kv_heads, block_size, head_dim].
struct Cache {
  const scalar* pages;
  int block_size, kv_heads;

  // Of the first scalar of a position; `head` counts keys first, then values.
  __device__ __forceinline__ const scalar* find(const Tile& tile, int head, int position) const {
    const size_t block = tile.blocks[position / block_size];
    return pages +
           ((block * 2 * kv_heads + head) * block_size + position % block_size) * HEAD_DIM;
  }
};

// The keys and values from position `first` on; zeros past the context, where there may be NaN.
__device__ __forceinline__ void copy_stage(Shared& shared, int stage, const Cache& cache,
                                           const Tile& tile, int kv_head, int first) {
  const uint32 keys = shared_address(shared.keys[stage]);
  const uint32 values = shared_address(shared.values[stage]);
#pragma unroll
  for (int i = 0; i < KEYS * PIECES; i += THREADS) {
    const int row = (i + threadIdx.x) / PIECES, piece = threadIdx.x % PIECES;
    const bool wanted = first + row < tile.context();
    const int position = wanted ? first + row : first;
    const uint32 offset = piece_offset(row, piece);
    copy_piece(keys + offset, cache.find(tile, kv_head, position) + piece * 8, wanted);
    copy_piece(values + offset, cache.find(tile, cache.kv_heads + kv_head, position) + piece * 8,
               wanted);
  }
}

__device__ __forceinline__ void copy_queries(Shared& shared, const scalar* qkv, const Tile& tile,
                                             int token_size) {
  const uint32 queries = shared_address(shared.queries);
#pragma unroll
  for (int i = 0; i < QUERIES * PIECES; i += THREADS) {
    const int row = (i + threadIdx.x) / PIECES, piece = threadIdx.x % PIECES;
    const bool wanted = row < tile.queries;
    const size_t token = tile.token + (wanted ? row : 0);
    copy_piece(queries + piece_offset(row, piece),
               qkv + token * token_size + tile.head * HEAD_DIM + piece * 8, wanted);
  }
}

// scores [16, KEYS] of a warp = queries keys^T.
__device__ __forceinline__ void multiply_keys(float (&scores)[KEYS / 2], uint32 queries,
                                              uint32 keys) {
  const int lane = threadIdx.x % WARP;
  const int query = threadIdx.x / WARP * 16 + lane % 16, key = lane / 16 * 8 + lane % 8;
#pragma unroll
  for (float& score : scores) score = 0.f;
#pragma unroll
  for (int step = 0; step < HEAD_DIM / 16; ++step) {
    uint32 a[4];
    load_matrices(a, queries + piece_offset(query, 2 * step + lane / 16));
#pragma unroll
    for (int j = 0; j < KEYS / 8; j += 2) {
      uint32 b[4];
      load_matrices(b, keys + piece_offset(8 * j + key, 2 * step + lane / 8 % 2));
      multiply(scores + 4 * j, a, b[0], b[1]);
      multiply(scores + 4 * j + 4, a, b[2], b[3]);
    }
  }
}

// output [16, HEAD_DIM] of a warp += weights values.
__device__ __forceinline__ void multiply_values(float (&output)[HEAD_DIM / 2],
                                                const uint32 (&weights)[KEYS / 4], uint32 values) {
  const int lane = threadIdx.x % WARP;
#pragma unroll
  for (int step = 0; step < KEYS / 16; ++step) {
#pragma unroll
    for (int j = 0; j < HEAD_DIM / 8; j += 2) {
      uint32 b[4];
      load_transposed(b, values + piece_offset(16 * step + lane % 16, j + lane / 16));
      multiply(output + 4 * j, weights + 4 * step, b[0], b[1]);
      multiply(output + 4 * j + 4, weights + 4 * step, b[2], b[3]);
    }
  }
}

__device__ __forceinline__ void attend(Shared& shared, const Tile& tile, const scalar* qkv,
                                       const Cache& cache, int heads, scalar* out) {
  const int lane = threadIdx.x % WARP;
  const int first_row = threadIdx.x / WARP * 16;
  const int context = tile.context(), kv_head = tile.head / (heads / cache.kv_heads);
  const int row = first_row + lane / 4;
  const int last[2] = {min(tile.position + row, context - 1),
                       min(tile.position + row + 8, context - 1)};
  float scores[KEYS / 2], output[HEAD_DIM / 2], shrink[2];
  uint32 weights[KEYS / 4];
#pragma unroll
  for (float& value : output) value = 0.f;
  OnlineSoftmax softmax;
  softmax.reset();

  const int num_steps = (context + KEYS - 1) / KEYS;
  copy_queries(shared, qkv, tile, (heads + 2 * cache.kv_heads) * HEAD_DIM);
  copy_stage(shared, 0, cache, tile, kv_head, (num_steps - 1) * KEYS);
  commit_copies();
  for (int step = 0; step < num_steps; ++step) {
    const int first = (num_steps - 1 - step) * KEYS, stage = step % STAGES;
    if (first > 0) copy_stage(shared, (step + 1) % STAGES, cache, tile, kv_head, first - KEYS);
    commit_copies();
    wait_for_copies<1>();
    __syncthreads();
    multiply_keys(scores, shared_address(shared.queries), shared_address(shared.keys[stage]));
    if (first + KEYS - 1 > tile.position + first_row) hide(scores, first + lane % 4 * 2, last);
    softmax.update(scores, shrink);
    scale_rows(output, shrink);
    pack_weights(weights, scores);
    multiply_values(output, weights, shared_address(shared.values[stage]));
    __syncthreads();
  }
  store_output(output, softmax.sum,
               out + (static_cast<size_t>(tile.token + first_row) * heads + tile.head) * HEAD_DIM,
               heads * HEAD_DIM, tile.queries - first_row);
}

// qkv: [tokens, heads + 2 * kv_heads, head_dim]; cache: of the layer.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    prefill_attention(const scalar* qkv, const scalar* pages, int block_size, int heads,
                      int kv_heads, const int* block_tables, int max_blocks, const int* rows,
                      const int* starts, const int* counts, const int* first_tokens,
                      const int* sizes, const int* tile_offsets, int* scheduler, scalar* out) {
  extern __shared__ __align__(16) unsigned char raw[];
  Shared& shared = *reinterpret_cast<Shared*>(raw);
  const Batch batch = {block_tables, max_blocks,   rows,  starts,
                       counts,       first_tokens, sizes, tile_offsets};
  const Cache cache = {pages, block_size, kv_heads};
  int item = blockIdx.x;
  while (true) {
    const Tile tile = find_tile(batch, heads, item);
    if (tile.head < 0) break;
    attend(shared, tile, qkv, cache, heads, out);
    if (threadIdx.x == 0) shared.item = gridDim.x + atomicAdd(&scheduler[0], 1);
    __syncthreads();
    item = shared.item;
  }
  if (threadIdx.x == 0) end_items(scheduler);
}
