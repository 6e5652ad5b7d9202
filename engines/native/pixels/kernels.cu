// The kernels for CUDA: one thread for each pixel, or for four numbers of a memory; no thread waits
// for another. Compiled to pixels.fatbin, and by the tests for the CPU.
#include "core.h"

using namespace pixels;

namespace {

PIXELS_FUNCTION int64_t thread_x() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

PIXELS_FUNCTION int64_t thread_y() {
  return static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y;
}

// As enum Pixel of rows.h numbers them.
PIXELS_FUNCTION float pixel_at(const void* image, int64_t offset, int32_t pixel) {
  switch (pixel) {
    case 0: return static_cast<float>(load_at<uint8_t>(image, offset));
    case 1:
      return static_cast<float>(*reinterpret_cast<const int16_t*>(
          static_cast<const unsigned char*>(image) + offset));
    case 2:
      return static_cast<float>(*reinterpret_cast<const uint16_t*>(
          static_cast<const unsigned char*>(image) + offset));
    default:
      return *reinterpret_cast<const float*>(static_cast<const unsigned char*>(image) + offset);
  }
}

// Four neighbours, loaded and stored at once.
struct alignas(8) Halves {
  uint16_t of[4];
};
struct alignas(16) Floats {
  float of[4];
};
struct alignas(4) Bytes {
  int8_t of[4];
};

PIXELS_FUNCTION void store_four(void* out, int64_t at, const Floats& values, int32_t half) {
  if (!half) {
    static_cast<Floats*>(out)[at] = values;
    return;
  }
  Halves narrow;
  for (int i = 0; i < 4; ++i) narrow.of[i] = narrowed(values.of[i]);
  static_cast<Halves*>(out)[at] = narrow;
}

}  // namespace

// Grid: target pixels of one axis.
extern "C" __global__ void recallseg_spans(int32_t source, int32_t target, int32_t rule,
                                           Span* spans) {
  const int64_t i = thread_x();
  if (i < target) spans[i] = span_of({source, target, rule}, static_cast<int32_t>(i));
}

// Grid: columns, rows of the target. Strides in bytes; data aligned to its dtype.
extern "C" __global__ void recallseg_prepare(
    const void* image, int32_t pixel, int32_t channels, int64_t row_stride, int64_t column_stride,
    int64_t channel_stride, int32_t rule, const Span* y, const Span* x, float low, float gain,
    float mean0, float mean1, float mean2, float gain0, float gain1, float gain2, int32_t side,
    int32_t half, void* out) {
  const int64_t column = thread_x(), row = thread_y();
  if (column >= side || row >= side) return;
  const float mean[3] = {mean0, mean1, mean2}, gains[3] = {gain0, gain1, gain2};
  float value = 0.0f;
  for (int32_t channel = 0; channel < 3; ++channel) {
    if (channel < channels) {
      const int64_t base = channel * channel_stride;
      value = sample(rule, y[row], x[column], [=](int32_t from_row, int32_t from_column) {
        const int64_t offset = base + from_row * row_stride + from_column * column_stride;
        return windowed(pixel_at(image, offset, pixel), Window{low, gain});
      });
    }
    const int64_t at = (static_cast<int64_t>(channel) * side + row) * side + column;
    const float result = normalised(value, mean[channel], gains[channel]);
    if (half)
      static_cast<uint16_t*>(out)[at] = narrowed(result);
    else
      static_cast<float*>(out)[at] = result;
  }
}

// Grid: columns, rows of the outputs. A structure is present if its object score is above 0.
extern "C" __global__ void recallseg_finish(
    const float* logits, const float* object_scores, int32_t n, int32_t rows, int32_t columns,
    int32_t rule, const Span* y, const Span* x, int32_t out_rows, int32_t out_columns,
    uint8_t* labels, int64_t label_row, int64_t label_column, uint8_t* masks, int64_t mask_plane,
    int64_t mask_row, int64_t mask_column) {
  const int64_t column = thread_x(), row = thread_y();
  if (column >= out_columns || row >= out_rows) return;
  float highest = 0.0f;
  uint8_t label = 0;
  for (int32_t structure = 0; structure < n; ++structure) {
    uint8_t* mask = masks + structure * mask_plane + row * mask_row + column * mask_column;
    if (!(object_scores[structure] > 0.0f)) {
      *mask = 0;
      continue;
    }
    const float* plane = logits + static_cast<int64_t>(structure) * rows * columns;
    const float value =
        sample(rule, y[row], x[column], [=](int32_t from_row, int32_t from_column) {
          return plane[static_cast<int64_t>(from_row) * columns + from_column];
        });
    *mask = value > 0.0f ? 1 : 0;
    if (value > highest) {
      highest = value;
      label = static_cast<uint8_t>(structure + 1);
    }
  }
  labels[row * label_row + column * label_column] = label;
}

// Grid: fours of a memory's numbers, memories. `places` are records of the bank.
extern "C" __global__ void recallseg_gather_half(const unsigned char* bank, int64_t record_bytes,
                                                 const int64_t* places, int64_t fours,
                                                 int32_t half, void* out) {
  const int64_t four = thread_x(), memory = thread_y();
  if (four >= fours) return;
  const auto* record = reinterpret_cast<const Halves*>(bank + places[memory] * record_bytes);
  const Halves halves = record[four];
  const int64_t at = memory * fours + four;
  if (half) {
    static_cast<Halves*>(out)[at] = halves;
    return;
  }
  Floats values;
  for (int i = 0; i < 4; ++i) values.of[i] = widened(halves.of[i]);
  static_cast<Floats*>(out)[at] = values;
}

// The same for int8; `scales` has one number per token, `width` numbers long, of each record.
extern "C" __global__ void recallseg_gather_int8(const unsigned char* bank, int64_t record_bytes,
                                                 const float* scales, const int64_t* places,
                                                 int64_t fours, int32_t width, int32_t half,
                                                 void* out) {
  const int64_t four = thread_x(), memory = thread_y();
  if (four >= fours) return;
  const auto* record = reinterpret_cast<const Bytes*>(bank + places[memory] * record_bytes);
  const Bytes bytes = record[four];
  const float scale = scales[places[memory] * (4 * fours / width) + 4 * four / width];
  Floats values;
  for (int i = 0; i < 4; ++i) values.of[i] = static_cast<float>(bytes.of[i]) * scale;
  store_four(out, memory * fours + four, values, half);
}
