// What is done to whole rows, compiled once for each level of vector units.
#pragma once

#include "core.h"

namespace pixels {

enum class Pixel : int { u8 = 0, i16 = 1, u16 = 2, f32 = 3 };

// Two-tap interpolation along a row, as separate arrays, which vectorises.
struct Taps {
  bool grows;       // no target pixel skips a source pixel
  int32_t columns;  // of the source
  const int32_t* first;
  const int32_t* second;
  const float* head;
  const float* tail;
};

// A row between two: head * above + tail * below.
struct Mix {
  const float* above;
  float head;
  const float* below;
  float tail;
};

// Stores are `streamed` past the caches where the result is larger than they are.
struct Rows {
  const char* level;
  // Raw pixels, `stride` bytes apart, to 0..1. By Pixel.
  void (*window[4])(const void* pixels, int64_t stride, int64_t n, Window window, float* out);
  // out[i] = head[i] * row[first[i]] + tail[i] * row[second[i]]
  void (*interpolate)(const float* row, const Taps& taps, int64_t n, float* out);
  // out[i] = sum of the row over a span
  void (*collect)(const float* row, const Span* spans, int64_t n, float* out);
  // sum[i] += weight * row[i]
  void (*add)(const float* row, float weight, int64_t n, float* sum);
  void (*blend)(const Mix& mix, int64_t n, float* out);
  void (*normalise)(const float* row, float mean, float gain, int64_t n, float* out,
                    bool streamed);
  void (*normalise_half)(const float* row, float mean, float gain, int64_t n, uint16_t* out,
                         bool streamed);
  // mask[i] = value > 0; where value > highest[i], it takes the place and labels[i] = label
  void (*vote)(const Mix& mix, uint8_t label, int64_t n, float* highest, uint8_t* mask,
               uint8_t* labels);
  void (*widen)(const uint16_t* halves, int64_t n, float* out, bool streamed);
  void (*decode)(const int8_t* values, float scale, int64_t n, float* out);
  void (*decode_half)(const int8_t* values, float scale, int64_t n, uint16_t* out);
  // Makes streamed stores seen by other threads.
  void (*settle)();
};

// The best that this processor can run, unless a lower level was chosen.
const Rows& rows();

// Every level that this processor can run, best first.
struct Levels {
  const Rows* const* first;
  int count;
};
Levels levels();

// For tests: no other call may be in flight.
void choose(const Rows& level);

}  // namespace pixels
