// The kernels for CUDA: one thread for each pixel (or some), or for four numbers of a memory; no
// thread waits for another. Compiled to pixels.fatbin, and by the tests for the CPU.
#include "core.h"

using namespace pixels;

namespace {

PIXELS_FUNCTION int64_t thread_x() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

PIXELS_FUNCTION int64_t thread_y() {
  return static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y;
}

// A histogram of 16-bit values, signed or not, and of 8-bit ones.
constexpr int32_t kBelow = 32768, kBins = 65536 + kBelow, kCoarse = 256, kRun = 8;

// A share of the way between two numbers, from the nearer one, so that neither end is missed.
PIXELS_FUNCTION double between(double below, double above, double share) {
  return share < 0.5 ? below + (above - below) * share : above - (above - below) * (1 - share);
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

// Grid: numbers to be 0.
extern "C" __global__ void recallseg_clear(uint32_t* numbers, int64_t count) {
  const int64_t i = thread_x();
  if (i < count) numbers[i] = 0;
}

// Grid: runs of kRun columns, rows of an image of 8 or 16 bits. `fine` counts its values, in order;
// `coarse` counts them 256 at a time. Neighbours are often alike (background): they are counted
// together, or every thread would wait for the same counter.
extern "C" __global__ void recallseg_histogram(const void* image, int32_t pixel, int32_t channels,
                                               int64_t row_stride, int64_t column_stride,
                                               int64_t channel_stride, int32_t rows,
                                               int32_t columns, uint32_t* fine, uint32_t* coarse) {
  const int64_t first = thread_x() * kRun, row = thread_y();
  if (first >= columns || row >= rows) return;
  const int64_t end = first + kRun < columns ? first + kRun : columns;
  for (int32_t channel = 0; channel < channels; ++channel) {
    int32_t before = -1;
    uint32_t alike = 0;
    for (int64_t column = first; column <= end; ++column) {
      int32_t value = -1;
      if (column < end)
        value = static_cast<int32_t>(pixel_at(
                    image, channel * channel_stride + row * row_stride + column * column_stride,
                    pixel)) + kBelow;
      if (value != before && alike > 0) {
        atomicAdd(fine + before, alike);
        atomicAdd(coarse + before / kCoarse, alike);
        alike = 0;
      }
      before = value;
      alike += value >= 0 ? 1 : 0;
    }
  }
}

// Six threads: the values that would stand at six ranks if all pixels were sorted.
extern "C" __global__ void recallseg_rank(const uint32_t* fine, const uint32_t* coarse,
                                          int64_t rank0, int64_t rank1, int64_t rank2,
                                          int64_t rank3, int64_t rank4, int64_t rank5,
                                          double* found) {
  const int64_t ranks[6] = {rank0, rank1, rank2, rank3, rank4, rank5};
  const int64_t i = thread_x();
  if (i >= 6) return;
  int64_t below = 0;
  int32_t part = 0, value = 0;
  while (part < kBins / kCoarse - 1 && below + coarse[part] <= ranks[i]) below += coarse[part++];
  value = part * kCoarse;
  const int32_t last = value + kCoarse - 1;
  while (value < last && below + fine[value] <= ranks[i]) below += fine[value++];
  found[i] = value - kBelow;
}

// One thread: the window between two percentiles, each between two of the values found, or between
// the least and the largest (the last two) where they are the same. As Pixels.percentiles has it.
extern "C" __global__ void recallseg_window(const double* found, double low_share,
                                            double high_share, Window* window) {
  if (thread_x() > 0) return;
  double low = between(found[0], found[1], low_share);
  double high = between(found[2], found[3], high_share);
  if (low == high) {
    low = found[4];
    high = found[5];
  }
  *window = Window{static_cast<float>(low), high > low ? static_cast<float>(1.0 / (high - low)) : 0};
}

// Grid: columns, rows of the target. Strides in bytes; data aligned to its dtype. `window` stands
// for `low` and `gain`, if it is not null.
extern "C" __global__ void recallseg_prepare(
    const void* image, int32_t pixel, int32_t channels, int64_t row_stride, int64_t column_stride,
    int64_t channel_stride, int32_t rule, const Span* y, const Span* x, const Window* window,
    float low, float gain, float mean0, float mean1, float mean2, float gain0, float gain1, float gain2, int32_t side,
    int32_t half, void* out) {
  const int64_t column = thread_x(), row = thread_y();
  if (column >= side || row >= side) return;
  const float mean[3] = {mean0, mean1, mean2}, gains[3] = {gain0, gain1, gain2};
  const Window intensities = window != nullptr ? *window : Window{low, gain};
  float value = 0.0f;
  for (int32_t channel = 0; channel < 3; ++channel) {
    if (channel < channels) {
      const int64_t base = channel * channel_stride;
      value = sample(rule, y[row], x[column], [=](int32_t from_row, int32_t from_column) {
        const int64_t offset = base + from_row * row_stride + from_column * column_stride;
        return windowed(pixel_at(image, offset, pixel), intensities);
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
