// What one pixel or one number becomes: the single source of truth, compiled for the CPU at several
// levels of vector units, for CUDA, and for the CPU once more as an emulated GPU by the tests.
//
// All of them give the same bits: no function here may be contracted into fused multiply-adds
// (-ffp-contract=off, -fmad=false), and every sum is taken in the order written.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

// Internal to each translation unit: a copy compiled for newer processors must never be the one that
// the linker keeps for all.
#if defined(__CUDACC__)
#define PIXELS_MEMBER __host__ __device__ __forceinline__
#else
#define PIXELS_MEMBER inline __attribute__((always_inline))
#endif
#define PIXELS_FUNCTION static PIXELS_MEMBER

namespace pixels {

// Pixel centres lie at half-integer coordinates. These are OpenCV's rules (resize with INTER_LINEAR
// and INTER_AREA), rounding of the weights included.
enum Rule : int32_t {
  kLinear = 0,  // no axis shrinks: bilinear
  kArea = 1,    // both axes shrink, or one stays: mean over the area of a target pixel
  kCell = 2,    // one axis shrinks, the other grows: bilinear between cells
};

// One axis of a resize.
struct Axis {
  int32_t source;
  int32_t target;
  int32_t rule;
};

// The source pixels that one target pixel is made of: `count` of them from `first` on. The first
// weighs `head`, the last (of two or more) `tail`, those between `body`.
struct Span {
  int32_t first;
  int32_t count;
  float head;
  float body;
  float tail;
};

// How raw intensities become 0..1: clip((value - low) * gain).
struct Window {
  float low;
  float gain;
};

PIXELS_FUNCTION Rule rule_of(int32_t rows, int32_t columns, int32_t to_rows, int32_t to_columns) {
  if (to_rows >= rows && to_columns >= columns) return kLinear;
  return to_rows <= rows && to_columns <= columns ? kArea : kCell;
}

PIXELS_FUNCTION float weight(const Span& span, int32_t tap) {
  return tap == 0 ? span.head : tap == span.count - 1 ? span.tail : span.body;
}

PIXELS_FUNCTION Span area_span(double scale, int32_t source, int32_t i) {
  const double negligible = 1e-3;  // a part of a pixel below this is left out
  const double from = i * scale, to = from + scale;
  const double cell = scale < source - from ? scale : source - from;
  int32_t last = static_cast<int32_t>(floor(to));
  last = last < source - 1 ? last : source - 1;
  int32_t first = static_cast<int32_t>(ceil(from));
  first = first < last ? first : last;
  const float whole = static_cast<float>(1.0 / cell);
  Span span{first, last - first, whole, whole, whole};
  if (first - from > negligible) {
    span.first -= 1;
    span.count += 1;
    span.head = static_cast<float>((first - from) / cell);
  }
  if (to - last > negligible) {
    double part = to - last < 1.0 ? to - last : 1.0;
    part = part < cell ? part : cell;
    span.count += 1;
    span.tail = static_cast<float>(part / cell);
    if (span.count == 1) span.head = span.tail;
  }
  return span;
}

PIXELS_FUNCTION Span span_of(const Axis& axis, int32_t i) {
  const double inverse = static_cast<double>(axis.target) / axis.source;
  const double scale = 1.0 / inverse;
  if (axis.rule == kArea) return area_span(scale, axis.source, i);
  int32_t first;
  float fraction;
  if (axis.rule == kLinear) {
    const double centre = (i + 0.5) * scale - 0.5;
    first = static_cast<int32_t>(floor(centre));
    fraction = static_cast<float>(centre - first);
  } else {
    first = static_cast<int32_t>(floor(i * scale));
    fraction = static_cast<float>((i + 1) - (first + 1) * inverse);
    fraction = fraction <= 0.0f ? 0.0f : fraction - floorf(fraction);
  }
  if (first < 0) return Span{0, 1, 1.0f, 0.0f, 0.0f};
  if (first >= axis.source - 1) return Span{axis.source - 1, 1, 1.0f, 0.0f, 0.0f};
  return Span{first, 2, 1.0f - fraction, 0.0f, fraction};
}

// The value of one target pixel; `load(row, column)` gives source pixels. Areas are summed down the
// columns first and interpolation runs along the rows first: whichever a row-wise pass does least of.
template <class Load>
PIXELS_FUNCTION float sample(int32_t rule, const Span& y, const Span& x, const Load& load) {
  float value = 0.0f;
  if (rule == kArea) {
    for (int32_t i = 0; i < x.count; ++i) {
      float column = 0.0f;
      for (int32_t j = 0; j < y.count; ++j) column += weight(y, j) * load(y.first + j, x.first + i);
      value += weight(x, i) * column;
    }
    return value;
  }
  for (int32_t j = 0; j < y.count; ++j) {
    float row = 0.0f;
    for (int32_t i = 0; i < x.count; ++i) row += weight(x, i) * load(y.first + j, x.first + i);
    value += weight(y, j) * row;
  }
  return value;
}

PIXELS_FUNCTION float windowed(float value, Window window) {
  const float scaled = (value - window.low) * window.gain;
  return scaled < 0.0f ? 0.0f : scaled > 1.0f ? 1.0f : scaled;
}

PIXELS_FUNCTION float normalised(float value, float mean, float gain) {
  return (value - mean) * gain;
}

// Whether bits of a T lie at any address: strided data need not be aligned.
template <class T>
PIXELS_FUNCTION T load_at(const void* base, int64_t offset) {
  T value;
  memcpy(&value, static_cast<const unsigned char*>(base) + offset, sizeof value);
  return value;
}

PIXELS_FUNCTION float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

PIXELS_FUNCTION uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Bits of an fp16 to fp32, exactly, if finite: moved to their places they give the value times
// 2^-112, the difference of the exponents' biases; subnormal numbers come out right too.
PIXELS_FUNCTION float widened(uint16_t half) {
  const int32_t moved = static_cast<int32_t>(static_cast<int16_t>(half)) * 8192;
  return from_bits(static_cast<uint32_t>(moved) & 0x8FFFE000u) * 0x1p112f;
}

// fp32 to the bits of the nearest fp16, ties to even; too large becomes infinite.
PIXELS_FUNCTION uint16_t narrowed(float value) {
  const uint32_t bits = to_bits(value), magnitude = bits & 0x7FFFFFFFu;
  const uint32_t normal = (magnitude - 0x37FFF001u + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 lets the hardware round a subnormal result into the low bits.
  const uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - 0x3F000000u;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477FF000u ? (magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u) : half;
  return static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
}

// A key in the order of the numbers, -0 before 0.
PIXELS_FUNCTION uint32_t ordered_key(float value) {
  const uint32_t bits = to_bits(value);
  return bits ^ (bits >> 31 ? 0xFFFFFFFFu : 0x80000000u);
}

PIXELS_FUNCTION float from_ordered_key(uint32_t key) {
  return from_bits(key ^ (key >> 31 ? 0x80000000u : 0xFFFFFFFFu));
}

}  // namespace pixels
