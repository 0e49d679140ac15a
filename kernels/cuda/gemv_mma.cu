// out = f(x) @ weight.T for up to 8 rows of x on tensor cores: weights are read once, at the speed of
// memory, straight into the fragments of the matrix instruction.
//
// A unit is 16 weight rows (in SwiGLU 8 gate rows and the 8 up rows of the same columns), the M
// operand of mma.m16n8k16; the rows of x are its N operand. A product does not care about the order
// of k, so a lane takes 16 contiguous bytes of a weight row as its part of two instructions, and the
// same 16 bytes of a row of x: nothing is staged, permuted or shared.
//
// The warps of a thread block share a unit: warp w of them takes chunks w, w + WARPS, ... of 32
// elements of k. A lane keeps DEPTH chunks in flight, and the first weights of them are asked for
// before anything else: they hide the wait for the kernel before.
//
// RMSNorm costs no pass of its own: x is multiplied by the norm's weight on its way, the squares of
// x are summed beside the products, and the sums are scaled at the end.
//
// K: elements of a row, a multiple of 32. MAX_DEPTH: of chunks in flight. BLOCKS: of a
// multiprocessor.
#include "mma.cuh"
#include "vector.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int CHUNK = 32;
constexpr int CHUNKS = K / CHUNK;
constexpr int STEPS = (CHUNKS + WARPS - 1) / WARPS;
constexpr int STRIDE = WARPS * CHUNK;
constexpr int DEPTH = STEPS < MAX_DEPTH ? STEPS : MAX_DEPTH;

__device__ __forceinline__ int warp_of_unit() { return threadIdx.x / WARP; }
// The place of a lane in the instruction's fragments: its group has a weight row (and the one 8
// below) and a row of x, its place in the group a quarter of a chunk.
__device__ __forceinline__ int group_of_lane() { return threadIdx.x % WARP / 4; }
__device__ __forceinline__ int place_in_group() { return threadIdx.x % 4; }

// Read once: kept out of the L1 cache. Volatile keeps the loads where they stand, before the wait.
__device__ __forceinline__ uint4 stream_vector(const scalar* address) {
  uint4 vector;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(vector.x), "=r"(vector.y), "=r"(vector.z), "=r"(vector.w)
               : "l"(address));
  return vector;
}

// What one lane multiplies.
template <bool NORM>
struct Lane {
  const scalar *first, *second;  // its vectors of two weight rows, from the warp's first chunk on
  const scalar *x, *norm_weight;
  uint4 first_vectors[DEPTH], second_vectors[DEPTH], x_vectors[DEPTH], norm_vectors[DEPTH];
  float sums[4] = {}, squares = 0.f;

  // Begins to load weights.
  __device__ __forceinline__ Lane(const scalar* weight, int first_row, int second_row)
      : first(weight + size_t(first_row) * K + begin()),
        second(weight + size_t(second_row) * K + begin()) {
#pragma unroll
    for (int i = 0; i < DEPTH; ++i) load_weights(i, i);
  }

  __device__ __forceinline__ static int begin() {
    return warp_of_unit() * CHUNK + place_in_group() * VECTOR;
  }
  __device__ __forceinline__ static bool exists(int step) {
    return step < STEPS && step * WARPS + warp_of_unit() < CHUNKS;
  }

  __device__ __forceinline__ void load_weights(int i, int step) {
    if (!exists(step)) return;
    first_vectors[i] = stream_vector(first + step * STRIDE);
    second_vectors[i] = stream_vector(second + step * STRIDE);
  }

  __device__ __forceinline__ void load_x(int i, int step) {
    if (!exists(step)) return;
    x_vectors[i] = *reinterpret_cast<const uint4*>(x + step * STRIDE);
    if constexpr (NORM) norm_vectors[i] = load_constant_vector(norm_weight + step * STRIDE);
  }

  // rows: of x. Those past the last are like the last, and nobody asks for their sums.
  __device__ __forceinline__ void multiply_all(const scalar* rows_of_x, int rows,
                                               const scalar* weight_of_norm) {
    x = rows_of_x + size_t(min(group_of_lane(), rows - 1)) * K + begin();
    norm_weight = weight_of_norm + begin();
#pragma unroll
    for (int i = 0; i < DEPTH; ++i) load_x(i, i);
    for (int start = 0; start < STEPS; start += DEPTH) {
#pragma unroll
      for (int i = 0; i < DEPTH; ++i) {
        if (exists(start + i)) multiply_chunk(i);
        load_weights(i, start + i + DEPTH);
        load_x(i, start + i + DEPTH);
      }
    }
  }

  __device__ __forceinline__ void multiply_chunk(int i) {
    if constexpr (NORM) x_vectors[i] = weigh(x_vectors[i], norm_vectors[i]);
    const uint4 one = first_vectors[i], other = second_vectors[i], vector = x_vectors[i];
    const uint32 low[4] = {one.x, other.x, one.y, other.y};
    const uint32 high[4] = {one.z, other.z, one.w, other.w};
    multiply(sums, low, vector.x, vector.y);
    multiply(sums, high, vector.z, vector.w);
  }

  __device__ __forceinline__ uint4 weigh(uint4 vector, uint4 norm_vector) {
    float values[VECTOR], weights[VECTOR];
    unpack_vector(vector, values);
    unpack_vector(norm_vector, weights);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) {
      squares = fmaf(values[j], values[j], squares);
      values[j] *= weights[j];
    }
    return pack_vector(values);
  }
};

// What the warps of a unit tell the first of them.
struct Scratch {
  float sums[WARPS][4][WARP];
  float squares[WARPS][WARP];
};
extern __shared__ unsigned char shared[];

// The sums of a unit: sums[i] of a lane in the first warp belong to weight row `group` (i < 2) or
// group + 8, and to row 2 place + i % 2 of x. True in that warp.
template <bool NORM>
__device__ __forceinline__ bool finish(Lane<NORM>& lane, float epsilon) {
  const int warp = warp_of_unit(), index = threadIdx.x % WARP;
  Scratch& scratch = *reinterpret_cast<Scratch*>(shared);
#pragma unroll
  for (int i = 0; i < 4; ++i) scratch.sums[warp][i][index] = lane.sums[i];
  scratch.squares[warp][index] = lane.squares;
  __syncthreads();
  if (warp) return false;
#pragma unroll
  for (int other = 1; other < WARPS; ++other) {
#pragma unroll
    for (int i = 0; i < 4; ++i) lane.sums[i] += scratch.sums[other][i][index];
    lane.squares += scratch.squares[other][index];
  }
  if constexpr (NORM) {
    float squares = lane.squares;  // of row `group` of x
    squares += __shfl_xor_sync(FULL, squares, 1);
    squares += __shfl_xor_sync(FULL, squares, 2);
    const float scale = rsqrtf(squares * (1.f / K) + epsilon);
#pragma unroll
    for (int i = 0; i < 4; ++i)
      lane.sums[i] *= __shfl_sync(FULL, scale, 4 * (2 * place_in_group() + i % 2));
  }
  return true;
}

// The rows of x may be read through the L1 cache from here on, which may hold what they were.
__device__ __forceinline__ void see_predecessor() {
  release_successor();
  wait_for_predecessor();
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
}

template <bool NORM>
__device__ __forceinline__ void project(const scalar* x, const scalar* weight, scalar* out,
                                        const scalar* norm_weight, const scalar* bias,
                                        const scalar* residual, int rows, int n, float epsilon) {
  const int first = 16 * blockIdx.x + group_of_lane();
  Lane<NORM> lane(weight, min(first, n - 1), min(first + 8, n - 1));
  see_predecessor();
  lane.multiply_all(x, rows, norm_weight);
  if (!finish(lane, epsilon)) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = 2 * place_in_group() + i % 2, column = first + i / 2 * 8;
    if (row >= rows || column >= n) continue;
    const size_t index = size_t(row) * n + column;
    float sum = lane.sums[i];
    if (bias != nullptr) sum += to_float(bias[column]);
    if (residual != nullptr) sum += to_float(__ldcg(residual + index));
    out[index] = from_float<scalar>(sum);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    gemv(const scalar* x, const scalar* weight, scalar* out, const scalar* bias,
         const scalar* residual, int rows, int n) {
  project<false>(x, weight, out, nullptr, bias, residual, rows, n, 0.f);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    gemv_norm(const scalar* x, const scalar* weight, scalar* out, const scalar* norm_weight,
              const scalar* bias, const scalar* residual, int rows, int n, float epsilon) {
  project<true>(x, weight, out, norm_weight, bias, residual, rows, n, epsilon);
}

// weight: [2 * n, K], gate rows before up rows.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    gemv_swiglu(const scalar* x, const scalar* weight, scalar* out, const scalar* norm_weight,
                int rows, int n, float epsilon) {
  const int column = 8 * blockIdx.x + group_of_lane();
  Lane<true> lane(weight, min(column, n - 1), n + min(column, n - 1));
  see_predecessor();
  lane.multiply_all(x, rows, norm_weight);
  if (!finish(lane, epsilon) || column >= n) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = 2 * place_in_group() + i;
    if (row < rows)
      out[size_t(row) * n + column] = from_float<scalar>(silu(lane.sums[i]) * lane.sums[i + 2]);
  }
}
