// A step's bookkeeping: take over what the router changed, spread the batch's rows over its
// tokens, and hand the results out. The layouts are kernels/step.py's.
//
// What comes from the host and what goes there lies in pinned memory of the host: read and written
// over the bus, without a copy of its own, and never twice.

#include "sampling_table.cuh"

constexpr int MAX_ROWS = 1024;  // also the threads of make_batch
constexpr int PAGE = 16;        // positions that decode attention takes at a time
constexpr int TILE = 128;       // queries that prefill attention takes at a time

// Where the columns of the input stand, in ints.
constexpr int SIZES = 0, ROWS = 8, STARTS = ROWS + MAX_ROWS, COUNTS = STARTS + MAX_ROWS,
              SAMPLES = COUNTS + MAX_ROWS, COLUMNS = 4;
enum Size { NUM_TOKENS, NUM_ROWS, NUM_DECODE_ROWS, NUM_ADMISSIONS, NUM_APPENDED };

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
  const int num_tokens = input[SIZES + NUM_TOKENS], num_rows = input[SIZES + NUM_ROWS];
  const int num_decode_rows = input[SIZES + NUM_DECODE_ROWS];
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

// Where the fields of an admission stand, in ints. At TOKENS_AT the known tokens begin, and behind
// them stand the suppressed tokens, the allowed ones, those that have a bias, and the biases.
constexpr int ADMISSION = 20;
enum Field {
  ROW,
  NUM_KNOWN,
  NUM_PROMPT,
  TOKENS_AT,
  TEMPERATURE,
  TOP_K,
  TOP_P,
  MIN_P,
  SEED_LOW,
  SEED_HIGH,
  EDITS,
  REPETITION_PENALTY,
  PRESENCE_PENALTY,
  FREQUENCY_PENALTY,
  SUPPRESS_UNTIL,
  NUM_SUPPRESSED,
  NUM_ALLOWED,
  NUM_BIASES
};

// An int of the host, read from there.
__device__ __forceinline__ int host_int(const int* address) { return __ldcv(address); }

// bits: one row's, [words]. Every id that the threads of the block name becomes set, all else not.
__device__ void set_bits(uint32* bits, int words, const int* ids, int num_ids) {
  for (int word = threadIdx.x; word < words; word += blockDim.x) bits[word] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < num_ids; i += blockDim.x) {
    const int id = host_int(ids + i);
    atomicOr(&bits[id / 32], 1u << (id % 32));
  }
}

// counts: one row's, [32 words]. How often each token was generated.
__device__ void count_output(uint16* counts, int words, const int* tokens, int num_tokens) {
  uint4* fours = reinterpret_cast<uint4*>(counts);  // of words
  for (int i = threadIdx.x; i < 4 * words; i += blockDim.x) fours[i] = make_uint4(0, 0, 0, 0);
  __syncthreads();
  for (int i = threadIdx.x; i < num_tokens; i += blockDim.x) count_up(counts + tokens[i]);
}

// What each row of the sequence table holds.
struct Table {
  int* block_tables;
  int max_blocks;
  int* known_tokens;
  int token_stride;
  int* faulted;
  SamplingTable sampling;
  int words;
};

__device__ void set_parameters(const SamplingTable& table, int row, const int* fields) {
  table.temperature[row] = __int_as_float(fields[TEMPERATURE]);
  table.top_k[row] = fields[TOP_K];
  table.top_p[row] = __int_as_float(fields[TOP_P]);
  table.min_p[row] = __int_as_float(fields[MIN_P]);
  table.seed[row] = uint64(uint32(fields[SEED_HIGH])) << 32 | uint32(fields[SEED_LOW]);
  table.edits[row] = fields[EDITS];
  table.repetition_penalty[row] = __int_as_float(fields[REPETITION_PENALTY]);
  table.presence_penalty[row] = __int_as_float(fields[PRESENCE_PENALTY]);
  table.frequency_penalty[row] = __int_as_float(fields[FREQUENCY_PENALTY]);
  table.suppress_until[row] = fields[SUPPRESS_UNTIL];
  table.num_biases[row] = fields[NUM_BIASES];
}

// A thread block overwrites a row. deltas: where the positions that the record names count from.
__device__ void admit(const Table& table, const int* record, const int* deltas) {
  __shared__ int fields[ADMISSION];
  __syncthreads();
  if (threadIdx.x < ADMISSION) fields[threadIdx.x] = host_int(record + threadIdx.x);
  __syncthreads();
  const int row = fields[ROW], num_known = fields[NUM_KNOWN], num_biases = fields[NUM_BIASES];
  const int *tokens = deltas + fields[TOKENS_AT], *suppressed = tokens + num_known;
  const int *allowed = suppressed + fields[NUM_SUPPRESSED], *biased = allowed + fields[NUM_ALLOWED];
  int* known_tokens = table.known_tokens + (long long)row * table.token_stride;
  for (int i = threadIdx.x; i < num_known; i += blockDim.x) known_tokens[i] = host_int(tokens + i);
  const SamplingTable& sampling = table.sampling;
  if (threadIdx.x == 0) {
    table.faulted[row] = 0;
    set_parameters(sampling, row, fields);
  }
  const long long mask = (long long)row * table.words;
  if (fields[NUM_SUPPRESSED])
    set_bits(sampling.suppressed + mask, table.words, suppressed, fields[NUM_SUPPRESSED]);
  if (fields[NUM_ALLOWED])
    set_bits(sampling.allowed_mask + mask, table.words, allowed, fields[NUM_ALLOWED]);
  if (fields[EDITS] & REPETITION) set_bits(sampling.seen + mask, table.words, tokens, num_known);
  if (fields[EDITS] & OUTPUT) {
    const int num_prompt = fields[NUM_PROMPT];
    count_output(sampling.output_counts + 32 * mask, table.words, known_tokens + num_prompt,
                 num_known - num_prompt);
  }
  if (num_biases) {
    set_bits(sampling.biased + mask, table.words, biased, num_biases);
    for (int i = threadIdx.x; i < num_biases; i += blockDim.x) {
      sampling.bias_token_ids[row * MAX_BIASES + i] = host_int(biased + i);
      sampling.biases[row * MAX_BIASES + i] = __int_as_float(host_int(biased + num_biases + i));
    }
  }
}

// header: the host's columns; deltas: what follows them there, or wherever it found room; input:
// the columns on the device. Any number of thread blocks.
extern "C" __global__ void begin_step(const int* header, const int* deltas,
                                      int* __restrict__ input, int* block_tables, int max_blocks,
                                      int* known_tokens, int token_stride, int* faulted,
                                      SamplingTable sampling, int words) {
  const Table table = {block_tables, max_blocks, known_tokens, token_stride,
                       faulted,      sampling,   words};
  __shared__ int sizes[ROWS];
  if (threadIdx.x < ROWS) {
    sizes[threadIdx.x] = host_int(header + SIZES + threadIdx.x);
    if (blockIdx.x == 0) input[SIZES + threadIdx.x] = sizes[threadIdx.x];
  }
  __syncthreads();
  const int thread = blockIdx.x * blockDim.x + threadIdx.x, threads = gridDim.x * blockDim.x;
  for (int i = thread; i < COLUMNS * sizes[NUM_ROWS]; i += threads) {
    const int at = ROWS + i / sizes[NUM_ROWS] * MAX_ROWS + i % sizes[NUM_ROWS];
    input[at] = host_int(header + at);
  }
  const int num_admissions = sizes[NUM_ADMISSIONS];
  const int* appended = deltas + num_admissions * ADMISSION;  // row, index, block of each
  for (int i = thread; i < sizes[NUM_APPENDED]; i += threads) {
    const int row = host_int(appended + 3 * i), index = host_int(appended + 3 * i + 1);
    block_tables[(long long)row * max_blocks + index] = host_int(appended + 3 * i + 2);
  }
  for (int i = blockIdx.x; i < num_admissions; i += gridDim.x)
    admit(table, deltas + i * ADMISSION, deltas);
}

// output, the host's: the sampled tokens, [MAX_ROWS], then whether each row of the batch can not be
// trusted any more.
extern "C" __global__ void end_step(const int* __restrict__ sizes, const int* __restrict__ rows,
                                    const int* __restrict__ faulted,
                                    const int* __restrict__ sampled, int* output) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < sizes[3]) output[i] = sampled[i];
  if (i < sizes[1]) output[MAX_ROWS + i] = faulted[rows[i]];
}
