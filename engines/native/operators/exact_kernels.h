// Products and attention in fp32, compiled once for each level of vector units.
//
// Nothing is rounded but by fp32 itself: results differ from another implementation's by the order of
// summation. What is not finite comes out as it would from the plain formula.
#pragma once

#include "calls.h"

namespace operators {

constexpr int kQueries = 96;  // of a tile
constexpr int kKeys = 64;     // that share a step of the softmax

struct ExactKernels {
  // Rows from..to of the columns first..last of a call; `first` is a multiple of kStripe.
  void (*linear)(const LinearCall&, int64_t from, int64_t to, int64_t first, int64_t last);
  // Queries from..to of a head, at most kQueries; `scratch` holds scratch_floats, aligned to 64 bytes.
  void (*attend)(const AttentionCall&, int64_t head, int64_t from, int64_t to, float* scratch);
};

// Queries and scores lie as columns: a softmax is then taken of 16 queries at once.
constexpr int64_t scratch_floats(const Sizes& sizes) {
  const int64_t queries = sizes.width * kQueries, scores = (kKeys + kRows) * kQueries;
  const int64_t sums_and_values = (kQueries + kKeys) * rounded_up(sizes.values, kStripe);
  return queries + scores + sums_and_values + 3 * kQueries;
}

}  // namespace operators
