// Compiled several times, each with PIXELS_LEVEL and the matching -march: no templates of the
// standard library here, whose code the linker would share between levels.
#include "rows.h"

#include "lanes.h"

namespace pixels {
namespace {

template <class T>
void window_row(const void* pixels, int64_t stride, int64_t n, Window window, float* out) {
  if (stride == sizeof(T)) {
    for (int64_t i = 0; i < n; ++i)
      out[i] = windowed(static_cast<float>(load_at<T>(pixels, i * int64_t{sizeof(T)})), window);
    return;
  }
  for (int64_t i = 0; i < n; ++i)
    out[i] = windowed(static_cast<float>(load_at<T>(pixels, i * stride)), window);
}

void interpolate(const float* row, const Taps& taps, int64_t n, float* __restrict out) {
  int64_t i = 0;
#if PIXELS_LANES
  // Neighbours on a row that does not shrink come out of two registers.
  if (taps.grows)
    for (; i + kLanes <= n && taps.first[i] + 1 + kLanes <= taps.columns; i += kLanes) {
      const float* from = row + taps.first[i];
      const Floats heads = pick(load(from), taps.first + i, taps.first[i]);
      const Floats tails = pick(load(from + 1), taps.first + i, taps.first[i]);
      store(out + i, load(taps.head + i) * heads + load(taps.tail + i) * tails);
    }
#endif
  for (; i < n; ++i)
    out[i] = taps.head[i] * row[taps.first[i]] + taps.tail[i] * row[taps.second[i]];
}

void collect(const float* row, const Span* spans, int64_t n, float* __restrict out) {
  for (int64_t i = 0; i < n; ++i) {
    const Span span = spans[i];
    const float* pixels = row + span.first;
    float sum = span.head * pixels[0];
    for (int32_t j = 1; j < span.count - 1; ++j) sum += span.body * pixels[j];
    if (span.count > 1) sum += span.tail * pixels[span.count - 1];
    out[i] = sum;
  }
}

void add(const float* row, float weight, int64_t n, float* __restrict sum) {
  for (int64_t i = 0; i < n; ++i) sum[i] += weight * row[i];
}

void blend(const Mix& mix, int64_t n, float* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = mix.head * mix.above[i] + mix.tail * mix.below[i];
}

void normalise(const float* row, float mean, float gain, int64_t n, float* __restrict out,
               bool streamed) {
  int64_t i = 0;
#if PIXELS_LANES
  if (streamed) {
    constexpr uintptr_t step = sizeof(Floats);
    for (; i < n && reinterpret_cast<uintptr_t>(out + i) % step; ++i)
      out[i] = normalised(row[i], mean, gain);
    for (; i + kLanes <= n; i += kLanes) stream(out + i, (load(row + i) - mean) * gain);
  }
#else
  static_cast<void>(streamed);
#endif
  for (; i < n; ++i) out[i] = normalised(row[i], mean, gain);
}

void normalise_half(const float* row, float mean, float gain, int64_t n,
                    uint16_t* __restrict out, bool streamed) {
  int64_t i = 0;
#if PIXELS_LANES
  if (streamed) {
    constexpr uintptr_t step = sizeof(Floats) / 2;
    for (; i < n && reinterpret_cast<uintptr_t>(out + i) % step; ++i)
      out[i] = narrowed(normalised(row[i], mean, gain));
    for (; i + kLanes <= n; i += kLanes) stream_halves(out + i, (load(row + i) - mean) * gain);
  }
  for (; i + kLanes <= n; i += kLanes) store_halves(out + i, (load(row + i) - mean) * gain);
#else
  static_cast<void>(streamed);
#endif
  for (; i < n; ++i) out[i] = narrowed(normalised(row[i], mean, gain));
}

void vote(const Mix& mix, uint8_t label, int64_t n, float* __restrict highest,
          uint8_t* __restrict mask, uint8_t* __restrict labels) {
  for (int64_t i = 0; i < n; ++i) {
    const float value = mix.head * mix.above[i] + mix.tail * mix.below[i];
    const uint8_t wins = value > highest[i] ? 0xFF : 0;
    mask[i] = value > 0.0f ? 1 : 0;
    highest[i] = value > highest[i] ? value : highest[i];
    labels[i] = static_cast<uint8_t>((label & wins) | (labels[i] & ~wins));
  }
}

void widen(const uint16_t* halves, int64_t n, float* __restrict out, bool streamed) {
  int64_t i = 0;
#if PIXELS_LANES
  if (streamed) {
    constexpr uintptr_t step = sizeof(Floats);
    for (; i < n && reinterpret_cast<uintptr_t>(out + i) % step; ++i) out[i] = widened(halves[i]);
    for (; i + kLanes <= n; i += kLanes) stream(out + i, load_halves(halves + i));
  }
#else
  static_cast<void>(streamed);
#endif
  for (; i < n; ++i) out[i] = widened(halves[i]);
}

void settle() {
#if PIXELS_LANES
  finish_streams();
#endif
}

void decode(const int8_t* values, float scale, int64_t n, float* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(values[i]) * scale;
}

void decode_half(const int8_t* values, float scale, int64_t n, uint16_t* __restrict out) {
  for (int64_t i = 0; i < n; ++i) out[i] = narrowed(static_cast<float>(values[i]) * scale);
}

}  // namespace

#define PIXELS_TEXT_(name) #name
#define PIXELS_TEXT(name) PIXELS_TEXT_(name)
#define PIXELS_ROWS_(level) rows_##level
#define PIXELS_ROWS(level) PIXELS_ROWS_(level)

extern const Rows PIXELS_ROWS(PIXELS_LEVEL);
const Rows PIXELS_ROWS(PIXELS_LEVEL) = {
    PIXELS_TEXT(PIXELS_LEVEL),
    {window_row<uint8_t>, window_row<int16_t>, window_row<uint16_t>, window_row<float>},
    interpolate, collect, add, blend, normalise, normalise_half, vote, widen, decode, decode_half, settle,
};

}  // namespace pixels
