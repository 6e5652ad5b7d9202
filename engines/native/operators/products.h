// Products of kRows rows with vectors of columns, in registers. Everything here is internal to its
// translation unit.
#pragma once

#include "calls.h"
#include "lanes.h"

namespace operators {
namespace {

// Where vector `column` of a row lies, whose stripes of kStripe columns are `distance` floats apart.
INLINED const float* stripe(const float* row, int column, int64_t distance) {
  return row + column * kLanes / kStripe * distance + column * kLanes % kStripe;
}

// sums += a * b for kRows rows of a, `step` floats from one element to the next, and `columns` vectors
// of b's rows, which are `next` floats apart.
template <int columns, int step>
INLINED void multiply(const float* const (&a)[kRows], const float* b, int64_t next,
                      int64_t distance, int64_t depth, Floats (&sums)[kRows][columns]) {
  for (int64_t i = 0; i < depth; ++i, b += next) {
    Floats column[columns];
#pragma GCC unroll 8
    for (int c = 0; c < columns; ++c) column[c] = load<Floats>(stripe(b, c, distance));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Floats factor = all(a[r][i * step]);
#pragma GCC unroll 8
      for (int c = 0; c < columns; ++c) sums[r][c] += factor * column[c];
    }
  }
}

// Rows first.. of a matrix; what would lie beyond `end` repeats the last one.
INLINED void point(const float* (&rows)[kRows], const float* matrix, int64_t stride, int64_t first,
                   int64_t end) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
    rows[r] = matrix + (first + r < end ? first + r : end - 1) * stride;
}

}  // namespace
}  // namespace operators
