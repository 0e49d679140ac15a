// Attention of one KV head's queries over one page (16 positions) by one warp, all in registers.
//
// The query heads of the KV head are the columns of m16n8k16 products. Lane (g, j) is (lane / 4,
// lane % 4). First S^T = K Q^T: the order of k does not matter to a dot product, so 16 contiguous
// bytes of a key are a lane's fragments of two products, if the queries are read alike. Then O^T =
// V^T P^T: 16 contiguous bytes of a value are rows g and g + 8 of four products, once the values of
// two neighbouring positions are interleaved.
//
// -D: SCALAR, HEADS, KV_HEADS, HEAD_DIM (64 or 128), BLOCK_SIZE.
#pragma once

#include "common.cuh"

constexpr int GROUP = HEADS / KV_HEADS;
constexpr int PAGE = 16;
constexpr int KEY_PARTS = HEAD_DIM / 32;
constexpr int VALUE_PARTS = HEAD_DIM / 64;
constexpr int HEAD_STRIDE = HEAD_DIM + 4;  // of partial sums: HEAD_DIM values, their max, their sum

static_assert(GROUP * KV_HEADS == HEADS && GROUP <= 8, "a KV head has at most 8 query heads");
static_assert(HEAD_DIM == 64 || HEAD_DIM == 128, "head_dim is 64 or 128");
static_assert(BLOCK_SIZE % PAGE == 0, "a block is whole pages");

__device__ __forceinline__ float infinity() { return __int_as_float(0x7f800000); }

// Past L1: nothing of the cache is read twice.
__device__ __forceinline__ void load_16_bytes(uint32 (&to)[4], const scalar* from) {
  asm volatile("ld.global.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "l"(from));
}

// Into L2 only, where a write of the kernel before still reaches it.
__device__ __forceinline__ void prefetch(const scalar* from) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
}

__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Transposes an 8 x 8 matrix of scalars, of which lane (g, j) holds row g, columns 2j and 2j + 1.
__device__ __forceinline__ uint32 transpose(uint32 x) {
  uint32 y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// d += a b: a [16, 16], b [16, 8], d [16, 8] over the warp. Overloaded for the scalar type.
__device__ __forceinline__ void multiply(float (&d)[4], uint32 a0, uint32 a1, uint32 a2, uint32 a3,
                                         uint32 b0, uint32 b1, __nv_bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void multiply(float (&d)[4], uint32 a0, uint32 a1, uint32 a2, uint32 a3,
                                         uint32 b0, uint32 b1, __half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// A page's keys as fragments: positions g and g + 8, dims 32 * part + 8j to + 7.
using Keys = uint32[2][KEY_PARTS][4];
// Its values: positions 2j, 2j + 1, 2j + 8, 2j + 9, dims 64 * part + 8g to + 7.
using Values = uint32[VALUE_PARTS][4][4];
// Queries: head g (zero if there is none), dims 32 * part + 8j to + 7.
using Queries = uint32[KEY_PARTS][4];

__device__ __forceinline__ void load_keys(Keys& keys, const scalar* page, int g, int j) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int part = 0; part < KEY_PARTS; ++part) {
      load_16_bytes(keys[half][part], page + (g + 8 * half) * HEAD_DIM + 32 * part + 8 * j);
    }
  }
}

__device__ __forceinline__ void load_values(Values& values, const scalar* page, int g, int j) {
  page += KV_HEADS * BLOCK_SIZE * HEAD_DIM;
#pragma unroll
  for (int part = 0; part < VALUE_PARTS; ++part) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int position = 2 * j + i % 2 + 8 * (i / 2);
      load_16_bytes(values[part][i], page + position * HEAD_DIM + 64 * part + 8 * g);
    }
  }
}

__device__ __forceinline__ void prefetch_page(const scalar* page, int lane) {
  constexpr int LINE = 128 / sizeof(scalar);
  if (lane >= PAGE * HEAD_DIM / LINE) return;
  prefetch(page + lane * LINE);
  prefetch(page + KV_HEADS * BLOCK_SIZE * HEAD_DIM + lane * LINE);
}

__device__ __forceinline__ void load_queries(Queries& queries, const scalar* group, int g, int j) {
#pragma unroll
  for (int part = 0; part < KEY_PARTS; ++part) {
    uint4 words = make_uint4(0, 0, 0, 0);
    if (g < GROUP) {
      words = *reinterpret_cast<const uint4*>(group + g * HEAD_DIM + 32 * part + 8 * j);
    }
    queries[part][0] = words.x, queries[part][1] = words.y;
    queries[part][2] = words.z, queries[part][3] = words.w;
  }
}

// What a warp has of a segment; of heads 2j and 2j + 1.
struct Softmax {
  float max[2], sum[2];  // of scores in powers of two; sum: of this lane's positions only
  float o[VALUE_PARTS][4][4];  // [part][i][2 * odd dim + odd head], dim 64 * part + 8g + 2i

  __device__ __forceinline__ void clear() {
    max[0] = max[1] = -infinity();
    sum[0] = sum[1] = 0.f;
#pragma unroll
    for (int i = 0; i < VALUE_PARTS * 16; ++i) o[i / 16][i / 4 % 4][i % 4] = 0.f;
  }

  // scores[i]: of position g + 8 * (i / 2) and head 2j + i % 2. They become probabilities, relative
  // to the new max.
  __device__ __forceinline__ void rescale(float (&scores)[4]) {
#pragma unroll
    for (int head = 0; head < 2; ++head) {
      float highest = fmaxf(scores[head], scores[head + 2]);
#pragma unroll
      for (int offset = 4; offset < WARP; offset *= 2) {
        highest = fmaxf(highest, __shfl_xor_sync(FULL, highest, offset));
      }
      highest = fmaxf(highest, max[head]);
      const float keep = exp2_fast(max[head] - highest);
      max[head] = highest;
      scores[head] = exp2_fast(scores[head] - highest);
      scores[head + 2] = exp2_fast(scores[head + 2] - highest);
      sum[head] = sum[head] * keep + (scores[head] + scores[head + 2]);
#pragma unroll
      for (int i = 0; i < VALUE_PARTS * 8; ++i) o[i / 8][i / 2 % 4][i % 2 * 2 + head] *= keep;
    }
  }

  __device__ __forceinline__ void add_values(const float (&scores)[4], const Values& v) {
    const uint32 b0 = transpose(pack(scores[0], scores[1]));
    const uint32 b1 = transpose(pack(scores[2], scores[3]));
#pragma unroll
    for (int part = 0; part < VALUE_PARTS; ++part) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        multiply(o[part][i], __byte_perm(v[part][0][i], v[part][1][i], 0x5410),
                 __byte_perm(v[part][0][i], v[part][1][i], 0x7632),
                 __byte_perm(v[part][2][i], v[part][3][i], 0x5410),
                 __byte_perm(v[part][2][i], v[part][3][i], 0x7632), b0, b1, scalar());
      }
    }
  }

  // to: [GROUP, HEAD_STRIDE].
  __device__ __forceinline__ void write(float* to, int g, int j) {
#pragma unroll
    for (int head = 0; head < 2; ++head) {
#pragma unroll
      for (int offset = 4; offset < WARP; offset *= 2) {
        sum[head] += __shfl_xor_sync(FULL, sum[head], offset);
      }
      if (2 * j + head >= GROUP) continue;
      float* row = to + (2 * j + head) * HEAD_STRIDE;
#pragma unroll
      for (int i = 0; i < VALUE_PARTS * 2; ++i) {
        const float(&low)[4] = o[i / 2][i % 2 * 2], (&high)[4] = o[i / 2][i % 2 * 2 + 1];
        *reinterpret_cast<float4*>(row + 64 * (i / 2) + 8 * g + 4 * (i % 2)) =
            make_float4(low[head], low[head + 2], high[head], high[head + 2]);
      }
      if (g == 0) *reinterpret_cast<float2*>(row + HEAD_DIM) = make_float2(max[head], sum[head]);
    }
  }
};

// S^T of a page, in powers of two; -inf from position `valid` on, whatever the cache holds there.
__device__ __forceinline__ void score(float (&scores)[4], const Keys& keys, const Queries& queries,
                                      int valid, int g) {
  constexpr float SCALE = 1.44269504f * (HEAD_DIM == 64 ? 0.125f : 0.0883883476f);
#pragma unroll
  for (int i = 0; i < 4; ++i) scores[i] = 0.f;
#pragma unroll
  for (int part = 0; part < KEY_PARTS; ++part) {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      multiply(scores, keys[0][part][i], keys[1][part][i], keys[0][part][i + 1],
               keys[1][part][i + 1], queries[part][i], queries[part][i + 1], scalar());
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) scores[i] = g + i / 2 * 8 < valid ? scores[i] * SCALE : -infinity();
}

// Zero times NaN is NaN: values from position `valid` on become zero.
__device__ __forceinline__ void mask_values(Values& values, int valid, int j) {
  if (valid >= PAGE) return;
#pragma unroll
  for (int i = 0; i < VALUE_PARTS * 16; ++i) {
    const int from = i / 4 % 4;
    if (2 * j + from % 2 + 8 * (from / 2) >= valid) values[i / 16][from][i % 4] = 0;
  }
}
