// The passes over rows that prepare() and finish() are made of, and their threads.
#include <algorithm>
#include <thread>

#include "image.h"

namespace pixels {
namespace {

constexpr size_t kBlockFloats = 1 << 14;  // 64 KiB: stays in the second level of caches

std::vector<Span> spans_of(const Axis& axis) {
  std::vector<Span> spans(static_cast<size_t>(axis.target));
  for (int32_t i = 0; i < axis.target; ++i) spans[static_cast<size_t>(i)] = span_of(axis, i);
  return spans;
}

// Both axes of a resize; made once per call, read by every thread.
class Grid {
 public:
  Grid(int32_t from_rows, int32_t from_columns, int32_t to_rows, int32_t to_columns)
      : rule(rule_of(from_rows, from_columns, to_rows, to_columns)),
        source_columns(from_columns),
        columns(to_columns),
        y(spans_of({from_rows, to_rows, rule})),
        x(spans_of({from_columns, to_columns, rule})) {
    if (rule == kArea) return;
    for (const Span& span : x) {
      first_.push_back(span.first);
      second_.push_back(span.first + span.count - 1);
      head_.push_back(span.head);
      tail_.push_back(span.count > 1 ? span.tail : 0.0f);
    }
  }
  Taps taps() const {
    return {rule == kLinear, source_columns, first_.data(), second_.data(), head_.data(), tail_.data()};
  }

  const Rule rule;
  const int32_t source_columns, columns;
  const std::vector<Span> y, x;

 private:
  std::vector<int32_t> first_, second_;
  std::vector<float> head_, tail_;
};

// Resizes one plane, row by row from top to bottom. `Source` gives a row of the source.
template <class Source>
class Plane {
 public:
  Plane(const Grid& grid, Source source)
      : grid_(grid),
        source_(source),
        line_(static_cast<size_t>(grid.source_columns)),
        sum_(grid.rule == kArea ? line_.size() : 0),
        kept_{std::vector<float>(static_cast<size_t>(grid.columns)),
              std::vector<float>(static_cast<size_t>(grid.columns))} {}

  // Row `i` of the target; valid until the next call.
  Mix row(int32_t i) {
    const Span& span = grid_.y[static_cast<size_t>(i)];
    if (grid_.rule == kArea) return whole(summed(span));
    const float* above = interpolated(span.first);
    if (span.count == 1) return whole(above);
    return {above, span.head, interpolated(span.first + 1), span.tail};
  }

 private:
  static Mix whole(const float* row) { return {row, 1.0f, row, 0.0f}; }

  const float* summed(const Span& span) {
    std::fill(sum_.begin(), sum_.end(), 0.0f);
    for (int32_t j = 0; j < span.count; ++j)
      rows().add(source(span.first + j), weight(span, j), grid_.source_columns, sum_.data());
    rows().collect(sum_.data(), grid_.x.data(), grid_.columns, kept_[0].data());
    return kept_[0].data();
  }

  // Neighbouring target rows share source rows: the last even and the last odd one are kept.
  const float* interpolated(int32_t i) {
    const auto slot = static_cast<size_t>(i & 1);
    if (held_[slot] != i) {
      rows().interpolate(source(i), grid_.taps(), grid_.columns, kept_[slot].data());
      held_[slot] = i;
    }
    return kept_[slot].data();
  }

  const float* source(int32_t i) {
    if (read_ != i) {
      at_ = source_(i, line_.data());
      read_ = i;
    }
    return at_;
  }

  const Grid& grid_;
  Source source_;
  std::vector<float> line_, sum_;
  std::array<std::vector<float>, 2> kept_;
  std::array<int32_t, 2> held_{-1, -1};
  int32_t read_ = -1;
  const float* at_ = nullptr;
};

// Call work(first, last) for bands of rows, the first band on this thread.
template <class Work>
void in_bands(int32_t rows, int threads, const Work& work) {
  const int32_t bands = std::clamp(threads, 1, std::max(1, rows));
  std::vector<std::jthread> others;
  for (int32_t band = 1; band < bands; ++band)
    others.emplace_back(work, static_cast<int32_t>(int64_t{rows} * band / bands),
                        static_cast<int32_t>(int64_t{rows} * (band + 1) / bands));
  work(0, static_cast<int32_t>(int64_t{rows} / bands));
}

}  // namespace

void prepare(const Image& image, Window window, const Input& out, int threads) {
  const Grid grid(image.rows, image.columns, out.side, out.side);
  const int64_t bytes = int64_t{3} * out.side * out.side * (out.half ? 2 : 4);
  const bool streamed = bytes >= kStreamBytes;
  in_bands(out.side, threads, [&](int32_t from, int32_t to) {
    const Rows& r = rows();
    const auto side = static_cast<size_t>(out.side);
    // Several rows at a time, so that each channel is written in long runs.
    const auto block = static_cast<int32_t>(std::max<size_t>(1, kBlockFloats / side));
    std::vector<float> lines(static_cast<size_t>(block) * side);
    for (int32_t channel = 0; channel < image.channels; ++channel) {
      const auto* base =
          static_cast<const unsigned char*>(image.data) + channel * image.channel_stride;
      Plane plane(grid, [&](int32_t row, float* into) {
        r.window[static_cast<int>(image.pixel)](base + row * image.row_stride, image.column_stride,
                                                image.columns, window, into);
        return static_cast<const float*>(into);
      });
      // A grey image fills all three channels.
      const int32_t last = image.channels == 1 ? 3 : channel + 1;
      for (int32_t row = from; row < to; row += block) {
        const auto count = static_cast<size_t>(std::min(block, to - row));
        for (size_t i = 0; i < count; ++i)
          r.blend(plane.row(row + static_cast<int32_t>(i)), out.side, lines.data() + i * side);
        const auto pixels = static_cast<int64_t>(count * side);
        for (int32_t target = channel; target < last; ++target) {
          const auto c = static_cast<size_t>(target);
          const size_t at = (c * side + static_cast<size_t>(row)) * side;
          if (out.half)
            r.normalise_half(lines.data(), out.mean[c], out.gain[c], pixels,
                             static_cast<uint16_t*>(out.data) + at, streamed);
          else
            r.normalise(lines.data(), out.mean[c], out.gain[c], pixels,
                        static_cast<float*>(out.data) + at, streamed);
        }
      }
    }
    r.settle();
  });
}

void finish(const float* logits, int32_t n, int32_t rows_in, int32_t columns_in,
            const bool* present, const Output& out, int threads) {
  const Grid grid(rows_in, columns_in, out.rows, out.columns);
  in_bands(out.rows, threads, [&](int32_t from, int32_t to) {
    const Rows& r = rows();
    const auto width = static_cast<size_t>(out.columns);
    const auto source_of = [&](int32_t structure) {
      const float* plane = logits + int64_t{structure} * rows_in * columns_in;
      return [plane, columns_in](int32_t row, float*) { return plane + int64_t{row} * columns_in; };
    };
    std::vector<Plane<decltype(source_of(0))>> planes;
    for (int32_t structure = 0; structure < n; ++structure)
      planes.emplace_back(grid, source_of(structure));
    std::vector<float> highest(width);
    std::vector<uint8_t> mask_line(width), label_line(width);
    for (int32_t row = from; row < to; ++row) {
      uint8_t* const label_row = out.labels + row * out.label_row;
      uint8_t* const labels = out.label_column == 1 ? label_row : label_line.data();
      std::fill(highest.begin(), highest.end(), 0.0f);
      std::fill_n(labels, width, uint8_t{0});
      for (int32_t structure = 0; structure < n; ++structure) {
        uint8_t* const mask_row = out.masks + structure * out.mask_plane + row * out.mask_row;
        uint8_t* const mask = out.mask_column == 1 ? mask_row : mask_line.data();
        if (present[structure]) {
          r.vote(planes[static_cast<size_t>(structure)].row(row),
                 static_cast<uint8_t>(structure + 1), out.columns, highest.data(), mask, labels);
        } else {
          std::fill_n(mask, width, uint8_t{0});
        }
        if (mask != mask_row)
          for (int64_t i = 0; i < out.columns; ++i) mask_row[i * out.mask_column] = mask[i];
      }
      if (labels != label_row)
        for (int64_t i = 0; i < out.columns; ++i) label_row[i * out.label_column] = labels[i];
    }
  });
}

void gather_half(const uint16_t* source, int64_t count, void* out, bool half, bool streamed) {
  if (half) {
    std::copy(source, source + count, static_cast<uint16_t*>(out));
    return;
  }
  rows().widen(source, count, static_cast<float*>(out), streamed);
  rows().settle();
}

void gather_int8(const int8_t* source, const float* scales, int64_t tokens, int64_t width,
                 void* out, bool half) {
  for (int64_t token = 0; token < tokens; ++token) {
    const int64_t at = token * width;
    if (half)
      rows().decode_half(source + at, scales[token], width, static_cast<uint16_t*>(out) + at);
    else
      rows().decode(source + at, scales[token], width, static_cast<float*>(out) + at);
  }
}

}  // namespace pixels
