// The pixel kernels: images of any size, type and strides, resized, finished, ranked and gathered.
#include <algorithm>
#include <cstdio>

#include "bytes.h"
#include "image.h"

namespace {

using namespace pixels;

constexpr int64_t kSizes[] = {1, 2, 2, 4};

void must(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "broken: %s\n", what);
  __builtin_trap();
}

// An axis' elements `step` bytes apart, from either end: returns the stride and moves `first`.
int64_t axis(fuzz::Bytes& from, int64_t count, int64_t step, int64_t& first) {
  if (!from.once_in(3)) return step;
  first += (count - 1) * step;
  return -step;
}

struct Picture {
  std::unique_ptr<uint8_t[]> memory;
  Image image;
};

Picture picture(fuzz::Bytes& from, int64_t most) {
  Picture made{};
  const auto pixel = static_cast<Pixel>(from.take<uint8_t>() % 4);
  const int64_t size = kSizes[static_cast<int>(pixel)];
  const int64_t rows = from.between(1, most), columns = from.between(1, most);
  const int64_t channels = from.once_in(2) ? 3 : 1;
  const int64_t between = from.once_in(3) ? from.between(0, 9) : 0;  // also unaligned
  const bool turned = from.once_in(4);
  const int64_t inner = (turned ? rows : columns), outer = (turned ? columns : rows);
  const int64_t pixel_step = size * channels + between, line = inner * pixel_step + between;
  made.memory = fuzz::numbers<uint8_t>(from, static_cast<size_t>(outer * line));
  int64_t first = 0;
  const int64_t along = axis(from, inner, pixel_step, first), down = axis(from, outer, line, first);
  int64_t channel = channels == 1 ? 0 : axis(from, 3, size, first);
  made.image = {made.memory.get() + first, pixel, static_cast<int32_t>(rows),
                static_cast<int32_t>(columns), static_cast<int32_t>(channels),
                turned ? along : down, turned ? down : along, channel};
  return made;
}

void fuzz_prepare(fuzz::Bytes& from) {
  const Picture source = picture(from, 70);
  const bool half = from.once_in(2);
  const auto side = static_cast<int32_t>(from.between(1, 70));
  const size_t bytes = static_cast<size_t>(side) * static_cast<size_t>(side) * 3 * (half ? 2 : 4);
  const std::unique_ptr<uint8_t[]> out(new uint8_t[bytes]);
  prepare(source.image, {from.take<float>(), from.take<float>()},
          {out.get(), half, side, {0.4f, 0.5f, from.take<float>()}, {2.0f, 2.0f, 2.0f}},
          static_cast<int>(from.between(1, 3)));
}

void fuzz_finish(fuzz::Bytes& from) {
  const auto n = static_cast<int32_t>(from.between(0, 5));
  const auto h = static_cast<int32_t>(from.between(1, 40)), w = static_cast<int32_t>(from.between(1, 40));
  const int64_t rows = from.between(0, 70), columns = from.between(0, 70);
  const auto logits = fuzz::numbers<float>(from, static_cast<size_t>(n) * static_cast<size_t>(h) * static_cast<size_t>(w));
  bool present[8];
  for (bool& one : present) one = from.once_in(2);
  const int64_t step = from.between(1, 3), line = columns * step + from.between(0, 3);
  const size_t plane = static_cast<size_t>(rows * line);
  const std::unique_ptr<uint8_t[]> labels(new uint8_t[plane + 1]), masks(new uint8_t[plane * static_cast<size_t>(n) + 1]);
  int64_t first = 0, first_mask = 0;
  const int64_t label_column = rows && columns ? axis(from, columns, step, first) : step;
  const int64_t label_row = rows && columns ? axis(from, rows, line, first) : line;
  const int64_t mask_column = rows && columns ? axis(from, columns, step, first_mask) : step;
  const int64_t mask_row = rows && columns ? axis(from, rows, line, first_mask) : line;
  finish(logits.get(), n, h, w, present,
         {static_cast<int32_t>(rows), static_cast<int32_t>(columns), labels.get() + first, label_row,
          label_column, masks.get() + first_mask, static_cast<int64_t>(plane), mask_row, mask_column},
         static_cast<int>(from.between(1, 3)));
  for (int64_t y = 0; y < rows; ++y)
    for (int64_t x = 0; x < columns; ++x) {
      const uint8_t label = labels[static_cast<size_t>(first + y * label_row + x * label_column)];
      must(label <= n, "a label is of a structure");
      for (int32_t i = 0; i < n; ++i) {
        const int64_t place = static_cast<int64_t>(plane) * i + first_mask + y * mask_row + x * mask_column;
        const uint8_t mask = masks[static_cast<size_t>(place)];
        must(mask <= 1, "a mask is 0 or 1");
        must(!mask || present[i], "what is absent has no mask");
        must(label != i + 1 || mask, "a label is where the mask is");
      }
    }
}

void fuzz_order(fuzz::Bytes& from) {
  const Picture source = picture(from, 40);
  const Image& image = source.image;
  const int64_t size = int64_t{image.rows} * image.columns * image.channels;
  std::vector<int64_t> ranks(static_cast<size_t>(from.between(0, 4)));
  for (int64_t& rank : ranks) rank = from.take<uint32_t>() % size;
  std::sort(ranks.begin(), ranks.end());
  const std::vector<double> found = order_statistics(image, ranks);
  must(found.size() == ranks.size(), "one value for each rank");
  for (size_t i = 1; i < found.size(); ++i)
    must(!(found[i] < found[i - 1]), "values are in order");
}

void fuzz_gather(fuzz::Bytes& from) {
  const int64_t tokens = from.between(1, 60), width = from.between(1, 70);
  const bool half = from.once_in(2);
  const auto count = static_cast<size_t>(tokens * width);
  const std::unique_ptr<uint8_t[]> out(new uint8_t[count * (half ? 2 : 4)]);
  if (from.once_in(2)) {
    const auto source = fuzz::numbers<uint16_t>(from, count);
    gather_half(source.get(), tokens * width, out.get(), half, from.once_in(2));
  } else {
    const auto source = fuzz::numbers<int8_t>(from, count);
    const auto scales = fuzz::numbers<float>(from, static_cast<size_t>(tokens));
    gather_int8(source.get(), scales.get(), tokens, width, out.get(), half);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::Bytes from(data, size);
  const Levels all = levels();
  choose(*all.first[from.take<uint8_t>() % all.count]);
  switch (from.take<uint8_t>() % 4) {
    case 0: fuzz_prepare(from); break;
    case 1: fuzz_finish(from); break;
    case 2: fuzz_order(from); break;
    default: fuzz_gather(from);
  }
  return 0;
}
