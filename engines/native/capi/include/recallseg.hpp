// RecallSeg for C++17: handles that close themselves, and statuses as exceptions.
#ifndef RECALLSEG_HPP
#define RECALLSEG_HPP

#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "recallseg.h"

namespace recallseg {

class Error : public std::runtime_error {
 public:
  Error(recallseg_status status, const std::string& message)
      : std::runtime_error(std::string(recallseg_status_text(status)) + ": " + message),
        status_(status) {}
  recallseg_status status() const noexcept { return status_; }

 private:
  recallseg_status status_;
};

class DeadlineMissed : public Error {
 public:
  using Error::Error;
};

inline void check(recallseg_status status) {
  if (status == RECALLSEG_E_DEADLINE) throw DeadlineMissed(status, recallseg_last_error());
  if (status != RECALLSEG_OK) throw Error(status, recallseg_last_error());
}

inline void init(const recallseg_init_options* options = nullptr) {
  check(recallseg_init(RECALLSEG_ABI_VERSION, options));
}

// A struct of recallseg.h, zero but for its size.
template <typename T>
T sized() {
  T value{};
  value.struct_size = sizeof(T);
  return value;
}

// A view of packed grey (channels = 1) or RGB (channels = 3) pixels.
inline recallseg_image image(const void* data, int32_t dtype, int64_t rows, int64_t columns,
                             int channels = 1) {
  auto view = sized<recallseg_image>();
  view.dtype = dtype;
  view.data = data;
  view.ndim = channels == 1 ? 2 : 3;
  view.shape[0] = rows;
  view.shape[1] = columns;
  view.shape[2] = channels == 1 ? 0 : channels;
  return view;
}

// Owns a handle. A handle that cannot be closed any more (after recallseg_shutdown) is let go.
template <typename Handle, recallseg_status (*Close)(Handle*)>
class Owned {
 public:
  Owned() = default;
  explicit Owned(Handle* handle) : handle_(handle) {}
  Owned(Owned&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Owned& operator=(Owned&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  ~Owned() {
    if (handle_ != nullptr) static_cast<void>(Close(handle_));
  }
  Handle* get() const noexcept { return handle_; }

 private:
  Handle* handle_ = nullptr;
};

class Result : public Owned<recallseg_result, recallseg_result_close> {
 public:
  using Owned::Owned;
  recallseg_summary summary() const {
    auto value = sized<recallseg_summary>();
    check(recallseg_result_summary(get(), &value));
    return value;
  }
  recallseg_score score(std::size_t structure) const {
    auto value = sized<recallseg_score>();
    check(recallseg_result_score(get(), structure, &value));
    return value;
  }
  recallseg_recalled recalled(std::size_t structure, std::size_t index) const {
    auto value = sized<recallseg_recalled>();
    check(recallseg_result_recalled(get(), structure, index, &value));
    return value;
  }
};

class Segmenter : public Owned<recallseg_segmenter, recallseg_segmenter_close> {
 public:
  using Owned::Owned;
  std::vector<std::string> structures() const {
    std::size_t count = 0;
    check(recallseg_segmenter_structure_count(get(), &count));
    std::vector<std::string> names(count);
    for (std::size_t i = 0; i < count; ++i) {
      const char* name = nullptr;
      check(recallseg_segmenter_structure(get(), i, &name));
      names[i] = name;
    }
    return names;
  }
  void warm_up(int runs = 2) const { check(recallseg_segmenter_warm_up(get(), runs)); }
  // Throws DeadlineMissed; deadline_ms = 0 is none.
  Result segment(const recallseg_image& image, const recallseg_output& output,
                 double deadline_ms = 0) const {
    recallseg_result* result = nullptr;
    check(recallseg_segment(get(), &image, &output, deadline_ms, &result));
    return Result(result);
  }
};

class Library : public Owned<recallseg_library, recallseg_library_close> {
 public:
  using Owned::Owned;
  static Library open(const std::string& folder,
                      const recallseg_library_options* options = nullptr) {
    recallseg_library* library = nullptr;
    check(recallseg_library_open(folder.c_str(), options, &library));
    return Library(library);
  }
  static Library create(const std::string& folder, const recallseg_library_options& options) {
    recallseg_library* library = nullptr;
    check(recallseg_library_create(folder.c_str(), &options, &library));
    return Library(library);
  }
  std::string add(const recallseg_image& image, const recallseg_exemplar& exemplar) const {
    char key[1025];
    check(recallseg_library_add(get(), &image, &exemplar, key, sizeof key));
    return key;
  }
  Segmenter segmenter(const recallseg_segmenter_options* options = nullptr) const {
    recallseg_segmenter* segmenter = nullptr;
    check(recallseg_segmenter_open(get(), options, &segmenter));
    return Segmenter(segmenter);
  }
};

}  // namespace recallseg
#endif
