// The kernels for CUDA: one thread for each pixel (or some), or for four numbers of a memory; no
// thread waits for another, but the last of some may do what needs them all. Compiled to pixels.fatbin, and by the tests for the CPU.
#include "core.h"

using namespace pixels;

namespace {

PIXELS_FUNCTION int64_t thread_x() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

PIXELS_FUNCTION int64_t thread_y() {
  return static_cast<int64_t>(blockIdx.y) * blockDim.y + threadIdx.y;
}

// Counters of 16 bits of a number, in order: whole numbers of up to 16 bits, signed or not, have one
// each, floats one for either half of their ordered bits. `kCoarse` neighbours are also summed, and a
// thread counts `kRun` pixels.
constexpr int32_t kBelow = 32768, kCoarse = 256, kRun = 8, kHalf = 65536, kFloat = 3;

// What is found at six ranks, and what becomes of it. `bin` is the upper half of a float's bits and
// `rest` its rank among those that share it.
constexpr int32_t kRanks = 6;
struct Found {
  Window window;
  uint32_t wrong;  // NaN or infinite pixels
  uint32_t done;
  double at[kRanks];
  int64_t rest[kRanks];
  int32_t bin[kRanks];
};

// A share of the way between two numbers, from the nearer one, so that neither end is missed.
PIXELS_FUNCTION double between(double below, double above, double share) {
  return share < 0.5 ? below + (above - below) * share : above - (above - below) * (1 - share);
}

// An image; strides in bytes.
struct Source {
  const void* data;
  int32_t pixel;
  int32_t channels;
  int64_t row_stride;
  int64_t column_stride;
  int64_t channel_stride;
  int32_t rows;
  int32_t columns;
};

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

// Counts numbers from 0 up; neighbours are often alike (background), and are counted together, or
// every thread would wait for the same counter. One below 0 is passed over.
class Counted {
 public:
  explicit PIXELS_MEMBER Counted(uint32_t* counters) : counters_(counters) {}
  PIXELS_MEMBER void add(int32_t value) {
    if (value != before_) flush();
    before_ = value;
    ++alike_;
  }
  PIXELS_MEMBER void flush() {
    if (alike_ > 0 && before_ >= 0) atomicAdd(counters_ + before_, alike_);
    alike_ = 0;
  }

 private:
  uint32_t* counters_;
  int32_t before_ = -1;
  uint32_t alike_ = 0;
};

// Call visit(value) for the pixels of a thread.
template <class Visit>
PIXELS_FUNCTION void each(const Source& image, const Visit& visit) {
  const int64_t first = thread_x() * kRun, row = thread_y();
  if (row >= image.rows) return;
  const int64_t end = first + kRun < image.columns ? first + kRun : image.columns;
  for (int32_t channel = 0; channel < image.channels; ++channel)
    for (int64_t column = first; column < end; ++column)
      visit(pixel_at(image.data,
                     channel * image.channel_stride + row * image.row_stride +
                         column * image.column_stride,
                     image.pixel));
}

struct Place {
  int32_t bin;
  int64_t rank;  // within the bin
};

// Where the number of a rank was counted.
PIXELS_FUNCTION Place place_of(const uint32_t* fine, const uint32_t* coarse, int32_t parts,
                               int64_t rank) {
  int32_t part = 0;
  while (part < parts - 1 && coarse[part] <= rank) rank -= coarse[part++];
  int32_t bin = part * kCoarse;
  const int32_t last = bin + kCoarse - 1;
  while (bin < last && fine[bin] <= rank) rank -= fine[bin++];
  return {bin, rank};
}

// The last of the six threads makes the window between two percentiles, each between two of the values
// found, or between the least and the largest (the last two) where they are the same. As
// Pixels.percentiles and window_gain have it.
PIXELS_FUNCTION void conclude(Found* found, double low_share, double high_share) {
  __threadfence();
  if (atomicAdd(&found->done, 1u) < kRanks - 1) return;
  __threadfence();
  const volatile double* at = found->at;
  double low = between(at[0], at[1], low_share), high = between(at[2], at[3], high_share);
  if (low == high) {
    low = at[4];
    high = at[5];
  }
  const double steepest = 3.4028234663852886e38, gain = high > low ? 1.0 / (high - low) : 0.0;
  found->window = Window{static_cast<float>(low),
                         static_cast<float>(gain < steepest ? gain : steepest)};
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

// Grid: runs of kRun columns, rows of an image. `counters` count whole numbers, and of floats the upper
// half of their bits in order.
extern "C" __global__ void recallseg_histogram(const void* image, int32_t pixel, int32_t channels,
                                               int64_t row_stride, int64_t column_stride,
                                               int64_t channel_stride, int32_t rows,
                                               int32_t columns, uint32_t* counters, Found* found) {
  const Source source{image,         pixel,          channels, row_stride,
                      column_stride, channel_stride, rows,     columns};
  Counted counted(counters);
  uint32_t wrong = 0;
  each(source, [&](float value) {
    if (pixel != kFloat) {
      counted.add(static_cast<int32_t>(value) + kBelow);
      return;
    }
    wrong += (to_bits(value) & 0x7F800000u) == 0x7F800000u ? 1 : 0;
    counted.add(static_cast<int32_t>(ordered_key(value) >> 16));
  });
  counted.flush();
  if (wrong > 0) atomicAdd(&found->wrong, wrong);
}

// The same for the lower half of floats' bits, of those whose upper half is that of a rank. Ranks that
// share one share the counters of the first of them.
extern "C" __global__ void recallseg_refine(const void* image, int32_t pixel, int32_t channels,
                                            int64_t row_stride, int64_t column_stride,
                                            int64_t channel_stride, int32_t rows, int32_t columns,
                                            uint32_t* counters, const Found* found) {
  const Source source{image,         pixel,          channels, row_stride,
                      column_stride, channel_stride, rows,     columns};
  Counted counted(counters);
  each(source, [&](float value) {
    const uint32_t key = ordered_key(value);
    int32_t rank = 0;
    while (rank < kRanks && found->bin[rank] != static_cast<int32_t>(key >> 16)) ++rank;
    counted.add(rank < kRanks ? rank * kHalf + static_cast<int32_t>(key & 0xFFFFu) : -1);
  });
  counted.flush();
}

// Grid: sums of kCoarse counters.
extern "C" __global__ void recallseg_coarse(const uint32_t* counters, int64_t parts,
                                            uint32_t* coarse) {
  const int64_t part = thread_x();
  if (part >= parts) return;
  uint32_t sum = 0;
  for (int32_t i = 0; i < kCoarse; ++i) sum += counters[part * kCoarse + i];
  coarse[part] = sum;
}

// Six threads: the values that would stand at six ranks if all pixels were sorted; of floats the upper
// half of their bits, and the ranks among those that share it.
extern "C" __global__ void recallseg_rank(const uint32_t* fine, const uint32_t* coarse,
                                          int32_t parts, int32_t pixel, int64_t rank0,
                                          int64_t rank1, int64_t rank2, int64_t rank3,
                                          int64_t rank4, int64_t rank5, double low_share,
                                          double high_share, Found* found) {
  const int64_t ranks[kRanks] = {rank0, rank1, rank2, rank3, rank4, rank5};
  const int64_t i = thread_x();
  if (i >= kRanks) return;
  const Place place = place_of(fine, coarse, parts, ranks[i]);
  if (pixel == kFloat) {
    found->bin[i] = place.bin;
    found->rest[i] = place.rank;
    return;
  }
  found->at[i] = place.bin - kBelow;
  conclude(found, low_share, high_share);
}

// Six threads: the same for the lower half of floats' bits.
extern "C" __global__ void recallseg_rank_low(const uint32_t* fine, const uint32_t* coarse,
                                              double low_share, double high_share, Found* found) {
  const int64_t i = thread_x();
  if (i >= kRanks) return;
  int32_t first = 0;
  while (found->bin[first] != found->bin[i]) ++first;
  const int32_t parts = kHalf / kCoarse;
  const Place place =
      place_of(fine + first * kHalf, coarse + first * parts, parts, found->rest[i]);
  const uint32_t key = static_cast<uint32_t>(found->bin[i]) << 16 | static_cast<uint32_t>(place.bin);
  found->at[i] = from_ordered_key(key);
  conclude(found, low_share, high_share);
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

// Grid: columns, rows of the outputs. A structure is present if its object score is above 0. IoU
// estimates and scores are copied to `numbers`, beside the masks, so that one copy fetches all.
extern "C" __global__ void recallseg_finish(
    const float* logits, const float* object_scores, const float* iou, float* numbers, int32_t n,
    int32_t rows, int32_t columns, int32_t rule, const Span* y, const Span* x, int32_t out_rows,
    int32_t out_columns, uint8_t* labels, int64_t label_row, int64_t label_column, uint8_t* masks,
    int64_t mask_plane, int64_t mask_row, int64_t mask_column) {
  const int64_t column = thread_x(), row = thread_y();
  if (column >= out_columns || row >= out_rows) return;
  if (column == 0 && row == 0)
    for (int32_t structure = 0; structure < n; ++structure) {
      numbers[structure] = iou[structure];
      numbers[n + structure] = object_scores[structure];
    }
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

// Grid: fours of a memory's numbers, memories. `places` are records of the bank; where one is below 0
// nothing is written.
extern "C" __global__ void recallseg_gather_half(const unsigned char* bank, int64_t record_bytes,
                                                 const int64_t* places, int64_t fours,
                                                 int32_t half, void* out) {
  const int64_t four = thread_x(), memory = thread_y();
  if (four >= fours || places[memory] < 0) return;
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
  if (four >= fours || places[memory] < 0) return;
  const auto* record = reinterpret_cast<const Bytes*>(bank + places[memory] * record_bytes);
  const Bytes bytes = record[four];
  const float scale = scales[places[memory] * (4 * fours / width) + 4 * four / width];
  Floats values;
  for (int i = 0; i < 4; ++i) values.of[i] = static_cast<float>(bytes.of[i]) * scale;
  store_four(out, memory * fours + four, values, half);
}

// The same for float32, as it is.
extern "C" __global__ void recallseg_gather_float(const unsigned char* bank, int64_t record_bytes,
                                                  const int64_t* places, int64_t fours, Floats* out) {
  const int64_t four = thread_x(), memory = thread_y();
  if (four >= fours || places[memory] < 0) return;
  const auto* record = reinterpret_cast<const Floats*>(bank + places[memory] * record_bytes);
  out[memory * fours + four] = record[four];
}
