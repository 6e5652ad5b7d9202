// Compiled several times, each with OPERATORS_LEVEL and the matching -march: no templates of the
// standard library here, whose code the linker would share between levels.
#include "quantized_kernels.h"

#include "lanes.h"

namespace operators {
namespace {

constexpr int kCells = kBlock / kGroup;  // of a block of keys, for one row of probabilities
// The largest probability of a row and block becomes 255 = 2^this.
constexpr float kTop = 7.994353437f;

INLINED uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

INLINED float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// The nearest whole number (|value| < 2^21) in the low bits; vectorises at every level.
INLINED uint32_t whole_bits(float value) { return bits_of(value + 12582912.0f); }

// Neighbours `step` apart joined to a cell.
INLINED int32_t cell(const uint32_t* numbers, int64_t step) {
  constexpr int kBits = 32 / kGroup;
  constexpr uint32_t kMask = (1u << kBits) - 1;
  uint32_t joined = 0;
  for (int i = 0; i < kGroup; ++i) joined |= (numbers[i * step] & kMask) << (i * kBits);
  return static_cast<int32_t>(joined);
}

int64_t cells_of(const Sizes& sizes) { return rounded_up(sizes.width, 4) / kGroup; }

void measure(const Sizes& sizes, Rows keys, Rows values, int64_t from, int64_t to,
             Findings* found) {
  float flaw = 0.0f;
  float* __restrict sums = found->sums;
  float* __restrict lowest = found->lowest;
  float* __restrict highest = found->highest;
  for (int64_t c = 0; c < sizes.width; ++c) sums[c] = 0.0f;
  for (int64_t c = 0; c < sizes.values; ++c) {
    lowest[c] = -kNone;
    highest[c] = kNone;
  }
  for (int64_t token = from; token < to; ++token) {
    const float* key = keys.first + token * keys.stride;
    const float* value = values.first + token * values.stride;
    uint32_t most = 0;  // an exponent of all ones is infinity or NaN
    for (int64_t c = 0; c < sizes.width; ++c) {
      sums[c] += key[c];
      const uint32_t bits = bits_of(key[c]) & 0x7FFFFFFFu;
      most = bits > most ? bits : most;
    }
    for (int64_t c = 0; c < sizes.values; ++c) {
      lowest[c] = value[c] < lowest[c] ? value[c] : lowest[c];
      highest[c] = value[c] > highest[c] ? value[c] : highest[c];
      const uint32_t bits = bits_of(value[c]) & 0x7FFFFFFFu;
      most = bits > most ? bits : most;
    }
    if (most >= 0x7F800000u) flaw = __builtin_nanf("");
  }
  found->flaw = flaw;
}

// The largest magnitude, as bits: above every number if one is not finite.
INLINED uint32_t magnitude(const float* __restrict row, int64_t n) {
  uint32_t most = 0;
  for (int64_t c = 0; c < n; ++c) {
    const uint32_t bits = bits_of(row[c]) & 0x7FFFFFFFu;
    most = bits > most ? bits : most;
  }
  return most;
}

constexpr int kStep = 256;  // channels of a row handled at a time

// A key less the mean, in 8 bits, to its place in a block.
INLINED float pack_key(const float* __restrict key, const float* __restrict mean,
                                  int64_t width, int32_t* packed) {
  alignas(64) float row[kStep];
  alignas(64) uint32_t numbers[kStep];
  uint32_t most = 0;
  for (int64_t c = 0; c < width; ++c) {
    const uint32_t bits = bits_of(key[c] - mean[c]) & 0x7FFFFFFFu;
    most = bits > most ? bits : most;
  }
  const float size = from_bits(most), gain = size > 1e-30f ? 127.0f / size : 0.0f;
  for (int64_t first = 0; first < width; first += kStep) {
    const int64_t left = width - first, n = left < kStep ? left : kStep, whole = rounded_up(n, 4);
    for (int64_t c = 0; c < n; ++c) row[c] = (key[first + c] - mean[first + c]) * gain;
    for (int64_t c = n; c < whole; ++c) row[c] = 0.0f;
    for (int64_t c = 0; c < whole; ++c)
      numbers[c] = whole_bits(row[c]) + static_cast<uint32_t>(kOffset);
    for (int64_t c = 0; c < whole / kGroup; ++c)
      packed[(first / kGroup + c) * kBlock] = cell(numbers + c * kGroup, 1);
  }
  return size / 127.0f;
}

// As many values as a cell joins, `count` of them real; the channels beyond `width` become 0.
INLINED void pack_values(const float* values, int64_t stride, int count, int64_t width,
                                    const Panel& panel, int32_t* cells) {
  alignas(64) uint32_t numbers[kGroup * kStep];
  for (int64_t first = 0; first < padded(width); first += kStep) {
    const int64_t left = width - first, n = left < kStep ? left : kStep;
    const float* __restrict middle = panel.value_middle + first;
    const float* __restrict gains = panel.value_gains + first;
    for (int i = 0; i < kGroup; ++i) {
      uint32_t* __restrict row = numbers + i * kStep;
      const float* __restrict value = values + i * stride + first;
      for (int64_t c = i < count ? n : 0; c < padded(n); ++c) row[c] = 0;
      if (i < count)
        for (int64_t c = 0; c < n; ++c) row[c] = whole_bits((value[c] - middle[c]) * gains[c]);
    }
    for (int64_t c = 0; c < padded(n); ++c) cells[first + c] = cell(numbers + c, kStep);
  }
}

void pack(const Sizes& sizes, Rows keys, Rows values, int64_t block, const Panel& panel) {
  const int64_t from = block * kBlock;
  const int count = static_cast<int>(sizes.keys - from < kBlock ? sizes.keys - from : kBlock);
  int32_t* packed = panel.keys + block * cells_of(sizes) * kBlock;
  for (int i = 0; i < count; ++i)
    panel.key_scales[from + i] = pack_key(keys.first + (from + i) * keys.stride, panel.key_mean,
                                          sizes.width, packed + i);
  for (int i = count; i % kLanes != 0; ++i) {  // what is read with the others, and masked
    panel.key_scales[from + i] = 0.0f;
    for (int64_t c = 0; c < cells_of(sizes); ++c) packed[c * kBlock + i] = 0;
  }
  const int64_t width = padded(sizes.values);
  int32_t* cells = panel.values + block * kCells * width;
  for (int i = 0; i < count; i += kGroup, cells += width)
    pack_values(values.first + (from + i) * values.stride, values.stride, count - i, sizes.values,
                panel, cells);
}

// Products of kRows queries with `columns` vectors of keys, as real numbers: kRows x kBlock.
template <int columns>
INLINED void multiply_keys(const int32_t* keys, const int32_t* queries, int64_t cells,
                                      const int32_t* start, const float* scales, float* scores) {
  Ints sums[kRows][columns];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < columns; ++c) sums[r][c] = all(start[r]);
  for (int64_t i = 0; i < cells; ++i, keys += kBlock, queries += kRows) {
    Ints key[columns];
#pragma GCC unroll 8
    for (int c = 0; c < columns; ++c) key[c] = load<Ints>(keys + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Ints query = all(queries[r]);
#pragma GCC unroll 8
      for (int c = 0; c < columns; ++c) sums[r][c] = dot(sums[r][c], key[c], query);
    }
  }
#pragma GCC unroll 8
  for (int c = 0; c < columns; ++c) {
    const Floats scale = load<Floats>(scales + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
      store(scores + r * kBlock + c * kLanes, to_floats(sums[r][c]) * scale);
  }
}

// Sums of a row so far are `keep` times what they were, plus `gain` times the block's.
struct Update {
  alignas(64) float keep[16];
  alignas(64) float gain[16];
};

template <int columns>
INLINED void multiply_values(const int32_t* probabilities, int cells,
                                        const int32_t* values, int64_t width, const Update& update,
                                        float* sums_so_far, int64_t stride) {
  Ints sums[kRows][columns] = {};
  for (int i = 0; i < cells; ++i, values += width) {
    Ints value[columns];
#pragma GCC unroll 8
    for (int c = 0; c < columns; ++c) value[c] = load<Ints>(values + c * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Ints probability = all(probabilities[r * kCells + i]);
#pragma GCC unroll 8
      for (int c = 0; c < columns; ++c) sums[r][c] = dot(sums[r][c], probability, value[c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const Floats keep = all(update.keep[r]), gain = all(update.gain[r]);
#pragma GCC unroll 8
    for (int c = 0; c < columns; ++c) {
      float* place = sums_so_far + r * stride + c * kLanes;
      store(place, load<Floats>(place) * keep + to_floats(sums[r][c]) * gain);
    }
  }
}

// What is kept of kRows queries between blocks of keys.
struct Group {
  alignas(64) float scales[16];    // to turn a score into a power of two
  alignas(64) float highest[16];   // largest score so far, as a power of two
  int32_t start[kRows];            // of a sum of products, to undo the offset of the keys
  float flaw[kRows];
};

// Scores of kRows queries to probabilities of 8 bits, their sums and the block's place among all.
INLINED void soften(float* scores, int count, Group& group, Narrow* probabilities,
                               Update& update, float* totals, int64_t stride) {
  const int vectors = (count + kLanes - 1) / kLanes;
  if (count < kBlock)
    for (int r = 0; r < kRows; ++r)
      for (int i = count; i < vectors * kLanes; ++i) scores[r * kBlock + i] = kNone;
  alignas(64) float block_highest[16] = {};
  alignas(64) float mass[kRows * kLanes];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    const float* row = scores + r * kBlock;
    Floats most = load<Floats>(row);
    for (int v = 1; v < vectors; ++v) most = larger(most, load<Floats>(row + v * kLanes));
    // The difference comes first: fused with it, a product could lie above the rounded largest one.
    const float high = largest(most);
    const Floats peak = all(high), scale = all(group.scales[r]);
    block_highest[r] = high * group.scales[r];
    Ints sum = {};
    for (int v = 0; v < vectors; ++v) {
      const Floats below = (load<Floats>(row + v * kLanes) - peak) * scale;
      const Ints rounded = to_ints(power_of_two(below + kTop));
      sum += rounded;
      store_narrow(probabilities + r * kBlock + v * kLanes, rounded);
    }
    store(mass + r * kLanes, to_floats(sum));
  }
  for (int i = 0; i < kRows; i += kLanes) {
    const Floats before = load<Floats>(group.highest + i);
    const Floats block = load<Floats>(block_highest + i);
    const Floats now = larger(before, block);
    store(group.highest + i, now);
    store(update.keep + i, power_of_two(before - now));
    store(update.gain + i, power_of_two(block - now));
  }
  for (int r = 0; r < kRows; ++r) {
    float* place = totals + r * stride;
    store(place, load<Floats>(place) * all(update.keep[r]) +
                     load<Floats>(mass + r * kLanes) * all(update.gain[r]));
  }
}

void start_group(const Sizes& sizes, Rows queries, int64_t first, int64_t end, int32_t* packed,
                 Group& group) {
  alignas(64) uint32_t numbers[kStep];
  const int64_t cells = cells_of(sizes);
  for (int r = 0; r < 16; ++r) {
    group.scales[r] = 0.0f;
    group.highest[r] = kNone;
  }
  for (int r = 0; r < kRows; ++r) {
    group.start[r] = 0;
    group.flaw[r] = 0.0f;
    if (first + r >= end) {
      for (int64_t c = 0; c < cells; ++c) packed[c * kRows + r] = 0;
      continue;
    }
    const float* query = queries.first + (first + r) * queries.stride;
    const uint32_t bits = magnitude(query, sizes.width);
    float most = from_bits(bits);
    if (bits >= 0x7F800000u) {
      group.flaw[r] = __builtin_nanf("");
      most = 0.0f;
    }
    const float gain = most > 1e-30f ? 127.0f / most : 0.0f;
    // Above 0, so that a masked key stays infinitely far below the others.
    const float scale = most / 127.0f * sizes.scale * kLog2E;
    group.scales[r] = scale > 1e-30f ? scale : 1e-30f;
    int32_t sum = 0;
    for (int64_t from = 0; from < sizes.width; from += kStep) {
      const int64_t left = sizes.width - from, n = left < kStep ? left : kStep;
      for (int64_t c = n; c < rounded_up(n, 4); ++c) numbers[c] = 0;
      for (int64_t c = 0; c < n; ++c) {
        numbers[c] = whole_bits(gain > 0.0f ? query[from + c] * gain : 0.0f);
        sum += static_cast<int32_t>(numbers[c] - 0x4B400000u);
      }
      for (int64_t c = 0; c < rounded_up(n, 4) / kGroup; ++c)
        packed[(from / kGroup + c) * kRows + r] = cell(numbers + c * kGroup, 1);
    }
    group.start[r] = -kOffset * sum;
  }
}

void attend(const Sizes& sizes, Rows queries, int64_t from, int64_t to, const Panel& panel,
            float* output, int64_t output_stride, void* scratch) {
  constexpr int kGroups = (kTile + kRows - 1) / kRows;
  const int groups = static_cast<int>((to - from + kRows - 1) / kRows);
  const int64_t width = padded(sizes.values), stride = width + 16, cells = cells_of(sizes);
  float* sums = static_cast<float*>(scratch);
  int32_t* packed = reinterpret_cast<int32_t*>(sums + kGroups * kRows * stride);
  Group states[kGroups];
  for (int64_t i = 0; i < groups * kRows * stride; ++i) sums[i] = 0.0f;
  for (int g = 0; g < groups; ++g)
    start_group(sizes, queries, from + g * kRows, to, packed + g * cells * kRows, states[g]);

  alignas(64) float scores[kRows * kBlock];
  alignas(64) Narrow probabilities[kRows * kBlock];
  alignas(64) int32_t cells_of_row[kRows * kCells];
  Update update;
  for (int64_t block = 0; block < blocks(sizes); ++block) {
    const int64_t left = sizes.keys - block * kBlock;
    const int count = static_cast<int>(left < kBlock ? left : kBlock);
    const int32_t* keys = panel.keys + block * cells * kBlock;
    const int32_t* values = panel.values + block * kCells * width;
    const float* scales = panel.key_scales + block * kBlock;
    const int value_cells = (count + kGroup - 1) / kGroup;
    for (int g = 0; g < groups; ++g) {
      Group& group = states[g];
      const int32_t* query = packed + g * cells * kRows;
      float* so_far = sums + g * kRows * stride;
      int column = 0;
      for (; column + (kColumns - 1) * kLanes < count; column += kColumns * kLanes)
        multiply_keys<kColumns>(keys + column, query, cells, group.start, scales + column,
                                scores + column);
      for (; column < count; column += kLanes)
        multiply_keys<1>(keys + column, query, cells, group.start, scales + column,
                         scores + column);
      soften(scores, count, group, probabilities, update, so_far + width, stride);
      memcpy(cells_of_row, probabilities, sizeof cells_of_row);
      int64_t channel = 0;
      for (; channel + kColumns * kLanes <= width; channel += kColumns * kLanes)
        multiply_values<kColumns>(cells_of_row, value_cells, values + channel, width, update,
                                  so_far + channel, stride);
      for (; channel + 2 * kLanes <= width; channel += 2 * kLanes)
        multiply_values<2>(cells_of_row, value_cells, values + channel, width, update,
                           so_far + channel, stride);
      for (; channel < width; channel += kLanes)
        multiply_values<1>(cells_of_row, value_cells, values + channel, width, update,
                           so_far + channel, stride);
    }
  }

  for (int64_t row = 0; row < to - from; ++row) {
    const float* done = sums + row * stride;
    float total = 0.0f;
    for (int i = 0; i < kLanes; ++i) total += done[width + i];
    const float gain = 1.0f / total, flaw = states[row / kRows].flaw[row % kRows];
    float* out = output + (from + row) * output_stride;
    for (int64_t c = 0; c < sizes.values; ++c)
      out[c] = done[c] * gain * panel.value_scales[c] + panel.value_middle[c] + flaw;
  }
}

}  // namespace

extern const QuantizedKernels OF_THIS_LEVEL(quantized);
const QuantizedKernels OF_THIS_LEVEL(quantized) = {kGroup, measure, pack, attend};

}  // namespace operators
