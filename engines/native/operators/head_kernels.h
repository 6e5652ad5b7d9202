// The graph of a head (export/refining.py), compiled once for each level of vector units: filters of an
// image at five scales, three layers of units, and the mix, a row at a time.
#pragma once

#include "calls.h"

namespace operators {

constexpr int kScales = 5;
constexpr int kBand = 1 << (kScales - 1);  // rows and columns of a coarsest pixel
constexpr int kColourScales = 3;
constexpr int kFour = 4;  // filters at a scale: smoothed, slope, mean and half difference of curvatures

// Features of a pixel in the order of the weights: grey, kFour at each scale, two colours at each of
// kColourScales, logits, what is around.
constexpr int64_t kOwnFeatures = 1 + kFour * kScales + 2 * kColourScales;

struct HeadCall {
  int64_t height, width;          // of the image
  int64_t structures, around;     // how many planes of logits, and beside them
  int64_t units1, units2;
  const float* image;             // [3][height][width]
  const float* logits;            // [structures][height][width]
  const float* beside;            // [around][height][width]
  const float* weights[3];        // [units1][features], [units2][units1], [structures][units2]
  const float* biases[3];
  const float* mix;               // [structures]
  float* output;                  // [structures][height][width]
  float* planes;                  // plane_floats, of all bands

  int64_t features() const { return kOwnFeatures + structures + around; }
  int64_t bands() const { return (height + kBand - 1) / kBand; }
  int64_t padded() const { return (width + kBand - 1) / kBand * kBand; }
};

// Grey and two colours at every scale, and filters of all but the finest.
constexpr int64_t kPlanes = 3 + kFour;
inline int64_t plane_floats(const HeadCall& call) {
  int64_t pixels = 0;
  for (int scale = 0; scale < kScales; ++scale)
    pixels += (call.bands() * kBand >> scale) * (call.padded() >> scale);
  return kPlanes * pixels;
}
// Of a thread: a row's features, its units, and rows that filters are made of.
inline int64_t row_floats(const HeadCall& call) {
  const int64_t units = rounded_up(call.units1, kRows) + rounded_up(call.units2, kRows);
  const int64_t rows = call.features() + units + rounded_up(call.structures, kRows) + 3;
  return rows * call.padded();
}

struct HeadKernels {
  void (*reduce)(const HeadCall&, int64_t band);                // image to all scales
  void (*filter)(const HeadCall&, int64_t band, float* rows);   // at all scales but the finest
  void (*refine)(const HeadCall&, int64_t band, float* rows);
};

}  // namespace operators
