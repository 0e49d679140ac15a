// From logits to one token a row, as kernels/reference_sampling.py defines it. Two kernels: a block
// a row finds the logit that top-k, top-p and min-p part the row at, where there are any; then many
// blocks a row draw from what is left, and the last to arrive combines them.
#include "philox.cuh"
#include "sampling_select.cuh"

constexpr int DRAW_THREADS = 256, DRAW_WARPS = DRAW_THREADS / WARP;
constexpr int DRAW_LOADS = 2;  // in flight in each thread
constexpr int NO_TOKEN = 0x7fffffff;

// The top_k best are no less than the top_k-th of these: of so many parts of the row, or of an
// eighth of it, the largest logits, four in each thread. Hence few logits stay in question.
constexpr int MAXIMA = 4 * SELECT_THREADS;

// thresholds: [samples], the lowest logit that is kept (edits applied). capacity: of the list,
// in floats, at least MAXIMA; what does not fit there is read again and again.
extern "C" __global__ void __launch_bounds__(SELECT_THREADS, 2)
    sampling_threshold(const float* logits, int vocab_size, SamplingTable table,
                       const int* sample_rows, const int* sample_positions, const int* sizes,
                       int capacity, float* thresholds) {
  wait_for_predecessor();
  release_successor();
  const int sample = blockIdx.x, num_samples = __ldcg(sizes + 3);
  const int row = __ldcg(sample_rows + sample), position = __ldcg(sample_positions + sample);
  if (sample >= num_samples) return;
  const float temperature = __ldcg(table.temperature + row);
  const int top_k = __ldcg(table.top_k + row);
  const float top_p = __ldcg(table.top_p + row), min_p = __ldcg(table.min_p + row);
  const bool by_count = 0 < top_k && top_k < vocab_size, by_mass = 0.f < top_p && top_p < 1.f;
  if (temperature == 0.f || !(by_count || by_mass || min_p > 0.f)) {
    if (threadIdx.x == 0) thresholds[sample] = -INFINITE;
    return;
  }
  if (threadIdx.x == 0) {
    scratch.row = row_of(logits, vocab_size, sample, table, row, position);
    scratch.temperature = temperature;
    scratch.top_k = by_count ? top_k : 0;
    scratch.top_p = by_mass ? top_p : 0.f;
    scratch.min_p = min_p;
  }
  __syncthreads();
  const int groups = scratch.row.groups();
  const bool listed = by_count && top_k <= MAXIMA;
  float4 maxima = fill(-INFINITE);
  for_each_group(top_k <= MAXIMA / 8 && listed ? (groups + 7) / 8 : groups,
                 [&](float4 z) { maxima = max_of_each(maxima, z); });
  float max = max_of(maxima);
  Values values = {-1, LOWEST};
  if (listed) {
    reinterpret_cast<float4*>(list)[threadIdx.x] = maxima;
    __syncthreads();
    values.floor = fmaxf(select({MAXIMA, LOWEST}, {uint64(top_k)}, capacity), LOWEST);
    const int size = collect(values, capacity, [&](float z) {
      max = fmaxf(max, z);
      return true;
    });
    if (size <= capacity) values.size = size;
  }
  find_max(max);
  float threshold = -INFINITE;
  if (scratch.top_k && isfinite(scratch.max)) {
    threshold = select(values, {uint64(scratch.top_k)}, capacity);
    values.floor = fmaxf(threshold, LOWEST);
  }
  if (scratch.top_p && isfinite(scratch.max))
    threshold = fmaxf(threshold, select(values, {0, double(scratch.top_p)}, capacity));
  if (scratch.min_p > 0.f)
    threshold =
        fmaxf(threshold, fmaf(logf(fminf(scratch.min_p, 1.f)), scratch.temperature, scratch.max));
  if (threadIdx.x == 0) thresholds[sample] = threshold;
}

// What a part of a row comes to: its best token and score, and the logarithm of its raw logits' sum
// of exponentials, log(sum) + top.
struct Part {
  double score;
  float top, sum;
  int token;
};

__device__ __forceinline__ Part merge(const Part& x, const Part& y) {
  Part best = y.score > x.score || (y.score == x.score && y.token < x.token) ? y : x;
  best.top = fmaxf(x.top, y.top);
  best.sum = x.sum * __expf(x.top - best.top) + y.sum * __expf(y.top - best.top);
  return best;
}

__device__ __forceinline__ Part merge_lanes(Part part) {
#pragma unroll
  for (int offset = WARP / 2; offset; offset >>= 1) {
    Part other;
    other.score = __shfl_xor_sync(FULL, part.score, offset);
    other.top = __shfl_xor_sync(FULL, part.top, offset);
    other.sum = __shfl_xor_sync(FULL, part.sum, offset);
    other.token = __shfl_xor_sync(FULL, part.token, offset);
    part = merge(part, other);
  }
  return part;
}

// The same for all threads of the block: right in the first warp alone.
__device__ __forceinline__ Part merge_threads(Part part) {
  __shared__ Part warps[DRAW_WARPS];
  const int lane = threadIdx.x % WARP;
  part = merge_lanes(part);
  if (lane == 0) warps[threadIdx.x / WARP] = part;
  __syncthreads();
  return merge_lanes(lane < DRAW_WARPS ? warps[lane] : Part{-INFINITE, LOWEST, 0.f, NO_TOKEN});
}

// Past the L1 cache: another block wrote it.
__device__ __forceinline__ Part load_part(const Part* part) {
  return {__ldcg(&part->score), __ldcg(&part->top), __ldcg(&part->sum), __ldcg(&part->token)};
}

// A running sum of exponentials. NaN and +infinity make it NaN, nothing but -infinity leaves it 0.
struct ExpSum {
  float top = LOWEST, sum = 0.f;

  __device__ __forceinline__ void add(float4 x) {
    const float largest = max_of(x);
    if (largest > top) {
      sum *= __expf(top - largest);
      top = largest;
    }
    sum += __expf(x.x - top) + __expf(x.y - top) + __expf(x.z - top) + __expf(x.w - top);
  }
};

// The largest logit, the first of equals.
struct Greedy {
  float best = -INFINITE;
  int token = NO_TOKEN;

  __device__ __forceinline__ void add(int group, float4 z) {
    take(z.x, 4 * group), take(z.y, 4 * group + 1);
    take(z.z, 4 * group + 2), take(z.w, 4 * group + 3);
  }
  __device__ __forceinline__ void take(float z, int candidate) {
    if (z > best) best = z, token = candidate;
  }
  __device__ __forceinline__ double score() const { return best; }
};

// The largest logit / temperature + gumbel, in double precision, so that it does not depend on how
// a row is divided. Few tokens can win: for the others a bound in single precision is enough.
struct Gumbel {
  double inverse;  // of the temperature
  uint32 position;
  uint2 key;
  double best = -INFINITE;
  int token = NO_TOKEN;
  float floor = LOWEST;  // at most the best of the warp

  // All threads of a warp together.
  __device__ __forceinline__ void add(int group, float4 z) {
    float bounds[4] = {bound(z.x), bound(z.y), bound(z.z), bound(z.w)};
    if (!__any_sync(FULL, largest(bounds) + LARGEST_GUMBEL >= floor)) return;
    const uint4 words = philox4x32(group, position, key);
    const float logits[4] = {z.x, z.y, z.z, z.w};
    const uint32 bits[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) bounds[i] += gumbel_bound(bits[i]);
    for (;;) {
      const float most = largest(bounds);
      if (!__any_sync(FULL, most >= floor)) return;
      if (most >= floor) take_first_of(most, bounds, group, logits, bits);
      floor = warp_max(floor);
    }
  }

  // At least z / temperature; NaN, which no comparison takes, for -infinity.
  __device__ __forceinline__ float bound(float z) const {
    const float score = z * float(inverse);
    return fmaf(fabsf(score), 1e-6f, score);
  }

  static __device__ __forceinline__ float largest(const float (&x)[4]) {
    return fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
  }

  __device__ __forceinline__ void take_first_of(float most, float (&bounds)[4], int group,
                                                const float (&logits)[4],
                                                const uint32 (&bits)[4]) {
    int at = 3;
#pragma unroll
    for (int i = 2; i >= 0; --i)
      if (bounds[i] == most) at = i;
    float z = logits[3];
    uint32 word = bits[3];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (at == i) z = logits[i], word = bits[i], bounds[i] = -INFINITE;
    }
    const double score = double(z) * inverse + double(gumbel(word));
    const int candidate = 4 * group + at;
    if (score > best || (score == best && candidate < token)) best = score, token = candidate;
    floor = fmaxf(floor, __double2float_rd(best));
  }

  __device__ __forceinline__ double score() const { return best; }
};

// What is kept of a group: the rest becomes -infinity.
__device__ __forceinline__ float4 kept(float4 z, float threshold) {
  return make_float4(z.x >= threshold ? z.x : -INFINITE, z.y >= threshold ? z.y : -INFINITE,
                     z.z >= threshold ? z.z : -INFINITE, z.w >= threshold ? z.w : -INFINITE);
}

// Groups first, + DRAW_THREADS, ... of `rounds`.
template <typename Choice>
__device__ __forceinline__ Part draw(const Row& row, float threshold, int first, int rounds,
                                     Choice choice) {
  ExpSum raw;
  for (int round = 0; round < rounds; round += DRAW_LOADS) {
    float4 x[DRAW_LOADS];
#pragma unroll
    for (int i = 0; i < DRAW_LOADS; ++i)
      x[i] = round + i < rounds ? row.raw(first + (round + i) * DRAW_THREADS) : fill(-INFINITE);
#pragma unroll
    for (int i = 0; i < DRAW_LOADS; ++i) {
      if (round + i >= rounds) break;
      const int group = first + (round + i) * DRAW_THREADS;
      raw.add(x[i]);
      choice.add(group, kept(row.adjusted(group, x[i]), threshold));
    }
  }
  return {choice.score(), raw.top, raw.sum, choice.token};
}

// grid: (splits, samples); each block takes `rounds` times 4 DRAW_THREADS logits. parts: [samples,
// splits]; arrivals: [samples], zero before and after.
extern "C" __global__ void __launch_bounds__(DRAW_THREADS, 5)
    sampling_draw(const float* logits, int vocab_size, SamplingTable table,
                  const int* sample_rows, const int* sample_positions, const int* sizes,
                  const float* thresholds, int rounds, Part* parts, uint32* arrivals,
                  int* token_ids, int token_ids_stride, int* faulted, int* out_tokens,
                  float* out_logprobs) {
  wait_for_predecessor();
  release_successor();
  // Loads first, for their latencies to overlap.
  const int sample = blockIdx.y, splits = gridDim.x, num_samples = __ldcg(sizes + 3);
  const int table_row = __ldcg(sample_rows + sample), position = __ldcg(sample_positions + sample);
  if (sample >= num_samples) return;
  const int is_faulted = __ldcg(faulted + table_row);
  const float temperature = __ldcg(table.temperature + table_row);
  const float threshold = __ldcg(thresholds + sample);
  const uint64 seed = __ldcg(table.seed + table_row);
  const Row row = row_of(logits, vocab_size, sample, table, table_row, position);
  if (row.which) __syncthreads();
  if (is_faulted) {
    if (blockIdx.x == 0 && threadIdx.x == 0) out_tokens[sample] = -1;
    return;
  }
  const int first = blockIdx.x * rounds * DRAW_THREADS + threadIdx.x;
  Part part;
  if (temperature == 0.f) {
    part = draw(row, threshold, first, rounds, Greedy{});
  } else {
    const uint2 key = make_uint2(uint32(seed), uint32(seed >> 32));
    part = draw(row, threshold, first, rounds, Gumbel{1. / temperature, uint32(position), key});
  }
  part = merge_threads(part);

  __shared__ bool is_last;
  if (threadIdx.x == 0) {
    parts[sample * splits + blockIdx.x] = part;
    __threadfence();
    is_last = atomicInc(arrivals + sample, splits - 1) == splits - 1;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  part = {-INFINITE, LOWEST, 0.f, NO_TOKEN};
  for (int i = threadIdx.x; i < splits; i += DRAW_THREADS)
    part = merge(part, load_part(parts + sample * splits + i));
  part = merge_threads(part);
  if (threadIdx.x != 0) return;
  if (!(part.sum > 0.f)) {
    out_tokens[sample] = -1;
    faulted[table_row] = 1;
    return;
  }
  const int token = part.token == NO_TOKEN ? 0 : part.token;
  out_tokens[sample] = token;
  out_logprobs[sample] = __ldcg(row.logits + token) - part.top - logf(part.sum);
  token_ids[size_t(table_row) * token_ids_stride + position] = token;
  const size_t mask = size_t(table_row) * ((vocab_size + 31) / 32);
  if (row.which & REPETITION) atomicOr(table.seen + mask + token / 32, 1u << token % 32);
  if (row.which & OUTPUT) count_up(table.output_counts + 32 * mask + token);
}
