// Compiled several times, each with OPERATORS_LEVEL and the matching -march: no templates of the
// standard library here, whose code the linker would share between levels.
#include "head_kernels.h"

#include "products.h"

namespace operators {
namespace {

constexpr int kReach = 2;  // of a filter
constexpr float kTiny = 1e-8f;

// Taps of a filter of scale 1, exact for polynomials of the second degree; from -kReach to kReach.
struct Taps {
  float smooth[2 * kReach + 1], first[2 * kReach + 1], second[2 * kReach + 1];
};
constexpr Taps kTaps = {
    {0.0544886845f, 0.244201342f, 0.402619947f, 0.244201342f, 0.0544886845f},
    {-0.117901044f, -0.264197911f, 0.0f, 0.264197911f, 0.117901044f},
    {0.244812718f, 0.0207491266f, -0.53112369f, 0.0207491266f, 0.244812718f}};

// One scale of a call's planes: grey, two colours, and what filters made of grey.
struct Plane {
  int64_t height, width;
  float* first;
  float* of(int64_t channel) const { return first + channel * height * width; }
};

INLINED Plane plane_of(const HeadCall& call, int scale) {
  const int64_t height = call.bands() * kBand, width = call.padded();
  float* first = call.planes;
  for (int s = 0; s < scale; ++s) first += kPlanes * (height >> s) * (width >> s);
  return {height >> scale, width >> scale, first};
}

INLINED int64_t limited(int64_t at, int64_t end) { return at < 0 ? 0 : at < end ? at : end - 1; }

void reduce(const HeadCall& call, int64_t band) {
  const Plane finest = plane_of(call, 0);
  const int64_t size = call.height * call.width;
  for (int64_t y = band * kBand; y < (band + 1) * kBand; ++y) {
    const float* red = call.image + limited(y, call.height) * call.width;
    const float *green = red + size, *blue = green + size;
    float* grey = finest.of(0) + y * finest.width;
    float* apart = finest.of(1) + y * finest.width;
    float* yellow = finest.of(2) + y * finest.width;
    for (int64_t x = 0; x < call.width; ++x) {
      grey[x] = (red[x] + green[x] + blue[x]) * (1.0f / 3.0f);
      apart[x] = red[x] - green[x];
      yellow[x] = 0.5f * red[x] + 0.5f * green[x] - blue[x];
    }
    for (int64_t x = call.width; x < finest.width; ++x) {
      grey[x] = grey[call.width - 1];
      apart[x] = apart[call.width - 1];
      yellow[x] = yellow[call.width - 1];
    }
  }
  for (int scale = 1; scale < kScales; ++scale) {
    const Plane finer = plane_of(call, scale - 1), coarser = plane_of(call, scale);
    const int channels = scale < kColourScales ? 3 : 1;
    const int64_t rows = kBand >> scale;
    for (int channel = 0; channel < channels; ++channel)
      for (int64_t y = band * rows; y < (band + 1) * rows; ++y) {
        const float* above = finer.of(channel) + 2 * y * finer.width;
        const float* below = above + finer.width;
        float* to = coarser.of(channel) + y * coarser.width;
        for (int64_t x = 0; x < coarser.width; ++x)
          to[x] = (above[2 * x] + above[2 * x + 1] + below[2 * x] + below[2 * x + 1]) * 0.25f;
      }
  }
}

// Filters of row y of a plane's grey values, to four rows; `rows` has room for three.
INLINED void filter_row(const Plane& plane, int64_t y, float* rows, float* const (&to)[kFour]) {
  const int64_t width = plane.width;
  const float* lines[2 * kReach + 1];
  for (int i = 0; i <= 2 * kReach; ++i)
    lines[i] = plane.of(0) + limited(y + i - kReach, plane.height) * width;
  float *smooth = rows, *first = rows + width, *second = rows + 2 * width;
  for (int64_t x = 0; x < width; ++x) {
    float sums[3] = {};
#pragma GCC unroll 8
    for (int i = 0; i <= 2 * kReach; ++i) {
      sums[0] += kTaps.smooth[i] * lines[i][x];
      sums[1] += kTaps.first[i] * lines[i][x];
      sums[2] += kTaps.second[i] * lines[i][x];
    }
    smooth[x] = sums[0];
    first[x] = sums[1];
    second[x] = sums[2];
  }
  const auto pixel = [&](int64_t x, auto place) {
    float blurred = 0, dx = 0, dy = 0, dxx = 0, dyy = 0, dxy = 0;
#pragma GCC unroll 8
    for (int i = 0; i <= 2 * kReach; ++i) {
      const int64_t at = place(x + i - kReach);
      blurred += kTaps.smooth[i] * smooth[at];
      dx += kTaps.first[i] * smooth[at];
      dy += kTaps.smooth[i] * first[at];
      dxx += kTaps.second[i] * smooth[at];
      dyy += kTaps.smooth[i] * second[at];
      dxy += kTaps.first[i] * first[at];
    }
    const float mean = (dxx + dyy) * 0.5f, off = dxx - mean;
    to[0][x] = blurred;
    to[1][x] = __builtin_sqrtf(dx * dx + dy * dy + kTiny);
    to[2][x] = mean;
    to[3][x] = __builtin_sqrtf(off * off + dxy * dxy + kTiny);
  };
  const auto near_edge = [&](int64_t at) { return limited(at, width); };
  const int64_t from = kReach < width ? kReach : width;
  const int64_t end = width - kReach > from ? width - kReach : from;
  for (int64_t x = 0; x < from; ++x) pixel(x, near_edge);
  for (int64_t x = from; x < end; ++x) pixel(x, [](int64_t at) { return at; });
  for (int64_t x = end; x < width; ++x) pixel(x, near_edge);
}

void filter(const HeadCall& call, int64_t band, float* rows) {
  for (int scale = 1; scale < kScales; ++scale) {
    const Plane plane = plane_of(call, scale);
    const int64_t count = kBand >> scale;
    for (int64_t y = band * count; y < (band + 1) * count; ++y) {
      float* const to[kFour] = {
          plane.of(3) + y * plane.width, plane.of(4) + y * plane.width,
          plane.of(5) + y * plane.width, plane.of(6) + y * plane.width};
      filter_row(plane, y, rows, to);
    }
  }
}

// Row y of a finer grid, `factor` times as fine: linear between the middles of coarse pixels.
template <int factor>
INLINED void grow_row(const Plane& plane, int64_t channel, int64_t y, float* row, float* to) {
  const float where = (static_cast<float>(y) + 0.5f) / factor - 0.5f;
  const int64_t above = where < 0.0f ? -1 : static_cast<int64_t>(where);
  const float down = where - static_cast<float>(above);
  const float* a = plane.of(channel) + limited(above, plane.height) * plane.width;
  const float* b = plane.of(channel) + limited(above + 1, plane.height) * plane.width;
  const int64_t width = plane.width;
  for (int64_t x = 0; x < width; ++x) row[x] = a[x] + down * (b[x] - a[x]);
  float shares[factor];
#pragma GCC unroll 16
  for (int j = 0; j < factor; ++j)
    shares[j] = (static_cast<float>(j) + 0.5f) / factor + (2 * j < factor ? 0.5f : -0.5f);
  for (int64_t x = 0; x < width; ++x) {
    const float here = row[x], left = row[x > 0 ? x - 1 : 0];
    const float right = row[x + 1 < width ? x + 1 : x];
#pragma GCC unroll 16
    for (int j = 0; j < factor / 2; ++j) to[x * factor + j] = left + shares[j] * (here - left);
#pragma GCC unroll 16
    for (int j = factor / 2; j < factor; ++j)
      to[x * factor + j] = here + shares[j] * (right - here);
  }
}

INLINED void grow(const Plane& plane, int scale, int64_t channel, int64_t y, float* row, float* to) {
  switch (scale) {
    case 1: return grow_row<2>(plane, channel, y, row, to);
    case 2: return grow_row<4>(plane, channel, y, row, to);
    case 3: return grow_row<8>(plane, channel, y, row, to);
    default: return grow_row<16>(plane, channel, y, row, to);
  }
}

template <int columns, bool positive>
INLINED void layer_columns(const float* weights, const float* biases, int64_t inputs, int64_t outputs,
                           const float* from, float* to, int64_t width, int64_t x) {
  for (int64_t unit = 0; unit < outputs; unit += kRows) {
    const float* rows[kRows];
    point(rows, weights, inputs, unit, outputs);
    Floats sums[kRows][columns];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Floats bias = all(biases[unit + r < outputs ? unit + r : outputs - 1]);
#pragma GCC unroll 8
      for (int c = 0; c < columns; ++c) sums[r][c] = bias;
    }
    multiply<columns, 1>(rows, from + x, width, kStripe, inputs, sums);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < columns; ++c) {
        const Floats value = sums[r][c];
        store(to + (unit + r) * width + x + c * kLanes,
              positive ? (value < 0.0f ? all(0.0f) : value) : value);
      }
  }
}

// Units of a row: outputs [outputs, filled up to kRows][width] of inputs [inputs][width].
template <bool positive>
INLINED void layer(const float* weights, const float* biases, int64_t inputs, int64_t outputs,
                   const float* from, float* to, int64_t width) {
  int64_t x = 0;
  for (; x + kWide * kLanes <= width; x += kWide * kLanes)
    layer_columns<kWide, positive>(weights, biases, inputs, outputs, from, to, width, x);
  for (; x < width; x += kLanes)
    layer_columns<1, positive>(weights, biases, inputs, outputs, from, to, width, x);
}

void refine(const HeadCall& call, int64_t band, float* rows) {
  const int64_t width = call.padded(), size = call.height * call.width;
  float* features = rows;
  float* hidden1 = features + call.features() * width;
  float* hidden2 = hidden1 + rounded_up(call.units1, kRows) * width;
  float* own = hidden2 + rounded_up(call.units2, kRows) * width;
  float* room = own + rounded_up(call.structures, kRows) * width;
  const Plane finest = plane_of(call, 0);
  const int64_t last = (band + 1) * kBand < call.height ? (band + 1) * kBand : call.height;
  for (int64_t y = band * kBand; y < last; ++y) {
    float* next = features;
    const auto put = [&](const float* from, int64_t count) {
      for (int64_t x = 0; x < count; ++x) next[x] = from[x];
      for (int64_t x = count; x < width; ++x) next[x] = from[count - 1];
      next += width;
    };
    put(finest.of(0) + y * width, width);
    float* const four[kFour] = {next, next + width, next + 2 * width, next + 3 * width};
    filter_row(finest, y, room, four);
    next += kFour * width;
    for (int scale = 1; scale < kScales; ++scale)
      for (int64_t channel = 3; channel < kPlanes; ++channel, next += width)
        grow(plane_of(call, scale), scale, channel, y, room, next);
    for (int64_t channel = 1; channel < 3; ++channel)
      put(finest.of(channel) + y * width, width);
    for (int scale = 1; scale < kColourScales; ++scale)
      for (int64_t channel = 1; channel < 3; ++channel, next += width)
        grow(plane_of(call, scale), scale, channel, y, room, next);
    const float* logits = next;
    for (int64_t i = 0; i < call.structures; ++i)
      put(call.logits + i * size + y * call.width, call.width);
    for (int64_t i = 0; i < call.around; ++i)
      put(call.beside + i * size + y * call.width, call.width);
    layer<true>(call.weights[0], call.biases[0], call.features(), call.units1, features, hidden1,
                width);
    layer<true>(call.weights[1], call.biases[1], call.units1, call.units2, hidden1, hidden2, width);
    layer<false>(call.weights[2], call.biases[2], call.units2, call.structures, hidden2, own, width);
    for (int64_t i = 0; i < call.structures; ++i) {
      const float *from = logits + i * width, *made = own + i * width;
      float* to = call.output + i * size + y * call.width;
      const float share = call.mix[i];
      for (int64_t x = 0; x < call.width; ++x) to[x] = from[x] + (made[x] - from[x]) * share;
    }
  }
}

}  // namespace

extern const HeadKernels OF_THIS_LEVEL(head);
const HeadKernels OF_THIS_LEVEL(head) = {reduce, filter, refine};

}  // namespace operators
