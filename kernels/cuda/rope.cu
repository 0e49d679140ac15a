// QK-norm, rotary embedding and the write of keys and values into the paged cache, in one launch.
// A group of lanes takes one head of one token; a lane holds eight elements of the head's first
// half and the eight of its second half that rotate with them.
// HEAD_DIM (64 or 128), NUM_HEADS, NUM_KV_HEADS, BLOCK_SIZE.
#include "vector.cuh"

constexpr int THREADS = 256;
constexpr int HALF = HEAD_DIM / 2;
constexpr int LANES = HALF / VECTOR;  // of a group: a power of 2
constexpr int ALL_HEADS = NUM_HEADS + 2 * NUM_KV_HEADS;

__device__ __forceinline__ float group_sum(float x) {
  const int first = threadIdx.x % WARP / LANES * LANES;
  const unsigned group = ((1u << LANES) - 1) << first;
#pragma unroll
  for (int offset = LANES / 2; offset; offset >>= 1) x += __shfl_xor_sync(group, x, offset);
  return x;
}

// low, high: a lane's elements of a head; weight: of the head, at the lane's column.
__device__ __forceinline__ void normalise(float (&low)[VECTOR], float (&high)[VECTOR],
                                          const scalar* weight, float epsilon) {
  float squares = 0.f, low_weight[VECTOR], high_weight[VECTOR];
  unpack_vector(load_constant_vector(weight), low_weight);
  unpack_vector(load_constant_vector(weight + HALF), high_weight);
#pragma unroll
  for (int i = 0; i < VECTOR; ++i)
    squares = fmaf(low[i], low[i], fmaf(high[i], high[i], squares));
  const float scale = rsqrtf(group_sum(squares) * (1.f / HEAD_DIM) + epsilon);
#pragma unroll
  for (int i = 0; i < VECTOR; ++i) {
    low[i] *= scale * low_weight[i];
    high[i] *= scale * high_weight[i];
  }
}

// Cosines and sines of a lane's eight pairs.
struct Rotation {
  float4 pairs[VECTOR / 2];

  // cos_sin: of the token's position, from the lane's column on.
  __device__ __forceinline__ explicit Rotation(const float* cos_sin) {
#pragma unroll
    for (int i = 0; i < VECTOR / 2; ++i)
      pairs[i] = __ldg(reinterpret_cast<const float4*>(cos_sin) + i);
  }

  __device__ __forceinline__ void apply(float (&low)[VECTOR], float (&high)[VECTOR]) const {
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) {
      const float4 pair = pairs[i / 2];
      const float cosine = i % 2 ? pair.z : pair.x, sine = i % 2 ? pair.w : pair.y;
      const float a = low[i], b = high[i];
      low[i] = a * cosine - b * sine;
      high[i] = b * cosine + a * sine;
    }
  }
};

// head: of the cache's, keys first.
__device__ __forceinline__ size_t cache_offset(unsigned slot, int head) {
  const size_t page = size_t(slot / BLOCK_SIZE) * (2 * NUM_KV_HEADS) + head;
  return (page * BLOCK_SIZE + slot % BLOCK_SIZE) * HEAD_DIM;
}

// q_norm and k_norm: both or neither null.
extern "C" __global__ void __launch_bounds__(THREADS)
    qk_norm_rope_write(scalar* qkv, const scalar* q_norm, const scalar* k_norm,
                       const float* cos_sin, const int* positions, const int* slots, scalar* cache,
                       int tokens, float epsilon) {
  wait_for_predecessor();
  release_successor();
  const unsigned item = (blockIdx.x * THREADS + threadIdx.x) / LANES;
  const int token = item / ALL_HEADS, head = item % ALL_HEADS;
  if (token >= tokens) return;
  const int column = threadIdx.x % LANES * VECTOR;
  scalar* from = qkv + size_t(item) * HEAD_DIM + column;
  const int position = __ldcg(positions + token), slot = __ldcg(slots + token);
  uint4 first = load_vector(from), second = load_vector(from + HALF);
  if (head < NUM_HEADS + NUM_KV_HEADS) {
    const Rotation rotation(cos_sin + (size_t(position) * HALF + column) * 2);
    float low[VECTOR], high[VECTOR];
    unpack_vector(first, low);
    unpack_vector(second, high);
    if (q_norm != nullptr)
      normalise(low, high, (head < NUM_HEADS ? q_norm : k_norm) + column, epsilon);
    rotation.apply(low, high);
    first = pack_vector(low);
    second = pack_vector(high);
  }
  scalar* to = head < NUM_HEADS ? from : cache + cache_offset(slot, head - NUM_HEADS) + column;
  store_vector(to, first);
  store_vector(to + HALF, second);
}
