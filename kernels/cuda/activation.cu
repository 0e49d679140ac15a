// SwiGLU's elementwise part: each thread makes two vectors of the output.
// SIZE: elements of a token's output, a multiple of 8.
#include "vector.cuh"

constexpr int THREADS = 256;
constexpr int OWN = 2;
constexpr int COUNT = SIZE / VECTOR;  // vectors of a token's output

extern "C" __global__ void __launch_bounds__(THREADS)
    silu_and_mul(const scalar* gate_up, scalar* out, int tokens) {
  wait_for_predecessor();
  release_successor();
  const unsigned total = unsigned(tokens) * COUNT;
  const unsigned first = blockIdx.x * (THREADS * OWN) + threadIdx.x;
  uint4 gates[OWN], ups[OWN];
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    const unsigned vector = first + i * THREADS;
    if (vector >= total) continue;
    const scalar* gate = gate_up + (size_t(vector / COUNT) * 2 * COUNT + vector % COUNT) * VECTOR;
    gates[i] = load_vector(gate);
    ups[i] = load_vector(gate + SIZE);
  }
#pragma unroll
  for (int i = 0; i < OWN; ++i) {
    const unsigned vector = first + i * THREADS;
    if (vector >= total) continue;
    float gate[VECTOR], up[VECTOR];
    unpack_vector(gates[i], gate);
    unpack_vector(ups[i], up);
#pragma unroll
    for (int j = 0; j < VECTOR; ++j) gate[j] = silu(gate[j]) * up[j];
    store_vector(out + size_t(vector) * VECTOR, pack_vector(gate));
  }
}
