// Attention with 8-bit products: what is done to one head, compiled once for each level of vector
// units.
//
// After SageAttention (Zhang et al., arXiv 2410.02367): the mean key is taken off, which a softmax
// does not notice; keys get a scale per token, queries one per row. Probabilities get one per row
// and block of keys, values one per channel after the middle of their range is taken off, which the
// rows' sum of 1 gives back exactly. Products and sums of integers are exact, so levels differ by
// the rounding of exponentials only.
#pragma once

#include "calls.h"

namespace operators {

constexpr int kBlock = 64;  // keys that share a maximum
constexpr int kTile = 96;   // queries of a task
constexpr int kChunk = 512; // tokens of a task of `measure`

// A head's keys and values as integers, in the order in which the products want them. A cell is four
// bytes: as many neighbours along the summed axis as the level multiplies at once.
struct Panel {
  int32_t* keys;         // [block][channels / group][kBlock]
  int32_t* values;       // [block][kBlock / group][padded]
  float* key_scales;     // [block * kBlock]
  float* key_mean;       // [width]
  float* value_middle;   // [padded]
  float* value_scales;   // [padded]
  float* value_gains;    // [padded], one over the scales
};

// What `measure` finds in a chunk of tokens. `flaw` is 0, or NaN if anything is not finite.
struct Findings {
  float* sums;     // [width], of the keys
  float* lowest;   // [values]
  float* highest;  // [values]
  float flaw;
};

constexpr int64_t blocks(const Sizes& sizes) { return (sizes.keys + kBlock - 1) / kBlock; }
constexpr int64_t padded(int64_t channels) { return rounded_up(channels, 16); }

struct QuantizedKernels {
  int group;
  // What lies in tokens from..to.
  void (*measure)(const Sizes&, Rows keys, Rows values, int64_t from, int64_t to, Findings*);
  // One block of keys and values into the panel, whose means, middles and scales are known.
  void (*pack)(const Sizes&, Rows keys, Rows values, int64_t block, const Panel&);
  // Queries from..to, at most kTile; `scratch` holds attend_bytes less 64. A query that is not finite
  // gives NaN.
  void (*attend)(const Sizes&, Rows queries, int64_t from, int64_t to, const Panel&, float* output,
                 int64_t output_stride, void* scratch);
};

// Bytes of scratch for a tile, with 64 to align it.
constexpr int64_t attend_bytes(const Sizes& sizes) {
  const int64_t rows = rounded_up(kTile, kRows);
  const int64_t sums = rows * (padded(sizes.values) + 16) * 4;
  const int64_t queries = rows * rounded_up(sizes.width, 4) / 2 * 4;
  return sums + queries + 64;
}

}  // namespace operators
