// RMSNorm: one block a token, every element read from memory once and kept in registers.
// SIZE: elements of a token, a multiple of 8. THREADS: of a block, a multiple of 32.
#include "vector.cuh"

constexpr int COUNT = SIZE / VECTOR;                  // vectors of a token
constexpr int OWN = (COUNT + THREADS - 1) / THREADS;  // of those, a thread's

// A thread's part of a token: vectors threadIdx.x, + THREADS, ...; zeros past the token's end.
struct Share {
  float values[OWN][VECTOR];
};

template <typename Function>
__device__ __forceinline__ void for_each_vector(Function function) {
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    const int vector = threadIdx.x + i * THREADS;
    if (vector < COUNT) function(i, vector * VECTOR);
  }
}

struct Weights {
  uint4 vectors[OWN];

  __device__ __forceinline__ explicit Weights(const scalar* weight) {
    for_each_vector([&](int i, int column) { vectors[i] = load_constant_vector(weight + column); });
  }
};

__device__ __forceinline__ size_t offset_of(int token) { return size_t(token) * SIZE; }

__device__ __forceinline__ void write_norm(const Share& share, const Weights& weights,
                                           float epsilon, scalar* out) {
  __shared__ float scratch[33];
  float squares = 0.f;
#pragma unroll
  for (int i = 0; i < OWN; ++i)
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) {
      const float value = share.values[i][j];
      squares = fmaf(value, value, squares);
    }
  const float scale = rsqrtf(block_sum(squares, scratch) * (1.f / SIZE) + epsilon);
  for_each_vector([&](int i, int column) {
    float weight[VECTOR], normed[VECTOR];
    unpack_vector(weights.vectors[i], weight);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) normed[j] = share.values[i][j] * scale * weight[j];
    store_vector(out + column, pack_vector(normed));
  });
}

// x + delta as x would store it; delta may be null.
__device__ __forceinline__ uint4 add(uint4 x, const scalar* delta, int column) {
  if (delta == nullptr) return x;
  float sum[VECTOR], other[VECTOR];
  unpack_vector(x, sum);
  unpack_vector(load_vector(delta + column), other);
#pragma unroll
  for (int j = 0; j < VECTOR; ++j) sum[j] += other[j];
  return pack_vector(sum);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    rms_norm(const scalar* x, const scalar* weight, scalar* out, float epsilon) {
  const Weights weights(weight);
  wait_for_predecessor();
  release_successor();
  const size_t offset = offset_of(blockIdx.x);
  Share share = {};
  for_each_vector([&](int i, int column) {
    unpack_vector(load_vector(x + offset + column), share.values[i]);
  });
  write_norm(share, weights, epsilon, out + offset);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    add_rms_norm(scalar* x, const scalar* delta, const scalar* weight, scalar* out,
                 float epsilon) {
  const Weights weights(weight);
  wait_for_predecessor();
  release_successor();
  const size_t offset = offset_of(blockIdx.x);
  Share share = {};
  for_each_vector([&](int i, int column) {
    const uint4 sum = add(load_vector(x + offset + column), delta + offset, column);
    store_vector(x + offset + column, sum);
    unpack_vector(sum, share.values[i]);
  });
  write_norm(share, weights, epsilon, out + offset);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    embed_rms_norm(const int* token_ids, const scalar* embedding, const scalar* weight, scalar* x,
                   scalar* out, float epsilon) {
  const Weights weights(weight);
  const scalar* row = embedding + offset_of(token_ids[blockIdx.x]);
  const size_t offset = offset_of(blockIdx.x);
  Share share = {};
  for_each_vector([&](int i, int column) {
    const uint4 vector = load_constant_vector(row + column);
    store_vector(x + offset + column, vector);
    unpack_vector(vector, share.values[i]);
  });
  write_norm(share, weights, epsilon, out + offset);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    final_norm(const scalar* x, const scalar* delta, const scalar* weight, const int* token_rows,
               const int* sample_index, int* faulted, const int* sizes, scalar* out,
               float epsilon) {
  wait_for_predecessor();
  release_successor();
  const int token = blockIdx.x;
  if (token >= __ldcg(sizes)) return;
  const int sample = __ldcg(sample_index + token);
  const size_t offset = offset_of(token);
  Share share = {};
  // Each element is looked at: the sum of squares of large finite ones may overflow.
  bool finite = true;
  for_each_vector([&](int i, int column) {
    const scalar* rest = delta == nullptr ? nullptr : delta + offset;
    unpack_vector(add(load_vector(x + offset + column), rest, column), share.values[i]);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) finite = finite && isfinite(share.values[i][j]);
  });
  if (!__syncthreads_and(finite) && threadIdx.x == 0) faulted[__ldcg(token_rows + token)] = 1;
  if (sample >= 0) write_norm(share, Weights(weight), epsilon, out + offset_of(sample));
}
