// Which logit parts the best of a row from the rest, by count (top-k) or by probability (top-p),
// without a sort: histograms of ever narrower intervals, summed in integers, so that the order of
// the additions does not matter.
#pragma once

#include "sampling_row.cuh"

constexpr int SELECT_THREADS = 512;
constexpr int SELECT_WARPS = SELECT_THREADS / WARP;
constexpr int BIN_BITS = 11, BINS = 1 << BIN_BITS, BINS_OF_THREAD = BINS / SELECT_THREADS;
constexpr int SELECT_LOADS = 3;  // in flight in each thread

struct SelectScratch {  // in shared memory
  uint32 low[BINS], high[BINS];  // a bin's sum in two halves: there are no 64-bit shared atomics
  uint64 warp_sums[SELECT_WARPS];
  float warp_maxima[SELECT_WARPS];
  uint64 rest;
  int bin, size;
  uint32 first, last;
  Row row;
  int top_k;                             // 0: off
  float temperature, top_p, min_p, max;  // of the row
};

__shared__ SelectScratch scratch;
extern __shared__ float list[];

// Logits of a row that are at least `floor` (a finite number: never -infinity or NaN), from the
// first `size` of the list, or, where that is negative, from scratch.row.
struct Values {
  int size;
  float floor;
};

// What a logit adds to its bin: 1, or its probability relative to the largest, in units of 2^-40.
struct Weight {
  bool is_mass;
  float max, scale;

  __device__ __forceinline__ uint64 operator()(float z) const {
    return is_mass ? __float2ull_rn(exp2f((z - max) * scale) * 0x1p40f) : 1;
  }
};

// How much the best must weigh together: a number of logits, `amount`, or, where that is 0, a share
// of the probability.
struct Goal {
  uint64 amount;
  double share;
};

struct Cut {
  int bin;      // which the goal is reached in; negative: nowhere
  uint64 rest;  // of the goal, that the bins before it leave to it
};

// Integers in falling order of the numbers.
__device__ __forceinline__ uint32 to_key(float z) {
  const uint32 bits = __float_as_uint(z);
  return bits >> 31 ? bits : ~bits & 0x7fffffffu;
}
__device__ __forceinline__ float from_key(uint32 key) {
  return __uint_as_float(key >> 31 ? key : ~key & 0x7fffffffu);
}

// A bin for every logit, the best first: 256 for each octave of 1 + the distance from the largest,
// so that the logits of a warp rarely meet in one, whatever the model.
__device__ __forceinline__ int coarse_bin(float z, float max) {
  const uint32 bin = (__float_as_uint(1.f + (max - z)) - 0x3f800000u) >> 15;
  return min(bin, uint32(BINS - 1));
}

// The first `groups` of the row.
template <typename Function>
__device__ __forceinline__ void for_each_group(int groups, Function function) {
  const Row row = scratch.row;
  for (int first = threadIdx.x; first < groups; first += SELECT_LOADS * SELECT_THREADS) {
    float4 x[SELECT_LOADS];
#pragma unroll
    for (int i = 0; i < SELECT_LOADS; ++i) x[i] = row.raw(first + i * SELECT_THREADS);
#pragma unroll
    for (int i = 0; i < SELECT_LOADS; ++i) {
      const int group = first + i * SELECT_THREADS;
      if (group < groups) function(row.adjusted(group, x[i]));
    }
  }
}

template <typename Function>
__device__ __forceinline__ void for_each(const Values& values, Function function) {
  const auto visit = [&](float z) {
    if (z >= values.floor) function(z);
  };
  if (values.size < 0) {
    for_each_group(scratch.row.groups(),
                   [&](float4 z) { visit(z.x), visit(z.y), visit(z.z), visit(z.w); });
  } else {
    for (int i = threadIdx.x; i < values.size; i += SELECT_THREADS) visit(list[i]);
  }
}

// scratch.max, of every thread's.
__device__ __forceinline__ void find_max(float x) {
  x = warp_max(x);
  if (threadIdx.x % WARP == 0) scratch.warp_maxima[threadIdx.x / WARP] = x;
  __syncthreads();
  if (threadIdx.x < WARP) {
    x = warp_max(threadIdx.x < SELECT_WARPS ? scratch.warp_maxima[threadIdx.x] : -INFINITE);
    if (threadIdx.x == 0) scratch.max = x;
  }
  __syncthreads();
}

__device__ __forceinline__ void clear_bins() {
  for (int i = threadIdx.x; i < BINS; i += SELECT_THREADS) scratch.low[i] = scratch.high[i] = 0;
  __syncthreads();
}

__device__ __forceinline__ void add(int bin, uint64 weight) {
  const uint32 low = uint32(weight), old = atomicAdd(&scratch.low[bin], low);
  const uint32 high = uint32(weight >> 32) + (old + low < old);
  if (high) atomicAdd(&scratch.high[bin], high);
}

// In which bin the goal is reached.
__device__ __noinline__ Cut find(Goal goal) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  const int first = threadIdx.x * BINS_OF_THREAD;
  __syncthreads();
  uint64 sums[BINS_OF_THREAD], own = 0;
#pragma unroll
  for (int i = 0; i < BINS_OF_THREAD; ++i) {
    sums[i] = uint64(scratch.high[first + i]) << 32 | scratch.low[first + i];
    own += sums[i];
  }
  uint64 before = own;
#pragma unroll
  for (int offset = 1; offset < WARP; offset <<= 1) {
    const uint64 other = __shfl_up_sync(FULL, before, offset);
    if (lane >= offset) before += other;
  }
  if (lane == WARP - 1) scratch.warp_sums[warp] = before;
  if (threadIdx.x == 0) scratch.bin = -1;
  __syncthreads();
  before -= own;
  uint64 total = 0;
  for (int i = 0; i < SELECT_WARPS; ++i) {
    if (i < warp) before += scratch.warp_sums[i];
    total += scratch.warp_sums[i];
  }
  uint64 wanted = goal.amount;
  if (wanted == 0) wanted = max(1ull, uint64(ceil(goal.share * double(total))));
#pragma unroll
  for (int i = 0; i < BINS_OF_THREAD; ++i) {
    if (before < wanted && wanted <= before + sums[i]) {
      scratch.bin = first + i;
      scratch.rest = wanted - before;
    }
    before += sums[i];
  }
  __syncthreads();
  return {scratch.bin, scratch.rest};
}

// Writes the row's values that `wants` takes to the list while there is room; returns how many.
template <typename Predicate>
__device__ __forceinline__ int collect(const Values& values, int capacity, Predicate wants) {
  if (threadIdx.x == 0) scratch.size = 0;
  __syncthreads();
  for_each(values, [&](float z) {
    if (!wants(z)) return;
    const int index = atomicAdd(&scratch.size, 1);
    if (index < capacity) list[index] = z;
  });
  __syncthreads();
  return scratch.size;
}

// The largest number such that the values from it on reach the goal; -infinity where all together
// do not. capacity: of the list, in floats, which is overwritten where it does not hold the values.
__device__ __noinline__ float select(Values values, Goal goal, int capacity) {
  const Weight weight = {goal.share > 0., scratch.max, 1.44269504f / scratch.temperature};
  uint32 first = FULL, last = 0;  // keys of the interval that is searched
  const auto widen = [&](float z) {
    first = min(first, to_key(z));
    last = max(last, to_key(z));
  };
  if (values.size < 0) {
    clear_bins();
    for_each(values, [&](float z) { add(coarse_bin(z, weight.max), weight(z)); });
    const Cut cut = find(goal);
    if (cut.bin < 0) return -INFINITE;
    goal.amount = cut.rest;
    const int size = collect(values, capacity, [&](float z) {
      const bool wanted = coarse_bin(z, weight.max) == cut.bin;
      if (wanted) widen(z);
      return wanted;
    });
    if (size <= capacity) values = {size, LOWEST};
  } else {
    for_each(values, widen);
  }
  if (threadIdx.x == 0) scratch.first = FULL, scratch.last = 0;
  __syncthreads();
  first = __reduce_min_sync(FULL, first), last = __reduce_max_sync(FULL, last);
  if (threadIdx.x % WARP == 0) {
    atomicMin(&scratch.first, first);
    atomicMax(&scratch.last, last);
  }
  __syncthreads();
  first = scratch.first, last = scratch.last;
  if (first > last) return -INFINITE;
  for (;;) {
    const int shift = max(0, 32 - __clz(last - first) - BIN_BITS);
    clear_bins();
    for_each(values, [&](float z) {
      const uint32 key = to_key(z);
      if (first <= key && key <= last) add((key - first) >> shift, weight(z));
    });
    const Cut cut = find(goal);
    if (cut.bin < 0) return -INFINITE;
    goal.amount = cut.rest;
    first += uint32(cut.bin) << shift;
    if (shift == 0) return from_key(first);
    last = min(last, first + ((1u << shift) - 1));
  }
}
