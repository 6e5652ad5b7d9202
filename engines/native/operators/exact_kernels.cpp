// Compiled several times, each with OPERATORS_LEVEL and the matching -march: no templates of the
// standard library here, whose code the linker would share between levels.
#include "exact_kernels.h"

#include "products.h"

namespace operators {
namespace {

template <int columns>
INLINED void linear_columns(const LinearCall& call, int64_t from, int64_t to, int64_t column) {
  const int64_t distance = call.width * kStripe;
  const float* weights = call.weights + column / kStripe * distance + column % kStripe;
  const int64_t left = call.columns - column;
  alignas(64) float done[kRows][columns * kLanes];
  for (int64_t row = from; row < to; row += kRows) {
    const float* rows[kRows];
    point(rows, call.input, call.width, row, to);
    Floats sums[kRows][columns];
#pragma GCC unroll 8
    for (int c = 0; c < columns; ++c) {
      const Floats bias = load<Floats>(call.bias + column + c * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sums[r][c] = bias;
    }
    multiply<columns, 1>(rows, weights, kStripe, distance, call.width, sums);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < columns; ++c) store(done[r] + c * kLanes, sums[r][c]);
    for (int r = 0; r < kRows && row + r < to; ++r) {
      float* out = call.output + (row + r) * call.columns + column;
      for (int c = 0; c < columns; ++c) {
        Floats value = load<Floats>(done[r] + c * kLanes);
        if (call.activation == Activation::kGelu) value = gelu(value);
        if (call.activation == Activation::kRelu) value = value < 0.0f ? all(0.0f) : value;
        if (left >= (c + 1) * kLanes)
          store(out + c * kLanes, value);
        else
          for (int i = 0; c * kLanes + i < left; ++i) out[c * kLanes + i] = value[i];
      }
    }
  }
}

void linear(const LinearCall& call, int64_t from, int64_t to, int64_t first, int64_t last) {
  int64_t column = first;
  for (; column + (kWide - 1) * kLanes < last; column += kWide * kLanes)
    linear_columns<kWide>(call, from, to, column);
  for (; column + kLanes < last; column += 2 * kLanes)
    linear_columns<2>(call, from, to, column);
  for (; column < last; column += kLanes) linear_columns<1>(call, from, to, column);
}

struct Scratch {
  float* queries;  // [width][kQueries]
  float* scores;   // [kKeys + kRows][kQueries]
  float* sums;     // [kQueries][padded values], of values weighted so far
  float* values;   // [kKeys][padded values], where they must be padded
  float* highest;  // [kQueries], the largest score so far
  float* totals;   // [kQueries], of the weights so far
  float* keep;     // [kQueries], what a new largest score leaves of the sums

  Scratch(float* first, const Sizes& sizes) {
    const int64_t padded = rounded_up(sizes.values, kStripe);
    queries = first;
    scores = queries + sizes.width * kQueries;
    sums = scores + (kKeys + kRows) * kQueries;
    values = sums + kQueries * padded;
    highest = values + kKeys * padded;
    totals = highest + kQueries;
    keep = totals + kQueries;
  }
};

// Scores of `count` keys, kRows at a time, for `columns` vectors of queries.
template <int columns>
INLINED void score(const Scratch& at, const Sizes& sizes, Rows keys, int64_t count, int column) {
  for (int64_t key = 0; key < count; key += kRows) {
    const float* rows[kRows];
    point(rows, keys.first, keys.stride, key, count);
    if (column == 0)  // the next block, or head: six short streams are too many for a prefetcher
      for (int64_t r = 0; r < kRows; ++r)
        for (int64_t c = 0; c < sizes.width; c += 16)
          __builtin_prefetch(keys.first + (key + r + kKeys) * keys.stride + c, 0, 2);
    Floats sums[kRows][columns] = {};
    multiply<columns, 1>(rows, at.queries + column * kLanes, kQueries, kStripe, sizes.width, sums);
    float* scores = at.scores + key * kQueries + column * kLanes;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < columns; ++c) store(scores + r * kQueries + c * kLanes, sums[r][c]);
  }
}

// Scores to probabilities, less than or equal to 1, beside the largest score so far.
INLINED void soften(const Scratch& at, int64_t count, int vectors) {
  for (int v = 0; v < vectors; ++v) {
    float* column = at.scores + v * kLanes;
    float* highest = at.highest + v * kLanes;
    float* totals = at.totals + v * kLanes;
    const Floats before = load<Floats>(highest);
    Floats peak = before;
    for (int64_t key = 0; key < count; ++key)
      peak = larger(peak, load<Floats>(column + key * kQueries));
    const Floats keep = exponential(before - peak);
    Floats total = load<Floats>(totals) * keep;
    for (int64_t key = 0; key < count; ++key) {
      float* place = column + key * kQueries;
      const Floats probability = exponential(load<Floats>(place) - peak);
      total += probability;
      store(place, probability);
    }
    store(highest, peak);
    store(totals, total);
    store(at.keep + v * kLanes, keep);
  }
}

// Adds the block's values, weighted, to the sums of kRows queries.
template <int columns>
INLINED void gather(const Scratch& at, Rows values, int64_t count, int64_t query, int64_t channel,
                    int64_t width) {
  const float* rows[kRows];
  Floats sums[kRows][columns];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    rows[r] = at.scores + query + r;
    const Floats keep = all(at.keep[query + r]);
#pragma GCC unroll 8
    for (int c = 0; c < columns; ++c)
      sums[r][c] = load<Floats>(at.sums + (query + r) * width + channel + c * kLanes) * keep;
  }
  multiply<columns, kQueries>(rows, values.first + channel, values.stride, kStripe, count, sums);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < columns; ++c)
      store(at.sums + (query + r) * width + channel + c * kLanes, sums[r][c]);
}

// Queries as columns, scaled such that a probability is a power of two.
INLINED void turn(const Scratch& at, const Sizes& sizes, Rows queries, int64_t count,
                  int64_t padded) {
  const float gain = sizes.scale * kLog2E;
  constexpr int kSide = 4;
  int64_t query = 0;
  for (; query + kSide <= count; query += kSide) {
    const float* from = queries.first + query * queries.stride;
    float* to = at.queries + query;
    int64_t channel = 0;
    for (; channel + kSide <= sizes.width; channel += kSide) {
      Four rows[kSide];
      for (int r = 0; r < kSide; ++r) rows[r] = load<Four>(from + r * queries.stride + channel);
      turn_four(rows);
      for (int r = 0; r < kSide; ++r) store(to + (channel + r) * kQueries, rows[r] * gain);
    }
    for (; channel < sizes.width; ++channel)
      for (int r = 0; r < kSide; ++r)
        to[channel * kQueries + r] = from[r * queries.stride + channel] * gain;
  }
  for (; query < padded; ++query)
    for (int64_t channel = 0; channel < sizes.width; ++channel)
      at.queries[channel * kQueries + query] =
          query < count ? queries.first[query * queries.stride + channel] * gain : 0.0f;
}

void attend(const AttentionCall& call, int64_t head, int64_t from, int64_t to, float* memory) {
  const Sizes& sizes = call.sizes;
  const Scratch at(memory, sizes);
  const Rows queries = rows_of(call.query, call, sizes.queries, sizes.width, head);
  const Rows keys = rows_of(call.key, call, sizes.keys, sizes.width, head);
  const Rows values = rows_of(call.value, call, sizes.keys, sizes.values, head);
  const int64_t count = to - from, width = rounded_up(sizes.values, kStripe);
  const auto vectors = static_cast<int>((count + kLanes - 1) / kLanes);
  turn(at, sizes, {queries.first + from * queries.stride, queries.stride}, count,
       vectors * kLanes);
  const int64_t rows = rounded_up(count, kRows);
  for (int64_t i = 0; i < rows * width; ++i) at.sums[i] = 0.0f;
  for (int64_t i = 0; i < kQueries; ++i) {
    at.highest[i] = kNone;
    at.totals[i] = at.keep[i] = 0.0f;
  }

  for (int64_t first = 0; first < sizes.keys; first += kKeys) {
    const int64_t left = sizes.keys - first, n = left < kKeys ? left : kKeys;
    const Rows block_keys = {keys.first + first * keys.stride, keys.stride};
    Rows block_values = {values.first + first * values.stride, values.stride};
    if (width != sizes.values) {  // beyond the last channel lies another head, or nothing
      for (int64_t key = 0; key < n; ++key)
        for (int64_t c = 0; c < width; ++c)
          at.values[key * width + c] =
              c < sizes.values ? block_values.first[key * values.stride + c] : 0.0f;
      block_values = {at.values, width};
    }
    int column = 0;
    for (; column + kWide <= vectors; column += kWide)
      score<kWide>(at, sizes, block_keys, n, column);
    for (; column + 2 <= vectors; column += 2) score<2>(at, sizes, block_keys, n, column);
    for (; column < vectors; ++column) score<1>(at, sizes, block_keys, n, column);
    soften(at, n, vectors);
    int64_t channel = 0;
    for (; channel + kWide * kLanes <= width; channel += kWide * kLanes)
      for (int64_t q = 0; q < rows; q += kRows)
        gather<kWide>(at, block_values, n, q, channel, width);
    for (; channel + 2 * kLanes <= width; channel += 2 * kLanes)
      for (int64_t q = 0; q < rows; q += kRows) gather<2>(at, block_values, n, q, channel, width);
    for (; channel < width; channel += kLanes)
      for (int64_t q = 0; q < rows; q += kRows) gather<1>(at, block_values, n, q, channel, width);
  }

  const int64_t stride = call.heads * sizes.values;
  float* output = call.output + ((head / call.heads) * sizes.queries + from) * stride +
                  (head % call.heads) * sizes.values;
  for (int64_t q = 0; q < count; ++q) {
    const float gain = 1.0f / at.totals[q];
    const float* sums = at.sums + q * width;
    for (int64_t c = 0; c < sizes.values; ++c) output[q * stride + c] = sums[c] * gain;
  }
}

}  // namespace

extern const ExactKernels OF_THIS_LEVEL(exact);
const ExactKernels OF_THIS_LEVEL(exact) = {linear, attend};

}  // namespace operators
