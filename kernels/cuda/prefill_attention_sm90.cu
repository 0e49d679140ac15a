// Causal attention of rows with several new tokens over their paged context, on Hopper's warpgroup
// matrix instructions, after FlashAttention-3 (Shah et al. 2024).
//
// A work item is 128 neighbouring queries of one row and one head; as many blocks as the device has
// multiprocessors take items until none is left. In a block one warp loads and two warpgroups of
// 128 threads multiply, 64 queries each. Keys and values come 128 positions at a time, from the
// last that the tile sees to the first, so that all masking is over after the first one or two.
// While a warpgroup turns scores into weights its tensor cores add the weights before times their
// values, and the two warpgroups take turns, so that one multiplies while the other exponentiates.
//
// In shared memory a tile is one region [128][64] for every 64 dimensions, in 128-byte rows with
// TMA's swizzle. A page of 16 positions is one box of each region.
//
// -D: SCALAR, HEAD_DIM (64 or 128).
#include "matrix.cuh"
#include "prefill_tile.cuh"
#include "tma.cuh"
#include "wgmma.cuh"

constexpr int STAGES = 2;
constexpr int KEYS = 128;  // positions of a stage
constexpr int PAGE = 16;
constexpr int PAGES = KEYS / PAGE;
constexpr int REGIONS = HEAD_DIM / 64;
constexpr int ROW_BYTES = 128;
constexpr int PAGE_BYTES = PAGE * ROW_BYTES;  // of one region
constexpr int REGION_BYTES = KEYS * ROW_BYTES;
constexpr int TILE_BYTES = REGIONS * REGION_BYTES;
constexpr int GROUP_THREADS = 128;
constexpr int THREADS = 3 * GROUP_THREADS;
constexpr int CONSUMER_THREADS = 2 * GROUP_THREADS;
constexpr int CONSUMER_WARPS = CONSUMER_THREADS / WARP;
constexpr int CLEARED = 1, FIRST_TURN = 2;  // named barriers; a turn for each warpgroup
static_assert(QUERIES == KEYS, "queries are a tile like any other");

struct Shared {
  alignas(1024) unsigned char queries[TILE_BYTES];
  unsigned char keys[STAGES][TILE_BYTES];
  unsigned char values[STAGES][TILE_BYTES];
  uint64 queries_full, queries_free;  // queries_full also guards `tile`
  uint64 keys_full[STAGES], keys_free[STAGES];
  uint64 values_full[STAGES], values_free[STAGES];
  int tile[sizeof(Tile) / 4];
};
static_assert(sizeof(Shared) <= (1 + 2 * STAGES) * TILE_BYTES + 1024, "what the wrapper asks for");

// The count-th use of one of so many buffers: where it is, and the parity of its barriers' phase.
template <int BUFFERS>
struct Use {
  uint32 index, parity;
  __device__ __forceinline__ explicit Use(uint32 count)
      : index(count % BUFFERS), parity(count / BUFFERS % 2) {}
};

// A tile on its way from the loading warp to the others, in order by the barrier around it. Atomic
// only because the sanitizer's racecheck sees no order in such a barrier.
constexpr int TILE_WORDS = sizeof(Tile) / 4;
__device__ __forceinline__ void put_tile(int* words, const Tile& tile) {
#pragma unroll
  for (int i = 0; i < TILE_WORDS; ++i)
    atomicExch(words + i, reinterpret_cast<const int*>(&tile)[i]);
}
// Called by whole warps.
__device__ __forceinline__ Tile get_tile(int* words) {
  const int lane = threadIdx.x % WARP;
  const int word = lane < TILE_WORDS ? atomicOr(words + lane, 0) : 0;
  Tile tile;
#pragma unroll
  for (int i = 0; i < TILE_WORDS; ++i)
    reinterpret_cast<int*>(&tile)[i] = __shfl_sync(FULL, word, i);
  return tile;
}

// Where one page lies in the cache.
struct Page {
  int block;  // of all layers'
  int offset;
};

struct Loader {
  Shared& shared;
  const TensorMap* queries_map;
  const TensorMap* cache_map;
  int first_block;  // of the layer
  int kv_heads, pages_per_block, group;

  // Of the lane-th page from `first` on. Pages past the context are not looked up.
  __device__ __forceinline__ Page find_page(const Tile& tile, int first) const {
    const int page = first + static_cast<int>(threadIdx.x) % WARP;
    if (page * PAGE >= tile.context()) return {0, 0};
    return {first_block + tile.blocks[page / pages_per_block], page % pages_per_block * PAGE};
  }

  // Called by a whole warp that holds a page a lane; pages past the context stay as they are.
  __device__ __forceinline__ void load_pages(const Tile& tile, int first, const Page& page,
                                             int head, const void* target, const void* full) const {
    const int lane = threadIdx.x % WARP;
    const int pages = min((tile.context() - first * PAGE + PAGE - 1) / PAGE, PAGES);
    const uint32 barrier = shared_address(full);
    if (lane == 0) barrier_expect(barrier, pages * REGIONS * PAGE_BYTES);
    __syncwarp();
    if (lane >= pages) return;
#pragma unroll
    for (int region = 0; region < REGIONS; ++region) {
      tma_load(shared_address(target) + region * REGION_BYTES + lane * PAGE_BYTES, cache_map,
               barrier, region * 64, page.offset, head, page.block);
    }
  }

  __device__ __forceinline__ void load_keys(const Tile& tile, int first, const Page& page,
                                            uint32 count) const {
    const Use<STAGES> use(count);
    barrier_wait(shared_address(&shared.keys_free[use.index]), use.parity ^ 1);
    load_pages(tile, first, page, tile.head / group, shared.keys[use.index],
               &shared.keys_full[use.index]);
  }

  __device__ __forceinline__ void load_values(const Tile& tile, int first, const Page& page,
                                              uint32 count) const {
    const Use<STAGES> use(count);
    barrier_wait(shared_address(&shared.values_free[use.index]), use.parity ^ 1);
    load_pages(tile, first, page, kv_heads + tile.head / group, shared.values[use.index],
               &shared.values_full[use.index]);
  }

  // Rows past the tile's queries hold other tokens, or zeros past the last.
  __device__ __forceinline__ void load_queries(const Tile& tile, uint32 count) const {
    barrier_wait(shared_address(&shared.queries_free), Use<1>(count).parity ^ 1);
    if (threadIdx.x % WARP != 0) return;
    const uint32 barrier = shared_address(&shared.queries_full);
    put_tile(shared.tile, tile);
    if (tile.head < 0) return barrier_arrive(barrier);
    barrier_expect(barrier, TILE_BYTES);
#pragma unroll
    for (int region = 0; region < REGIONS; ++region) {
      tma_load(shared_address(shared.queries) + region * REGION_BYTES, queries_map, barrier,
               tile.head * HEAD_DIM + region * 64, tile.token);
    }
  }

  // Everything a tile needs, in the order in which it is needed. loaded: KV tiles before.
  __device__ __forceinline__ void load_tile(const Tile& tile, uint32 count, uint32& loaded) const {
    int first = (tile.context() - 1) / KEYS * PAGES;
    Page page = find_page(tile, first);
    load_keys(tile, first, page, loaded);
    load_queries(tile, count);
    for (; first > 0; first -= PAGES, ++loaded) {
      const Page next = find_page(tile, first - PAGES);
      load_keys(tile, first - PAGES, next, loaded + 1);
      load_values(tile, first, page, loaded);
      page = next;
    }
    load_values(tile, 0, page, loaded);
    ++loaded;
  }
};

// The loading warp.
__device__ __forceinline__ void produce(const Loader& loader, const Batch& batch, int heads,
                                        int* scheduler) {
  int item = blockIdx.x;
  uint32 loaded = 0;
  for (uint32 count = 0;; ++count) {
    const Tile tile = find_tile(batch, heads, item);
    if (tile.head < 0) {
      loader.load_queries(tile, count);
      break;
    }
    loader.load_tile(tile, count, loaded);
    if (threadIdx.x % WARP == 0) item = gridDim.x + atomicAdd(&scheduler[0], 1);
    item = __shfl_sync(FULL, item, 0);
  }
  if (threadIdx.x % WARP == 0) end_items(scheduler);
}

// scores [64, 128] = queries keys^T, issued.
__device__ __forceinline__ void multiply_keys(float (&scores)[KEYS / 2], uint32 queries,
                                              uint32 keys) {
  const uint64 a = descriptor(queries, 0), b = descriptor(keys, 0);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < HEAD_DIM / 16; ++step) {
    const uint64 advance = (step / 4 * REGION_BYTES + step % 4 * 32) >> 4;
    wgmma_shared(scores, a + advance, b + advance, step > 0);
  }
  wgmma_commit();
}

// output [64, HEAD_DIM] += weights values, issued.
__device__ __forceinline__ void multiply_values(float (&output)[HEAD_DIM / 2],
                                                const uint32 (&weights)[KEYS / 4], uint32 values) {
  const uint64 b = descriptor(values, REGION_BYTES);
  wgmma_fence();
#pragma unroll
  for (int step = 0; step < KEYS / 16; ++step) {
    wgmma_registers(output, weights + 4 * step, b + (step * 16 * ROW_BYTES >> 4));
  }
  wgmma_commit();
}

// Zeroes the values of positions from `first` on: their weights are zero, but 0 * NaN is NaN.
__device__ __forceinline__ void clear_values(unsigned char* values, int first) {
  constexpr int PIECES = ROW_BYTES / 16;
  const int pieces = (KEYS - first) * PIECES;
  for (int i = threadIdx.x - GROUP_THREADS; i < pieces * REGIONS; i += CONSUMER_THREADS) {
    const int piece = first * PIECES + i % pieces;
    *reinterpret_cast<uint4*>(values + i / pieces * REGION_BYTES + piece * 16) =
        make_uint4(0, 0, 0, 0);
  }
  fence_async_proxy();
  named_sync(CLEARED, CONSUMER_THREADS);
}

// A multiplying warpgroup: 64 queries of every tile.
__device__ __forceinline__ void consume(Shared& shared, int group, int heads, scalar* out) {
  const int lane = threadIdx.x % WARP;
  const int first_row = group * 64 + static_cast<int>(threadIdx.x) % GROUP_THREADS / WARP * 16;
  const uint32 queries = shared_address(shared.queries) + group * 64 * ROW_BYTES;
  const auto wait = [](const uint64& barrier, uint32 parity) {
    barrier_wait(shared_address(&barrier), parity);
  };
  const auto wait_for_keys = [&](uint32 count) {
    const Use<STAGES> use(count);
    wait(shared.keys_full[use.index], use.parity);
  };
  const auto release = [lane](const uint64& barrier) {
    if (lane == 0) barrier_arrive(shared_address(&barrier));
  };
  float scores[KEYS / 2], output[HEAD_DIM / 2];
  uint32 weights[KEYS / 4];
  float shrink[2];
  OnlineSoftmax softmax;
  uint32 done = 0;  // KV tiles
  if (group == 1) named_arrive(FIRST_TURN, CONSUMER_THREADS);

  for (uint32 count = 0;; ++count) {
    wait(shared.queries_full, count % 2);
    const Tile tile = get_tile(shared.tile);
    if (tile.head < 0) return;
    const int context = tile.context();
    const int row = first_row + lane / 4;
    const int last[2] = {min(tile.position + row, context - 1),
                         min(tile.position + row + 8, context - 1)};
    int first = (context - 1) / KEYS * KEYS;  // position of the KV tile
    softmax.reset();
#pragma unroll
    for (float& value : output) value = 0.f;

    Use<STAGES> use(done);
    wait(shared.keys_full[use.index], use.parity);
    pin(scores);
    multiply_keys(scores, queries, shared_address(shared.keys[use.index]));
    wgmma_wait<0>();
    pin(scores);
    release(shared.keys_free[use.index]);
    hide(scores, first + lane % 4 * 2, last);
    softmax.update(scores, shrink);
    pack_weights(weights, scores);
    if (context % KEYS) {
      wait(shared.values_full[use.index], use.parity);
      clear_values(shared.values[use.index], context % KEYS);
    }

    if (first > 0) wait_for_keys(done + 1);
    while (first > 0) {
      first -= KEYS;
      const Use<STAGES> next(++done);
      named_sync(FIRST_TURN + group, CONSUMER_THREADS);
      pin(scores);
      pin(output);
      multiply_keys(scores, queries, shared_address(shared.keys[next.index]));
      wait(shared.values_full[use.index], use.parity);
      multiply_values(output, weights, shared_address(shared.values[use.index]));
      named_arrive(FIRST_TURN + 1 - group, CONSUMER_THREADS);
      wgmma_wait<1>();
      pin(scores);
      release(shared.keys_free[next.index]);
      if (first + KEYS - 1 > tile.position + group * 64) {
        hide(scores, first + lane % 4 * 2, last);
      }
      softmax.update(scores, shrink);
      // Here, not above: its branch keeps the compiler from moving the exponentials, which should
      // run beside the product, below the wait for it.
      if (first > 0) wait_for_keys(done + 1);
      wgmma_wait<0>();
      pin(output);
      release(shared.values_free[use.index]);
      scale_rows(output, shrink);
      pack_weights(weights, scores);
      use = next;
    }
    release(shared.queries_free);
    wait(shared.values_full[use.index], use.parity);
    pin(output);
    multiply_values(output, weights, shared_address(shared.values[use.index]));
    wgmma_wait<0>();
    pin(output);
    release(shared.values_free[use.index]);
    ++done;
    store_output(output, softmax.sum,
                 out + (static_cast<size_t>(tile.token + first_row) * heads + tile.head) * HEAD_DIM,
                 heads * HEAD_DIM, tile.queries - first_row);
  }
}

// queries_map: all tokens, boxes [128, 64]; cache_map: [layers * num_blocks, 2 * kv_heads,
// block_size, head_dim], boxes [1, 1, 16, 64]; first_block: of the layer.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    prefill_attention_sm90(const __grid_constant__ TensorMap queries_map,
                           const __grid_constant__ TensorMap cache_map, int first_block,
                           int block_size, int heads, int kv_heads, const int* block_tables,
                           int max_blocks, const int* rows, const int* starts, const int* counts,
                           const int* first_tokens, const int* sizes, const int* tile_offsets,
                           int* scheduler, scalar* out) {
  extern __shared__ unsigned char raw[];
  Shared& shared = *reinterpret_cast<Shared*>(raw + (-shared_address(raw) & 1023));
  if (threadIdx.x == 0) {
    prefetch_map(&queries_map);
    prefetch_map(&cache_map);
    barrier_init(shared_address(&shared.queries_full), 1);
    barrier_init(shared_address(&shared.queries_free), CONSUMER_WARPS);
    for (int stage = 0; stage < STAGES; ++stage) {
      barrier_init(shared_address(&shared.keys_full[stage]), 1);
      barrier_init(shared_address(&shared.keys_free[stage]), CONSUMER_WARPS);
      barrier_init(shared_address(&shared.values_full[stage]), 1);
      barrier_init(shared_address(&shared.values_free[stage]), CONSUMER_WARPS);
    }
    barrier_init_fence();
  }
  __syncthreads();
  wait_for_predecessor();
  release_successor();
  // The same in all lanes, and the compiler knows it.
  const int group = __shfl_sync(FULL, threadIdx.x / GROUP_THREADS, 0);
  if (group == 0) {
    lower_registers<40>();
    if (threadIdx.x < WARP) {
      const Loader loader = {shared,      &queries_map, &cache_map,        first_block,
                             kv_heads,    block_size / PAGE, heads / kv_heads};
      const Batch batch = {block_tables, max_blocks,   rows,  starts,
                           counts,       first_tokens, sizes, tile_offsets};
      produce(loader, batch, heads, scheduler);
    }
  } else {
    raise_registers<232>();
    consume(shared, group - 1, heads, out);
  }
}
