// Python's side: recallseg.engines.pixels._native. Arguments were checked by the Python that calls;
// what could reach beyond a buffer is checked here once more.
#include <nanobind/nanobind.h>
#include <nanobind/stl/array.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <array>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "image.h"

namespace nb = nanobind;

namespace {

// A view of an array for as long as this lives, which must end with the GIL held: any strides, read-only unless `writable`.
class View {
 public:
  View(nb::handle array, int axes, bool writable) {
    if (PyObject_GetBuffer(array.ptr(), &view_, writable ? PyBUF_RECORDS : PyBUF_RECORDS_RO) != 0)
      throw nb::python_error();
    if (view_.ndim != axes) {
      PyBuffer_Release(&view_);
      throw std::invalid_argument("array with another number of axes");
    }
  }
  View(const View&) = delete;
  View& operator=(const View&) = delete;
  ~View() { PyBuffer_Release(&view_); }

  void* data() const { return view_.buf; }
  int64_t stride(int axis) const { return view_.strides[axis]; }
  int64_t size() const { return view_.len / view_.itemsize; }
  int32_t shape(int axis) const { return static_cast<int32_t>(view_.shape[axis]); }
  int64_t total() const { return view_.len; }
  char type() const {
    std::string format = view_.format == nullptr ? "B" : view_.format;
    if (format[0] == '=' || format[0] == '^') format.erase(0, 1);  // unaligned, of native order
    return format.size() == 1 ? format[0] : '\0';
  }
  void must_be(const char* types) const {
    if (type() == '\0' || std::string(types).find(type()) == std::string::npos)
      throw std::invalid_argument("array with another dtype");
  }
  void must_be_contiguous() const {
    if (!PyBuffer_IsContiguous(&view_, 'C')) throw std::invalid_argument("array is not contiguous");
  }

 private:
  Py_buffer view_{};
};

void must(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

int axes_of(nb::handle array) { return nb::cast<int>(array.attr("ndim")); }

pixels::Image image_of(const View& view, int axes) {
  pixels::Pixel pixel{};
  switch (view.type()) {
    case 'B': pixel = pixels::Pixel::u8; break;
    case 'h': pixel = pixels::Pixel::i16; break;
    case 'H': pixel = pixels::Pixel::u16; break;
    case 'f': pixel = pixels::Pixel::f32; break;
    default: throw std::invalid_argument("image with another dtype");
  }
  must(view.size() > 0 && (axes == 2 || view.shape(2) == 3), "image of another shape");
  return {view.data(), pixel, view.shape(0), view.shape(1), axes == 2 ? 1 : 3,
          view.stride(0), view.stride(1), axes == 2 ? 0 : view.stride(2)};
}

std::vector<double> order_statistics(nb::handle array, const std::vector<int64_t>& ranks) {
  const int axes = axes_of(array);
  const View view(array, axes == 3 ? 3 : 2, false);
  const pixels::Image image = image_of(view, axes);
  for (const int64_t rank : ranks) must(rank >= 0 && rank < view.size(), "rank out of range");
  const nb::gil_scoped_release unlocked;
  return pixels::order_statistics(image, ranks);
}

void prepare(nb::handle array, float low, float gain, nb::handle out,
             const std::array<float, 3>& means, const std::array<float, 3>& gains, int threads) {
  const int axes = axes_of(array);
  const View source(array, axes == 3 ? 3 : 2, false), target(out, 4, true);
  target.must_be("fe");
  target.must_be_contiguous();
  must(target.shape(0) == 1 && target.shape(1) == 3 && target.shape(2) == target.shape(3) &&
           target.shape(3) > 0,
       "out must be 1x3xSxS");
  const pixels::Image image = image_of(source, axes);
  const pixels::Input input{target.data(), target.type() == 'e', target.shape(3), means, gains};
  const nb::gil_scoped_release unlocked;
  pixels::prepare(image, {low, gain}, input, threads);
}

void finish(nb::handle logits, const std::vector<bool>& present, nb::handle label_map,
            nb::handle masks, int threads) {
  const View source(logits, 3, false), labels(label_map, 2, true), planes(masks, 3, true);
  source.must_be("f");
  source.must_be_contiguous();
  labels.must_be("B");
  planes.must_be("?");
  const int32_t n = source.shape(0);
  must(n <= 255 && static_cast<size_t>(n) == present.size() && planes.shape(0) == n &&
           planes.shape(1) == labels.shape(0) && planes.shape(2) == labels.shape(1),
       "shapes that do not match");
  must(n == 0 || source.size() > 0, "logits without pixels");
  const auto flags = std::make_unique<bool[]>(static_cast<size_t>(n));
  for (size_t i = 0; i < present.size(); ++i) flags[i] = present[i];
  const pixels::Output output{
      labels.shape(0),          labels.shape(1),  static_cast<uint8_t*>(labels.data()),
      labels.stride(0),         labels.stride(1), static_cast<uint8_t*>(planes.data()),
      planes.stride(0),         planes.stride(1), planes.stride(2)};
  const nb::gil_scoped_release unlocked;
  pixels::finish(static_cast<const float*>(source.data()), n, source.shape(1), source.shape(2),
                 flags.get(), output, threads);
}

void gather(const nb::list& rows, nb::handle out, const nb::object& scales) {
  const View target(out, 3, true);
  target.must_be("fe");
  target.must_be_contiguous();
  must(rows.size() == static_cast<size_t>(target.shape(0)), "as many rows as out has");
  const int32_t tokens = target.shape(1), width = target.shape(2);
  const bool half = target.type() == 'e';
  const int64_t count = int64_t{tokens} * width, bytes = count * (half ? 2 : 4);
  auto* place = static_cast<unsigned char*>(target.data());
  for (size_t i = 0; i < rows.size(); ++i, place += bytes) {
    const View row(rows[i], 2, false);
    row.must_be_contiguous();
    must(row.shape(0) == tokens && row.shape(1) == width, "rows of another shape");
    if (scales.is_none()) {
      row.must_be("e");
      const nb::gil_scoped_release unlocked;
      pixels::gather_half(static_cast<const uint16_t*>(row.data()), count, place, half,
                          target.total() >= pixels::kStreamBytes);
    } else {
      const View scale(nb::handle(scales[i]), 1, false);
      row.must_be("b");
      scale.must_be("f");
      scale.must_be_contiguous();
      must(scale.shape(0) == tokens, "one scale per token");
      const nb::gil_scoped_release unlocked;
      pixels::gather_int8(static_cast<const int8_t*>(row.data()),
                          static_cast<const float*>(scale.data()), tokens, width, place, half);
    }
  }
}

std::vector<std::string> levels() {
  const pixels::Levels all = pixels::levels();
  std::vector<std::string> names;
  for (int i = 0; i < all.count; ++i) names.emplace_back(all.first[i]->level);
  return names;
}

void choose(const std::string& level) {
  const pixels::Levels all = pixels::levels();
  for (int i = 0; i < all.count; ++i)
    if (level == all.first[i]->level) return pixels::choose(*all.first[i]);
  throw std::invalid_argument("no such level on this processor");
}

}  // namespace

NB_MODULE(_native, module) {
  module.def("level", [] { return std::string(pixels::rows().level); });
  module.def("levels", &levels);
  module.def("choose", &choose, nb::arg("level"));
  module.def("order_statistics", &order_statistics, nb::arg("image"), nb::arg("ranks"));
  module.def("prepare", &prepare, nb::arg("image"), nb::arg("low"), nb::arg("gain"), nb::arg("out"),
             nb::arg("means"), nb::arg("gains"), nb::arg("threads"));
  module.def("finish", &finish, nb::arg("logits"), nb::arg("present"), nb::arg("label_map"),
             nb::arg("masks"), nb::arg("threads"));
  module.def("gather", &gather, nb::arg("rows"), nb::arg("out"), nb::arg("scales").none());
}
