// out = f(x) @ weight.T for a few rows of x: weights are read once, at the speed of memory.
//
// A unit is two weight rows (gate row i and up row i in SwiGLU), so that what is read of x serves
// both. SPLIT neighbouring warps share a unit: warp `part` of them takes vectors part * 32 + lane,
// + STRIDE, ... of both rows. A lane keeps DEPTH steps in flight, two 16-byte loads each, and the
// first of them are issued before anything else: they hide the wait for the kernel before, the copy
// of x and its norm.
//
// Before wait_for_predecessor() nothing is touched that any kernel writes: only weights are read.
//
// K: elements of a row, a multiple of 8. ROWS: of x. SPLIT: 1, 2, 4 or 8.
#include "vector.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int UNITS = WARPS / SPLIT;  // of a block
constexpr int COUNT = K / VECTOR;     // vectors of a row
constexpr int STRIDE = WARP * SPLIT;
constexpr int STEPS = (COUNT + STRIDE - 1) / STRIDE;
constexpr int DEPTH = STEPS < 4 ? STEPS : 4;
constexpr int OWN = (COUNT + THREADS - 1) / THREADS;  // vectors of a row of x that a thread stages
constexpr int SUMS = 2 * ROWS;                        // of a unit: [row of x][first, second]
constexpr int BLOCKS_PER_MULTIPROCESSOR = ROWS <= 2 ? 4 : 2;

// What warps tell each other.
struct Scratch {
  float squares[ROWS][WARPS];
  float sums[WARPS][SUMS];
};

// Scratch, then the rows of x, then the norm's weight where there is a norm.
extern __shared__ uint4 shared[];

__device__ __forceinline__ Scratch& scratch() { return *reinterpret_cast<Scratch*>(shared); }
__device__ __forceinline__ uint4* staged_row(int row) {
  return shared + sizeof(Scratch) / sizeof(uint4) + row * COUNT;
}
constexpr int NORM_WEIGHT = ROWS;  // its place behind the rows of x

// Read once: kept out of the L1 cache. Volatile keeps the loads where they stand, before the wait.
__device__ __forceinline__ uint4 stream_vector(const scalar* address) {
  uint4 vector;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(vector.x), "=r"(vector.y), "=r"(vector.z), "=r"(vector.w)
               : "l"(address));
  return vector;
}

__device__ __forceinline__ int unit_of_warp() {
  return blockIdx.x * UNITS + threadIdx.x / WARP / SPLIT;
}

// Two weight rows on their way through registers.
struct Unit {
  const scalar *first, *second;
  uint4 first_vectors[DEPTH], second_vectors[DEPTH];

  __device__ __forceinline__ Unit(const scalar* weight, int first_row, int second_row)
      : first(weight + size_t(first_row) * K), second(weight + size_t(second_row) * K) {
#pragma unroll
    for (int i = 0; i < DEPTH; ++i) load(i, i);
  }

  __device__ __forceinline__ static int vector_of(int step) {
    return step * STRIDE + threadIdx.x % STRIDE;
  }

  __device__ __forceinline__ void load(int i, int step) {
    const int vector = vector_of(step);
    if (step < STEPS && vector < COUNT) {
      first_vectors[i] = stream_vector(first + vector * VECTOR);
      second_vectors[i] = stream_vector(second + vector * VECTOR);
    }
  }

  // The conditions on the lane's vector are there also where
  // every lane has one: as branches they keep the compiler from gathering the next loads behind all
  // products, which costs overlap and registers.
  __device__ __forceinline__ void accumulate(float (&sums)[SUMS]) {
    for (int start = 0; start < STEPS; start += DEPTH) {
#pragma unroll
      for (int i = 0; i < DEPTH; ++i) {
        const int step = start + i, vector = vector_of(step);
        if (step < STEPS && vector < COUNT) add_products(sums, i, vector);
        load(i, step + DEPTH);
      }
    }
  }

  __device__ __forceinline__ void add_products(float (&sums)[SUMS], int i, int vector) {
    float first_values[VECTOR], second_values[VECTOR], x_values[VECTOR];
    unpack_vector(first_vectors[i], first_values);
    unpack_vector(second_vectors[i], second_values);
#pragma unroll
    for (int row = 0; row < ROWS; ++row) {
      unpack_vector(staged_row(row)[vector], x_values);
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) {
        sums[2 * row] = fmaf(first_values[j], x_values[j], sums[2 * row]);
        sums[2 * row + 1] = fmaf(second_values[j], x_values[j], sums[2 * row + 1]);
      }
    }
  }
};

template <typename Function>
__device__ __forceinline__ void for_each_own_vector(Function function) {
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    const int vector = threadIdx.x + i * THREADS;
    if (vector < COUNT) function(vector);
  }
}

// Begin to copy a row, every thread its own vectors, which it sees after wait_for_copies().
__device__ __forceinline__ void copy_row(uint4* to, const scalar* from) {
  for_each_own_vector([&](int vector) {
    const uint32 address = static_cast<uint32>(__cvta_generic_to_shared(to + vector));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address),
                 "l"(from + vector * VECTOR)
                 : "memory");
  });
}

__device__ __forceinline__ void copy_x(const scalar* x) {
#pragma unroll
  for (int row = 0; row < ROWS; ++row) copy_row(staged_row(row), x + row * K);
}

__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// RMSNorm of the staged rows, each thread's own vectors in place.
__device__ __forceinline__ void normalise(float epsilon) {
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    float squares = 0.f;
    for_each_own_vector([&](int vector) {
      float values[VECTOR];
      unpack_vector(staged_row(row)[vector], values);
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) squares = fmaf(values[j], values[j], squares);
    });
    squares = warp_sum(squares);
    if (threadIdx.x % WARP == 0) scratch().squares[row][threadIdx.x / WARP] = squares;
  }
  __syncthreads();
#pragma unroll
  for (int row = 0; row < ROWS; ++row) {
    float total = 0.f;
#pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) total += scratch().squares[row][warp];
    const float scale = rsqrtf(total * (1.f / K) + epsilon);
    for_each_own_vector([&](int vector) {
      float values[VECTOR], weight[VECTOR];
      unpack_vector(staged_row(row)[vector], values);
      unpack_vector(staged_row(NORM_WEIGHT)[vector], weight);
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) values[j] *= scale * weight[j];
      staged_row(row)[vector] = pack_vector(values);
    });
  }
}

// The dot products of a unit with the staged rows: lane i < SUMS of its first warp gets sum i.
__device__ __forceinline__ float dot(Unit& unit) {
  float sums[SUMS] = {}, mine = 0.f;
  unit.accumulate(sums);
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
#pragma unroll
  for (int i = 0; i < SUMS; ++i) {
    const float sum = warp_sum(sums[i]);
    if (lane == i) mine = sum;
  }
  if constexpr (SPLIT > 1) {
    if (lane < SUMS) scratch().sums[warp][lane] = mine;
    __syncthreads();
    if (warp % SPLIT == 0 && lane < SUMS) {
#pragma unroll
      for (int part = 1; part < SPLIT; ++part) mine += scratch().sums[warp + part][lane];
    }
  }
  return mine;
}

// Whether this lane holds a result.
__device__ __forceinline__ bool holds_sum() {
  return threadIdx.x / WARP % SPLIT == 0 && threadIdx.x % WARP < SUMS;
}

// Where weight rows are adjacent: the place of this lane's result in [ROWS, n].
struct Place {
  bool mine;
  int column;
  size_t index;

  __device__ __forceinline__ explicit Place(int n) {
    const int sum = threadIdx.x % WARP;
    column = 2 * unit_of_warp() + sum % 2;
    mine = holds_sum() && column < n;
    index = size_t(sum / 2) * n + column;
  }
};

__device__ __forceinline__ Unit adjacent_rows(const scalar* weight, int n) {
  const int row = 2 * unit_of_warp();
  return Unit(weight, min(row, n - 1), min(row + 1, n - 1));
}

// bias and residual may be null; residual may be out: one lane reads and writes an element.
__device__ __forceinline__ float addend(const Place& place, const scalar* bias,
                                        const scalar* residual) {
  float sum = 0.f;
  if (place.mine && bias != nullptr) sum = to_float(bias[place.column]);
  if (place.mine && residual != nullptr) sum += to_float(__ldcg(residual + place.index));
  return sum;
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_MULTIPROCESSOR)
    gemv(const scalar* x, const scalar* weight, scalar* out, const scalar* bias,
         const scalar* residual, int n) {
  Unit unit = adjacent_rows(weight, n);
  release_successor();
  wait_for_predecessor();
  copy_x(x);
  const Place place(n);
  const float added = addend(place, bias, residual);
  wait_for_copies();
  __syncthreads();
  const float result = dot(unit) + added;
  if (place.mine) out[place.index] = from_float<scalar>(result);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_MULTIPROCESSOR)
    gemv_norm(const scalar* x, const scalar* weight, scalar* out, const scalar* norm_weight,
              const scalar* bias, const scalar* residual, int n, float epsilon) {
  Unit unit = adjacent_rows(weight, n);
  copy_row(staged_row(NORM_WEIGHT), norm_weight);
  release_successor();
  wait_for_predecessor();
  copy_x(x);
  const Place place(n);
  const float added = addend(place, bias, residual);
  wait_for_copies();
  normalise(epsilon);
  __syncthreads();
  const float result = dot(unit) + added;
  if (place.mine) out[place.index] = from_float<scalar>(result);
}

// weight: [2 * n, K], gate rows before up rows.
extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_MULTIPROCESSOR)
    gemv_swiglu(const scalar* x, const scalar* weight, scalar* out, const scalar* norm_weight,
                int n, float epsilon) {
  const int column = unit_of_warp(), row = min(column, n - 1);
  Unit unit(weight, row, n + row);
  copy_row(staged_row(NORM_WEIGHT), norm_weight);
  release_successor();
  wait_for_predecessor();
  copy_x(x);
  wait_for_copies();
  normalise(epsilon);
  __syncthreads();
  const float gate = dot(unit);
  const float up = __shfl_down_sync(FULL, gate, 1);
  const int sum = threadIdx.x % WARP;
  if (holds_sum() && sum % 2 == 0 && column < n)
    out[size_t(sum / 2) * n + column] = from_float<scalar>(silu(gate) * up);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_PER_MULTIPROCESSOR)
    gemv_logits(const scalar* x, const scalar* weight, float* out, int n) {
  Unit unit = adjacent_rows(weight, n);
  release_successor();
  wait_for_predecessor();
  copy_x(x);
  wait_for_copies();
  __syncthreads();
  const Place place(n);
  const float result = dot(unit);
  if (place.mine) out[place.index] = result;
}
