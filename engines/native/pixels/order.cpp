// Order statistics by counting: exact, in time linear in the number of pixels.
#include <algorithm>
#include <limits>
#include <stdexcept>

#include "image.h"

namespace pixels {
namespace {

using Counts = std::vector<uint32_t>;
constexpr size_t kBins = 1 << 16;

// Call visit(value) for every pixel.
template <class T, class Visit>
void each(const Image& image, const Visit& visit) {
  const auto* base = static_cast<const unsigned char*>(image.data);
  for (int32_t row = 0; row < image.rows; ++row)
    for (int32_t channel = 0; channel < image.channels; ++channel) {
      const auto* line = base + row * image.row_stride + channel * image.channel_stride;
      for (int32_t column = 0; column < image.columns; ++column)
        visit(load_at<T>(line, column * image.column_stride));
    }
}

struct Place {
  size_t bin;
  int64_t rank;  // within the bin
};

Place find(const Counts& counts, int64_t rank) {
  size_t bin = 0;
  while (rank >= counts[bin]) rank -= counts[bin++];
  return {bin, rank};
}

// Integers of up to 16 bits have one bin each; `origin` is the value of the first.
template <class T>
std::vector<double> of_integers(const Image& image, const std::vector<int64_t>& ranks) {
  constexpr int origin = std::numeric_limits<T>::min();
  // A ground of one value would wait for its own counter at every pixel: neighbours use two.
  constexpr size_t bins = size_t{1} << (8 * sizeof(T));
  Counts counts(2 * bins);
  size_t turn = 0;
  each<T>(image, [&](T value) {
    ++counts[turn + static_cast<size_t>(value - origin)];
    turn ^= bins;
  });
  for (size_t bin = 0; bin < bins; ++bin) counts[bin] += counts[bins + bin];
  std::vector<double> values;
  for (const int64_t rank : ranks)
    values.push_back(static_cast<double>(find(counts, rank).bin) + origin);
  return values;
}

// Numbers are counted by the upper half of their ordered bits, then those of a wanted bin by the
// lower.
std::vector<double> of_floats(const Image& image, const std::vector<int64_t>& ranks) {
  Counts upper(kBins), lower(kBins);
  bool finite = true;
  each<float>(image, [&](float value) {
    finite &= (to_bits(value) & 0x7F800000u) != 0x7F800000u;
    ++upper[ordered_key(value) >> 16];
  });
  if (!finite)
    return std::vector<double>(ranks.size(), std::numeric_limits<double>::quiet_NaN());
  std::vector<double> values;
  size_t counted = kBins;  // the bin that `lower` holds
  for (const int64_t rank : ranks) {
    const Place place = find(upper, rank);
    if (place.bin != counted) {
      counted = place.bin;
      std::fill(lower.begin(), lower.end(), 0);
      each<float>(image, [&](float value) {
        const uint32_t key = ordered_key(value);
        if (key >> 16 == counted) ++lower[key & 0xFFFFu];
      });
    }
    const size_t low = find(lower, place.rank).bin;
    values.push_back(from_ordered_key(static_cast<uint32_t>(counted << 16 | low)));
  }
  return values;
}

}  // namespace

std::vector<double> order_statistics(const Image& image, const std::vector<int64_t>& ranks) {
  switch (image.pixel) {
    case Pixel::u8: return of_integers<uint8_t>(image, ranks);
    case Pixel::i16: return of_integers<int16_t>(image, ranks);
    case Pixel::u16: return of_integers<uint16_t>(image, ranks);
    case Pixel::f32: return of_floats(image, ranks);
  }
  throw std::invalid_argument("no such pixel type");
}

}  // namespace pixels
