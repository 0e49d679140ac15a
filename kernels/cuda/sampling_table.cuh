// What each row of the sequence table is sampled with, on the device.
#pragma once

typedef unsigned short uint16;
typedef unsigned int uint32;
typedef unsigned long long uint64;

// What changes a row's logits before a token is drawn, beside the suppressed tokens, whose end is a
// position: bits of SamplingTable.edits. The columns of an edit are read where its bit is set.
enum Edit { REPETITION = 1, OUTPUT = 2, BIASES = 4, ALLOWED = 8, SUPPRESSED = 16 };

constexpr int MAX_BIASES = 1024;  // of a row
constexpr uint32 MAX_COUNT = 0xffff;

// kernels/sampling.py's columns in its order, each indexed by table row.
struct SamplingTable {
  float* temperature;
  int* top_k;
  float *top_p, *min_p;
  uint64* seed;
  int* edits;
  float *repetition_penalty, *presence_penalty, *frequency_penalty;
  int* suppress_until;
  int* num_biases;
  uint32 *suppressed, *seen, *allowed_mask, *biased;  // [table_rows, words]
  int* bias_token_ids;                                // [table_rows, MAX_BIASES], rising
  float* biases;                                      // [table_rows, MAX_BIASES]
  uint16* output_counts;                              // [table_rows, 32 words]
};

// One more, up to MAX_COUNT; other threads may count the same token.
__device__ __forceinline__ void count_up(uint16* count) {
  uint16 before = *reinterpret_cast<volatile uint16*>(count), assumed;
  do {
    assumed = before;
    if (assumed == MAX_COUNT) return;
    before = atomicCAS(count, assumed, uint16(assumed + 1));
  } while (before != assumed);
}
