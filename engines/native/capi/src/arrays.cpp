#include "arrays.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

namespace capi {
namespace {

struct DType {
  const char* name;
  std::int64_t size;
};

// No program on x86-64 or AArch64 has memory past it; what lies above in an AArch64 pointer is a tag.
constexpr std::int64_t kAddressEnd = std::int64_t{1} << 56;

DType dtype_of(std::int32_t dtype, const char* name) {
  switch (dtype) {
    case RECALLSEG_UINT8: return {"u1", 1};
    case RECALLSEG_INT8: return {"i1", 1};
    case RECALLSEG_UINT16: return {"u2", 2};
    case RECALLSEG_INT16: return {"i2", 2};
    case RECALLSEG_UINT32: return {"u4", 4};
    case RECALLSEG_INT32: return {"i4", 4};
    case RECALLSEG_FLOAT32: return {"f4", 4};
    case RECALLSEG_FLOAT64: return {"f8", 8};
    default: refuse(std::string(name) + ": unknown dtype " + std::to_string(dtype));
  }
}

void pack(std::vector<std::int64_t>& strides, const std::vector<std::int64_t>& shape,
          std::int64_t size) {
  for (std::size_t axis = shape.size(); axis-- > 0; size *= shape[axis]) strides[axis] = size;
}

// Whether two elements share bytes; for few axes, ordered by stride.
bool overlaps(const std::vector<std::int64_t>& shape, const std::vector<std::int64_t>& strides,
              std::int64_t size) {
  std::vector<std::pair<std::int64_t, std::int64_t>> axes;
  for (std::size_t axis = 0; axis < shape.size(); ++axis)
    if (shape[axis] > 1) axes.emplace_back(std::llabs(strides[axis]), shape[axis]);
  std::sort(axes.begin(), axes.end());
  std::int64_t span = size;  // bytes that the axes so far cover
  for (const auto& [stride, count] : axes) {
    if (stride < span) return true;
    span += stride * (count - 1);
  }
  return false;
}

}  // namespace

Layout layout_of(const char* name, const void* data, std::int32_t dtype,
                 std::vector<std::int64_t> shape, std::vector<std::int64_t> strides,
                 Access access) {
  const std::string what = name;
  if (data == nullptr) refuse(what + ": data is null");
  const DType kind = dtype_of(dtype, name);
  for (const std::int64_t side : shape)
    if (side < 1 || side > RECALLSEG_MAX_SIDE)
      refuse(what + ": every side must be 1 to " + std::to_string(RECALLSEG_MAX_SIDE) + ", got " +
             std::to_string(side));
  if (std::all_of(strides.begin(), strides.end(), [](std::int64_t s) { return s == 0; }))
    pack(strides, shape, kind.size);

  std::int64_t low = 0, high = kind.size;  // bytes used, from element (0, 0)
  for (std::size_t axis = 0; axis < shape.size(); ++axis) {
    const std::int64_t stride = strides[axis];
    std::int64_t reach = 0;
    if (stride % kind.size != 0 || (stride == 0 && shape[axis] > 1))
      refuse(what + ": strides are bytes, multiples of the element's size and not 0, got " +
             std::to_string(stride));
    if (__builtin_mul_overflow(stride, shape[axis] - 1, &reach) ||
        __builtin_add_overflow(reach < 0 ? low : high, reach, reach < 0 ? &low : &high))
      refuse(what + ": stride " + std::to_string(stride) + " leaves the address space");
  }
  const auto pointer = reinterpret_cast<std::uintptr_t>(data);
  const auto address = static_cast<std::int64_t>(pointer & (kAddressEnd - 1));
  if (low < -address || high > kAddressEnd - address)
    refuse(what + ": strides leave the address space");
  if (address % kind.size != 0)
    refuse(what + ": data must be aligned to its elements of " + std::to_string(kind.size) +
           " bytes");
  if (access == Access::kWrite && overlaps(shape, strides, kind.size))
    refuse(what + ": strides make elements overlap");

  Layout layout;
  layout.lowest = const_cast<char*>(static_cast<const char*>(data)) + low;
  layout.bytes = static_cast<std::size_t>(high - low);
  layout.offset = static_cast<std::size_t>(-low);
  layout.dtype = kind.name;
  layout.shape = std::move(shape);
  layout.strides = std::move(strides);
  return layout;
}

Place place_of(const char* name, std::int32_t location, void* stream) {
  if (location != RECALLSEG_HOST && location != RECALLSEG_CUDA)
    refuse(std::string(name) + ": unknown location " + std::to_string(location));
  if (location == RECALLSEG_HOST && stream != nullptr)
    refuse(std::string(name) + ": has a stream, and lies on the host: set location to RECALLSEG_CUDA");
  return {location == RECALLSEG_CUDA,
          static_cast<long long>(reinterpret_cast<std::intptr_t>(stream))};
}

Layout layout_of(const recallseg_image& image) {
  if (image.ndim != 2 && image.ndim != 3)
    refuse("image: ndim must be 2 (grey) or 3 (RGB), got " + std::to_string(image.ndim));
  if (image.ndim == 3 && image.shape[2] != 3)
    refuse("image: shape[2] must be 3 (RGB), got " + std::to_string(image.shape[2]));
  for (const double spacing : image.spacing)
    if (!std::isfinite(spacing) || spacing < 0)
      refuse("image: spacing must be millimetres, or 0 where unknown");
  Layout layout =
      layout_of("image", image.data, image.dtype, {image.shape, image.shape + image.ndim},
                {image.strides, image.strides + image.ndim}, Access::kRead);
  layout.place = place_of("image", image.location, image.stream);
  return layout;
}

Ref Loan::lend(const Layout& layout, Access access) {
  const auto each = [](const std::vector<std::int64_t>& values) {
    return tuple_of_each(values.size(),
                         [&](std::size_t i) { return to_python(static_cast<long long>(values[i])); });
  };
  if (layout.place.on_gpu) {
    const auto address = reinterpret_cast<std::intptr_t>(layout.lowest + layout.offset);
    return tuple_of(static_cast<long long>(address), layout.dtype, each(layout.shape),
                    each(layout.strides), layout.place.stream);
  }
  constexpr int kReadFlag = 0x100, kWriteFlag = 0x200;  // PyBUF_READ, PyBUF_WRITE
  views_.push_back(checked(python.PyMemoryView_FromMemory(
      layout.lowest, static_cast<Py_ssize_t>(layout.bytes),
      access == Access::kWrite ? kWriteFlag : kReadFlag)));
  return tuple_of(views_.back(), layout.dtype, each(layout.shape), each(layout.strides),
                  static_cast<long long>(layout.offset));
}

void Loan::take_back() {
  const Ref views = tuple_of_each(views_.size(),
                                  [&](std::size_t i) { return again(views_[i].get()); });
  views_.clear();
  call_with("release", views);
}

}  // namespace capi
