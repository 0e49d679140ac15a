// A step's bookkeeping: take over what the router changed, spread the batch's rows over its
// tokens, and gather what went wrong. The layouts are kernels/step.py's.

typedef unsigned int uint32;

constexpr int MAX_ROWS = 1024;  // also the threads of make_batch
constexpr int PAGE = 16;        // positions that decode attention takes at a time
constexpr int TILE = 128;       // queries that prefill attention takes at a time

// Where the columns of the input stand, in ints.
constexpr int SIZES = 0, ROWS = 4, STARTS = ROWS + MAX_ROWS, COUNTS = STARTS + MAX_ROWS,
              SAMPLES = COUNTS + MAX_ROWS;

// The sum of `value` over the threads before this one, and over all. warps: 32 ints.
__device__ int exclusive_scan(int value, int* warps, int* total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = value;
#pragma unroll
  for (int offset = 1; offset < 32; offset <<= 1) {
    const int other = __shfl_up_sync(0xffffffffu, sum, offset);
    if (lane >= offset) sum += other;
  }
  if (lane == 31) warps[warp] = sum;
  __syncthreads();
  if (warp == 0) {
    int running = warps[lane];
#pragma unroll
    for (int offset = 1; offset < 32; offset <<= 1) {
      const int other = __shfl_up_sync(0xffffffffu, running, offset);
      if (lane >= offset) running += other;
    }
    warps[lane] = running;
  }
  __syncthreads();
  const int before = warp ? warps[warp - 1] : 0;
  *total = warps[31];
  __syncthreads();
  return before + sum - value;
}

// One thread a row, then one thread a token: block b writes tokens b * MAX_ROWS and on.
extern "C" __global__ void __launch_bounds__(MAX_ROWS)
    make_batch(const int* __restrict__ input, const int* __restrict__ block_tables, int max_blocks,
               int block_size, const int* __restrict__ known_tokens, int token_stride,
               int num_padded, int* __restrict__ sizes, int* __restrict__ rows,
               int* __restrict__ starts, int* __restrict__ counts, int* __restrict__ first_tokens,
               int* __restrict__ page_offsets, int* __restrict__ tile_offsets,
               int* __restrict__ sample_rows, int* __restrict__ sample_positions,
               int* __restrict__ token_ids, int* __restrict__ positions, int* __restrict__ slots,
               int* __restrict__ token_rows, int* __restrict__ sample_index) {
  __shared__ int warps[32];
  __shared__ int first[MAX_ROWS + 1];
  __shared__ int sample_of[MAX_ROWS];
  const int num_tokens = input[SIZES], num_rows = input[SIZES + 1];
  const int num_decode_rows = input[SIZES + 2];
  const int i = threadIdx.x;
  const bool is_row = i < num_rows, decodes = i < num_decode_rows;
  const int row = is_row ? input[ROWS + i] : 0;
  const int start = is_row ? input[STARTS + i] : 0;
  const int count = is_row ? input[COUNTS + i] : 0;
  const int samples = is_row ? input[SAMPLES + i] : 0;

  int total, num_samples;
  first[i] = exclusive_scan(count, warps, &total);
  if (i == 0) first[num_rows] = total;
  const int sample = exclusive_scan(samples, warps, &num_samples);
  sample_of[i] = samples ? sample : -1;
  __syncthreads();

  if (blockIdx.x == 0) {
    int num_pages, num_tiles;
    const int page = exclusive_scan(decodes ? start / PAGE + 1 : 0, warps, &num_pages);
    const int tile =
        exclusive_scan(is_row && !decodes ? (count + TILE - 1) / TILE : 0, warps, &num_tiles);
    if (is_row) {
      rows[i] = row;
      starts[i] = start;
      counts[i] = count;
      first_tokens[i] = first[i];
      if (decodes) {
        page_offsets[i] = page;
      } else {
        tile_offsets[i - num_decode_rows] = tile;
      }
      if (samples) {
        sample_rows[sample] = row;
        sample_positions[sample] = start + count;
      }
    }
    if (i == 0) {
      page_offsets[num_decode_rows] = num_pages;
      tile_offsets[num_rows - num_decode_rows] = num_tiles;
      sizes[3] = num_samples;
    }
    if (i < 3) sizes[i] = input[SIZES + i];
  }

  const int token = blockIdx.x * MAX_ROWS + i;
  if (token >= num_padded) return;
  if (token >= num_tokens) {
    token_ids[token] = positions[token] = slots[token] = token_rows[token] = 0;
    sample_index[token] = -1;
    return;
  }
  int low = 0, high = num_rows - 1;  // the last row that begins at or before the token
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (first[middle] <= token) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const int table_row = input[ROWS + low];
  const int position = input[STARTS + low] + token - first[low];
  const int block = block_tables[(long long)table_row * max_blocks + position / block_size];
  token_ids[token] = known_tokens[(long long)table_row * token_stride + position];
  positions[token] = position;
  slots[token] = block * block_size + position % block_size;
  token_rows[token] = table_row;
  sample_index[token] = token + 1 == first[low + 1] ? sample_of[low] : -1;
}

// Where the fields of an admission stand, in ints.
constexpr int ADMISSION = 16;
enum Field {
  ROW,
  NUM_TOKENS,
  TOKENS_AT,
  TEMPERATURE,
  TOP_K,
  TOP_P,
  MIN_P,
  REPETITION_PENALTY,
  SEED_LOW,
  SEED_HIGH,
  SUPPRESS_UNTIL,
  NUM_SUPPRESSED,
  SUPPRESSED_AT
};

// bits: one row's, [words]. Every id that the threads of the block name becomes set, all else not.
__device__ void set_bits(uint32* bits, int words, const int* ids, int num_ids) {
  for (int word = threadIdx.x; word < words; word += blockDim.x) bits[word] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < num_ids; i += blockDim.x)
    atomicOr(&bits[ids[i] / 32], 1u << (ids[i] % 32));
}

// Blocks of threads: one an admission, then as many as the appended KV blocks need.
extern "C" __global__ void apply_deltas(
    const int* __restrict__ input, int num_admissions, int admissions_at, int num_appended,
    int appended_at, int* __restrict__ block_tables, int max_blocks, int* __restrict__ known_tokens,
    int token_stride, int* __restrict__ faulted, float* __restrict__ temperature,
    int* __restrict__ top_k, float* __restrict__ top_p, float* __restrict__ min_p,
    float* __restrict__ repetition_penalty, int2* __restrict__ seed,
    int* __restrict__ suppress_until, uint32* __restrict__ suppressed, uint32* __restrict__ seen,
    int words) {
  if (blockIdx.x >= num_admissions) {
    const int i = (blockIdx.x - num_admissions) * blockDim.x + threadIdx.x;
    if (i >= num_appended) return;
    const int* appended = input + appended_at + 3 * i;  // row, index, block
    block_tables[(long long)appended[0] * max_blocks + appended[1]] = appended[2];
    return;
  }
  const int* admission = input + admissions_at + blockIdx.x * ADMISSION;
  const int row = admission[ROW], num_tokens = admission[NUM_TOKENS];
  const int* tokens = input + admission[TOKENS_AT];
  for (int i = threadIdx.x; i < num_tokens; i += blockDim.x)
    known_tokens[(long long)row * token_stride + i] = tokens[i];
  const float penalty = __int_as_float(admission[REPETITION_PENALTY]);
  if (threadIdx.x == 0) {
    faulted[row] = 0;
    temperature[row] = __int_as_float(admission[TEMPERATURE]);
    top_k[row] = admission[TOP_K];
    top_p[row] = __int_as_float(admission[TOP_P]);
    min_p[row] = __int_as_float(admission[MIN_P]);
    repetition_penalty[row] = penalty;
    seed[row] = make_int2(admission[SEED_LOW], admission[SEED_HIGH]);
    suppress_until[row] = admission[SUPPRESS_UNTIL];
  }
  if (admission[NUM_SUPPRESSED])
    set_bits(suppressed + (long long)row * words, words, input + admission[SUPPRESSED_AT],
             admission[NUM_SUPPRESSED]);
  if (penalty != 0.f && penalty != 1.f)
    set_bits(seen + (long long)row * words, words, tokens, num_tokens);
}

// faults[i]: whether batch row i can not be trusted any more.
extern "C" __global__ void gather_faults(const int* __restrict__ sizes,
                                         const int* __restrict__ rows,
                                         const int* __restrict__ faulted,
                                         int* __restrict__ faults) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < sizes[1]) faults[i] = faulted[rows[i]];
}
