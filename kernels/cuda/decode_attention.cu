// Attention of rows with one new token over their paged context, split over positions; one launch.
//
// The work is a list of pages (16 positions of one row and KV head), ordered by row, head, page. A
// *segment* is all pages of one row and head. Every thread block takes an equal share of the list,
// so rows of unequal length are balanced exactly; its warps take the share's pages in turn. What a
// block has of a segment is merged in shared memory; if that is not all of it, the last of the
// segment's blocks to arrive merges what each of them left in its workspace slot, in their order.
//
// -D: those of page_attention.cuh, MAX_ROWS, BLOCKS_PER_SM.
#include "page_attention.cuh"

constexpr int WARPS = 4;
constexpr int THREADS = WARPS * WARP;
constexpr int MIN_SHARE = WARPS;  // pages: less than one a warp would only add merging
constexpr int PARTIAL = GROUP * HEAD_STRIDE;
constexpr int HEAD_UNITS = HEAD_DIM / 4;  // of merging: four values of a head
constexpr int UNITS = GROUP * HEAD_UNITS;
constexpr int MERGED_AT_ONCE = HEAD_DIM / 16;  // as registers allow

// Adds one and returns the sum before. What this block wrote before its last barrier is visible to
// who counts it, and what the counted wrote is visible to this block after its next barrier.
__device__ __forceinline__ int arrive(int* counter) {
  int before;
  asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(counter)
               : "memory");
  return before;
}

// The step's decode rows.
struct Rows {
  int offsets[MAX_ROWS + 1];  // pages before each row, per head
  int table_rows[MAX_ROWS];
  int starts[MAX_ROWS];

  // Returns their number. The first of them are fetched along with it.
  __device__ __forceinline__ int fetch(const int* page_offsets, const int* rows,
                                       const int* first_positions, const int* sizes) {
    const int count = sizes[2];
    const auto fetch_row = [&](int row) {
      if (row <= MAX_ROWS) offsets[row] = page_offsets[row];
      if (row < MAX_ROWS) table_rows[row] = rows[row], starts[row] = first_positions[row];
    };
    fetch_row(threadIdx.x);
#pragma unroll 1
    for (int row = threadIdx.x + THREADS; row <= count; row += THREADS) fetch_row(row);
    __syncthreads();
    return count;
  }

  __device__ __forceinline__ int pages(int row) const { return offsets[row + 1] - offsets[row]; }
};

// A page in the list of all.
struct Cursor {
  int index, row, head, page;

  // No further than to the end of the list.
  __device__ __forceinline__ void advance(const Rows& rows, int by, int end) {
    index += by;
    page += by;
    while (index < end && page >= rows.pages(row)) {
      page -= rows.pages(row);
      if (++head == KV_HEADS) head = 0, ++row;
    }
  }
};

__device__ __forceinline__ Cursor find(const Rows& rows, int num_rows, int index) {
  int row = 0;
  for (int above = num_rows; above - row > 1;) {
    const int middle = (row + above) / 2;
    if (rows.offsets[middle] * KV_HEADS <= index) {
      row = middle;
    } else {
      above = middle;
    }
  }
  const int inside = index - rows.offsets[row] * KV_HEADS, pages = rows.pages(row);
  return {index, row, inside / pages, inside % pages};
}

// Four values of a head with the max and the sum of its softmax.
struct Sums {
  float4 values;
  float max, sum;
};

// Adds N more, one of which at least has seen a position, in this order.
template <int N>
__device__ __forceinline__ void merge(Sums& to, const Sums (&parts)[N]) {
  float highest = to.max;
#pragma unroll
  for (int i = 0; i < N; ++i) highest = fmaxf(highest, parts[i].max);
  const float keep = exp2_fast(to.max - highest);
  to.max = highest;
  to.sum *= keep;
  to.values.x *= keep, to.values.y *= keep, to.values.z *= keep, to.values.w *= keep;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float take = exp2_fast(parts[i].max - highest);
    to.sum += take * parts[i].sum;
    to.values.x += take * parts[i].values.x, to.values.y += take * parts[i].values.y;
    to.values.z += take * parts[i].values.z, to.values.w += take * parts[i].values.w;
  }
}

__device__ __forceinline__ Sums nothing() {
  return {make_float4(0.f, 0.f, 0.f, 0.f), -infinity(), 0.f};
}

// out: of the segment's first head.
__device__ __forceinline__ void write_out(scalar* out, int unit, const Sums& sums) {
  const float scale = __fdividef(1.f, sums.sum);
  reinterpret_cast<uint2*>(out)[unit] =
      make_uint2(pack(sums.values.x * scale, sums.values.y * scale),
                 pack(sums.values.z * scale, sums.values.w * scale));
}

// Merges what the warps have of a segment into out, or, if the segment has more, into slot.
__device__ __forceinline__ void merge_warps(const float (&warps)[WARPS][PARTIAL], bool whole,
                                            scalar* out, float* slot) {
  for (int unit = threadIdx.x; unit < UNITS; unit += THREADS) {
    const int offset = unit / HEAD_UNITS * HEAD_STRIDE, dim = unit % HEAD_UNITS * 4;
    Sums parts[WARPS], all = nothing();
#pragma unroll
    for (int i = 0; i < WARPS; ++i) {
      const float* from = warps[i] + offset;
      parts[i] = {*reinterpret_cast<const float4*>(from + dim), from[HEAD_DIM], from[HEAD_DIM + 1]};
    }
    merge(all, parts);
    if (whole) {
      write_out(out, unit, all);
      continue;
    }
    *reinterpret_cast<float4*>(slot + offset + dim) = all.values;
    if (dim > 0) continue;
    *reinterpret_cast<float2*>(slot + offset + HEAD_DIM) = make_float2(all.max, all.sum);
  }
}

// Merges what blocks first to last left of a segment; only the first's may be in its second slot.
__device__ __forceinline__ void merge_blocks(const float* workspace, int first, int first_slot,
                                             int last, scalar* out) {
  for (int unit = threadIdx.x; unit < UNITS; unit += THREADS) {
    const int offset = unit / HEAD_UNITS * HEAD_STRIDE, dim = unit % HEAD_UNITS * 4;
    Sums all = nothing();
    for (int block = first; block <= last; block += MERGED_AT_ONCE) {
      Sums parts[MERGED_AT_ONCE];
#pragma unroll
      for (int i = 0; i < MERGED_AT_ONCE; ++i) {
        parts[i] = nothing();
        if (block + i > last) continue;
        const int slot = 2 * (block + i) + (block + i == first ? first_slot : 0);
        const float* from = workspace + slot * PARTIAL + offset;
        parts[i].values = __ldcg(reinterpret_cast<const float4*>(from + dim));
        const float2 max_sum = __ldcg(reinterpret_cast<const float2*>(from + HEAD_DIM));
        parts[i].max = max_sum.x, parts[i].sum = max_sum.y;
      }
      merge(all, parts);
    }
    write_out(out, unit, all);
  }
}

// qkv [tokens, HEADS + 2 * KV_HEADS, HEAD_DIM]; cache [num_blocks, 2 * KV_HEADS, BLOCK_SIZE,
// HEAD_DIM]; out [tokens, HEADS, HEAD_DIM]; workspace [2 * blocks, GROUP, HEAD_STRIDE]; counters
// [MAX_ROWS, KV_HEADS], zero before and after.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM)
    decode_attention(const scalar* qkv, const scalar* cache, const int* block_tables,
                     const int* table_rows, const int* starts, const int* sizes,
                     const int* page_offsets, scalar* out, float* workspace, int* counters,
                     int max_blocks) {
  __shared__ Rows rows;
  __shared__ __align__(16) float partials[2][WARPS][PARTIAL];
  __shared__ int arrived;
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, j = lane % 4;

  release_successor();
  const int num_rows = rows.fetch(page_offsets, table_rows, starts, sizes);
  const int total = rows.offsets[num_rows] * KV_HEADS;
  const int share = max((total + int(gridDim.x) - 1) / int(gridDim.x), MIN_SHARE);
  const int begin = blockIdx.x * share, end = min(begin + share, total);
  if (begin >= end) {
    // A grid that ended before its predecessor would let its successor begin too early.
    wait_for_predecessor();
    return;
  }

  Cursor segment = find(rows, num_rows, begin);
  Cursor ahead = segment;
  ahead.advance(rows, warp, end);
  int block = 0;  // of the page ahead
  const auto fetch_block = [&] {
    if (ahead.index >= end) return;
    const size_t table = size_t(rows.table_rows[ahead.row]) * max_blocks;
    block = block_tables[table + ahead.page / (BLOCK_SIZE / PAGE)];
  };
  // The page whose keys and values come next, and how many positions are left from there on.
  const scalar* page = nullptr;
  int index, left = 0;
  const auto step = [&] {
    index = ahead.index;
    if (index >= end) return;
    page = cache + (size_t(block) * 2 * KV_HEADS + ahead.head) * (BLOCK_SIZE * HEAD_DIM) +
           ahead.page % (BLOCK_SIZE / PAGE) * (PAGE * HEAD_DIM);
    left = rows.starts[ahead.row] + 1 - ahead.page * PAGE;
    ahead.advance(rows, WARPS, end);
    fetch_block();
  };
  fetch_block();
  step();

  Keys keys;
  Values values;
  // Of a row only the newest position is written by this step: all other pages may be read at once.
  const bool any = index < end, newest = left <= PAGE;
  if (any && newest) prefetch_page(page, lane);
  if (any && !newest) load_keys(keys, page, g, j), load_values(values, page, g, j);
  wait_for_predecessor();
  if (any && newest) load_keys(keys, page, g, j), load_values(values, page, g, j);

  for (int number = 0; segment.index < end; ++number) {
    const int segment_begin = segment.index - segment.page;
    const int segment_end = segment_begin + rows.pages(segment.row);
    const size_t first_head = size_t(segment.head) * GROUP;
    Queries queries;
    load_queries(queries,
                 qkv + (size_t(segment.row) * (HEADS + 2 * KV_HEADS) + first_head) * HEAD_DIM, g,
                 j);
    Softmax softmax;
    softmax.clear();
    while (index < min(segment_end, end)) {
      const int valid = left;
      float scores[4];
      score(scores, keys, queries, valid, g);
      step();
      if (index < end) load_keys(keys, page, g, j);
      softmax.rescale(scores);
      mask_values(values, valid, j);
      softmax.add_values(scores, values);
      if (index < end) load_values(values, page, g, j);
    }

    // Two buffers in turn: who writes one has passed the barrier that follows its last reading.
    float(&warps)[WARPS][PARTIAL] = partials[number % 2];
    softmax.write(warps[warp], g, j);
    __syncthreads();
    const bool whole = segment_begin >= begin && segment_end <= end;
    scalar* segment_out = out + (size_t(segment.row) * HEADS + first_head) * HEAD_DIM;
    merge_warps(warps, whole, segment_out,
                workspace + (2 * blockIdx.x + (segment_begin > begin)) * PARTIAL);
    if (!whole) {
      const int first = segment_begin / share, last = (segment_end - 1) / share;
      int* counter = counters + segment.row * KV_HEADS + segment.head;
      __syncthreads();
      if (threadIdx.x == 0) arrived = arrive(counter);
      __syncthreads();
      if (arrived == last - first) {
        merge_blocks(workspace, first, segment_begin > first * share, last, segment_out);
        if (threadIdx.x == 0) *counter = 0;
      }
    }
    segment.advance(rows, segment_end - segment.index, end);
  }
}
