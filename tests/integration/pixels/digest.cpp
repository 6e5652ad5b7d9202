// Runs every pixel kernel over many sizes and prints a digest of all results: the same on every
// processor, at every level of vector units and for any number of threads.
#include <cstdio>
#include <vector>

#include "image.h"

namespace {

using namespace pixels;

uint64_t digest = 14695981039346656037u;  // FNV-1a

void add(const void* data, size_t size) {
  for (size_t i = 0; i < size; ++i)
    digest = (digest ^ static_cast<const unsigned char*>(data)[i]) * 1099511628211u;
}

uint32_t state = 1;

uint32_t next() {  // Numerical Recipes' generator
  state = state * 1664525u + 1013904223u;
  return state >> 8;
}

void prepare_all(int32_t rows, int32_t columns, int32_t side, int threads) {
  std::vector<uint16_t> image(static_cast<size_t>(rows * columns * 3));
  for (uint16_t& value : image) value = static_cast<uint16_t>(next());
  const auto item = static_cast<int64_t>(sizeof(uint16_t));
  const Image colour{image.data(), Pixel::u16, rows, columns, 3, columns * 3 * item, 3 * item, item};
  // Bottom-up and grey, every third value.
  const Image grey{image.data() + (rows - 1) * columns * 3, Pixel::i16, rows, columns, 1,
                   -columns * 3 * item, 3 * item, 0};
  const size_t count = static_cast<size_t>(3 * side * side);
  std::vector<float> out(count);
  std::vector<uint16_t> half(count);
  for (const Image& which : {colour, grey}) {
    const Window window{-20000.5f, 1.0f / 70001.0f};
    prepare(which, window, {out.data(), false, side, {0.4f, 0.5f, 0.6f}, {4.0f, 4.5f, 5.0f}}, threads);
    prepare(which, window, {half.data(), true, side, {0.4f, 0.5f, 0.6f}, {4.0f, 4.5f, 5.0f}}, threads);
    add(out.data(), count * sizeof(float));
    add(half.data(), count * sizeof(uint16_t));
    const int64_t last = int64_t{which.rows} * which.columns * which.channels - 1;
    for (const double value : order_statistics(which, {0, last / 3, last / 2, last}))
      add(&value, sizeof value);
  }
  const Image floats{out.data(), Pixel::f32, side, side, 1, side * 4, 4, 0};
  for (const double value : order_statistics(floats, {0, side / 2, int64_t{side} * side - 1}))
    add(&value, sizeof value);
}

void finish_all(int32_t rows, int32_t columns, int32_t to_rows, int32_t to_columns, int threads) {
  constexpr int32_t n = 4;
  std::vector<float> logits(static_cast<size_t>(n * rows * columns));
  for (float& value : logits) value = static_cast<float>(next()) / (1 << 20) - 8.0f;
  const bool present[n] = {true, false, true, true};
  const size_t plane = static_cast<size_t>(to_rows * to_columns);
  std::vector<uint8_t> labels(plane), masks(plane * n);
  // Labels column by column, masks upside down.
  const Output out{to_rows, to_columns, labels.data(), 1, to_rows,
                   masks.data() + (to_rows - 1) * to_columns, static_cast<int64_t>(plane),
                   -to_columns, 1};
  finish(logits.data(), n, rows, columns, present, out, threads);
  add(labels.data(), labels.size());
  add(masks.data(), masks.size());
}

void gather_all() {
  constexpr int64_t tokens = 37, width = 64, count = tokens * width;
  std::vector<uint16_t> halves(count);
  std::vector<int8_t> bytes(count);
  std::vector<float> scales(tokens), out(count);
  for (uint16_t& value : halves) value = static_cast<uint16_t>(next() & 0xFBFFu);  // finite
  for (int8_t& value : bytes) value = static_cast<int8_t>(next());
  for (float& value : scales) value = static_cast<float>(next()) / (1 << 24);
  std::vector<uint16_t> narrow(count);
  for (const bool streamed : {false, true}) {
    gather_half(halves.data(), count, out.data(), false, streamed);
    add(out.data(), count * sizeof(float));
  }
  gather_int8(bytes.data(), scales.data(), tokens, width, out.data(), false);
  gather_int8(bytes.data(), scales.data(), tokens, width, narrow.data(), true);
  add(out.data(), count * sizeof(float));
  add(narrow.data(), count * sizeof(uint16_t));
}

uint64_t all(int threads) {
  digest = 14695981039346656037u;
  state = 1;
  const int32_t sizes[] = {1, 2, 7, 16, 33, 64, 70};
  for (const int32_t rows : sizes)
    for (const int32_t columns : sizes) {
      for (const int32_t side : {1, 8, 31, 64, 100}) prepare_all(rows, columns, side, threads);
      for (const int32_t to : {1, 9, 64, 71}) finish_all(rows, columns, to, 80 - to, threads);
    }
  prepare_all(96, 80, 850, threads);  // streamed past the caches
  gather_all();
  return digest;
}

}  // namespace

int main() {
  const Levels known = levels();
  uint64_t expected = 0;
  for (int i = 0; i < known.count; ++i) {
    choose(*known.first[i]);
    for (const int threads : {1, 3}) {
      const uint64_t found = all(threads);
      if (expected == 0) expected = found;
      if (found != expected) {
        std::fprintf(stderr, "%s with %d threads gives other results than %s\n",
                     known.first[i]->level, threads, known.first[0]->level);
        return 1;
      }
    }
  }
  std::printf("%016llx\n", static_cast<unsigned long long>(expected));
  return 0;
}
