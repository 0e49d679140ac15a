// What is left of a step after its last attention: the tokens that sample. A thread block a token
// looks at what attention read and wrote, every element, and keeps both where the token samples.
// HIDDEN, ATTENDED: elements of a token before and after attention, multiples of 8.
#include "vector.cuh"

constexpr int THREADS = 256;

// A thread's part of SIZE elements: vectors threadIdx.x, + THREADS, ...; zeros past the end.
template <int SIZE>
struct Share {
  static constexpr int COUNT = SIZE / VECTOR, OWN = (COUNT + THREADS - 1) / THREADS;
  uint4 vectors[OWN] = {};

  __device__ __forceinline__ explicit Share(const scalar* from) {
    for_each([&](int i, int column) { vectors[i] = load_vector(from + column); });
  }

  __device__ __forceinline__ bool is_finite() const {
    bool finite = true;
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      float values[VECTOR];
      unpack_vector(vectors[i], values);
#pragma unroll
      for (int j = 0; j < VECTOR; ++j) finite = finite && isfinite(values[j]);
    }
    return finite;
  }

  __device__ __forceinline__ void store(scalar* to) const {
    for_each([&](int i, int column) { store_vector(to + column, vectors[i]); });
  }

  template <typename Function>
  static __device__ __forceinline__ void for_each(Function function) {
#pragma unroll
    for (int i = 0; i < OWN; ++i) {
      const int vector = threadIdx.x + i * THREADS;
      if (vector < COUNT) function(i, vector * VECTOR);
    }
  }
};

extern "C" __global__ void __launch_bounds__(THREADS)
    gather_samples(const scalar* x, const scalar* attended, const int* token_rows,
                   const int* sample_index, int* faulted, const int* sizes, scalar* out_x,
                   scalar* out_attended) {
  wait_for_predecessor();
  release_successor();
  const int token = blockIdx.x;
  if (token >= __ldcg(sizes)) return;
  const int sample = __ldcg(sample_index + token);
  const Share<HIDDEN> own_x(x + size_t(token) * HIDDEN);
  const Share<ATTENDED> own_attended(attended + size_t(token) * ATTENDED);
  const bool finite = own_x.is_finite() && own_attended.is_finite();
  if (!__syncthreads_and(finite) && threadIdx.x == 0) faulted[__ldcg(token_rows + token)] = 1;
  if (sample < 0) return;
  own_x.store(out_x + size_t(sample) * HIDDEN);
  own_attended.store(out_attended + size_t(sample) * ATTENDED);
}
