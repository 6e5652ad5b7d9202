// Images, logits and memories on the CPU. Sizes and dtypes are the caller's to check.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "rows.h"

namespace pixels {

// HxWxC with C = 1 or 3, strides in bytes, any sign.
struct Image {
  const void* data;
  Pixel pixel;
  int32_t rows, columns, channels;
  int64_t row_stride, column_stride, channel_stride;
};

// Network input 3xSxS, C-contiguous, fp32 or fp16.
struct Input {
  void* data;
  bool half;
  int32_t side;
  std::array<float, 3> mean, gain;
};

void prepare(const Image& image, Window window, const Input& out, int threads);

// Masks nxHxW and labels HxW, strides in bytes, any sign.
struct Output {
  int32_t rows, columns;
  uint8_t* labels;
  int64_t label_row, label_column;
  uint8_t* masks;
  int64_t mask_plane, mask_row, mask_column;
};

// Logits nxhxw, C-contiguous; `present` has n values.
void finish(const float* logits, int32_t n, int32_t rows, int32_t columns, const bool* present,
            const Output& out, int threads);

// The values that would stand at `ranks` if all were sorted; NaN if any is NaN or infinite.
std::vector<double> order_statistics(const Image& image, const std::vector<int64_t>& ranks);

// From here on a result goes past the caches: more than a core's share of them.
constexpr int64_t kStreamBytes = 4 << 20;

// `tokens` rows of `width` numbers to fp32 or fp16; int8 with one scale per token.
void gather_half(const uint16_t* source, int64_t count, void* out, bool half, bool streamed);
void gather_int8(const int8_t* source, const float* scales, int64_t tokens, int64_t width,
                 void* out, bool half);

}  // namespace pixels
