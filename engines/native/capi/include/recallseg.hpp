// RecallSeg for C++17: handles that close themselves, and statuses as exceptions.
#ifndef RECALLSEG_HPP
#define RECALLSEG_HPP

#include <functional>
#include <map>
#include <memory>
#include <mutex>
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

class Cancelled : public Error {
 public:
  using Error::Error;
};

inline void check(recallseg_status status) {
  if (status == RECALLSEG_E_DEADLINE) throw DeadlineMissed(status, recallseg_last_error());
  if (status == RECALLSEG_E_CANCELLED) throw Cancelled(status, recallseg_last_error());
  if (status != RECALLSEG_OK) throw Error(status, recallseg_last_error());
}

// Of the library that is loaded; the header's are RECALLSEG_VERSION and RECALLSEG_ABI_VERSION.
inline std::string version() { return recallseg_version(); }
inline uint32_t abi_version() { return recallseg_abi_version(); }

inline void init(const recallseg_init_options* options = nullptr) {
  check(recallseg_init(RECALLSEG_ABI_VERSION, options));
}
// Handles that are still owned are let go: closing them afterwards does nothing.
inline void shutdown() { check(recallseg_shutdown()); }

// A struct of recallseg.h, zero but for its size.
template <typename T>
T sized() {
  T value{};
  value.struct_size = sizeof(T);
  return value;
}

inline recallseg_info info() {
  auto value = sized<recallseg_info>();
  check(recallseg_get_info(&value));
  return value;
}

using LogCallback = std::function<void(int32_t level, const char* logger, const char* message)>;

// Replace the log's callback; an empty one for none. It must not throw.
inline void set_log(LogCallback callback, int32_t level = RECALLSEG_LOG_INFO) {
  static std::mutex mutex;
  static auto* const kept = new std::unique_ptr<LogCallback>;  // outlives whatever logs at exit
  const std::lock_guard<std::mutex> lock(mutex);
  auto next = callback ? std::make_unique<LogCallback>(std::move(callback)) : nullptr;
  const recallseg_log_callback pass_on = [](int32_t of, const char* logger, const char* message,
                                            void* user) {
    (*static_cast<LogCallback*>(user))(of, logger, message);
  };
  check(recallseg_set_log(next == nullptr ? nullptr : pass_on, next.get(), level));
  *kept = std::move(next);  // the one before is no longer running
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

// The same of packed pixels on a GPU, which are there when what is queued on `stream` now is done; null:
// they are there.
inline recallseg_image device_image(const void* data, int32_t dtype, int64_t rows, int64_t columns,
                                    int channels = 1, void* stream = nullptr) {
  recallseg_image view = image(data, dtype, rows, columns, channels);
  view.location = RECALLSEG_CUDA;
  view.stream = stream;
  return view;
}

// Told how far something is; returns whether to go on, and must not throw.
using Progress = std::function<bool(uint64_t done, uint64_t total)>;

namespace detail {
inline int32_t ask(uint64_t done, uint64_t total, void* user) {
  const auto& progress = *static_cast<const Progress*>(user);
  return int32_t{progress && !progress(done, total)};
}
inline void* user(const Progress& progress) { return const_cast<Progress*>(&progress); }
}  // namespace detail

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
  explicit operator bool() const noexcept { return handle_ != nullptr; }
  // Close it now, and throw what goes wrong.
  void close() {
    if (handle_ != nullptr) check(Close(std::exchange(handle_, nullptr)));
  }

 private:
  Handle* handle_ = nullptr;
};

// Reads a result that may be somebody else's, as a frame's is.
class ResultView {
 public:
  explicit ResultView(recallseg_result* result) : result_(result) {}
  recallseg_summary summary() const {
    auto value = sized<recallseg_summary>();
    check(recallseg_result_summary(result_, &value));
    return value;
  }
  recallseg_score score(std::size_t structure) const {
    auto value = sized<recallseg_score>();
    check(recallseg_result_score(result_, structure, &value));
    return value;
  }
  // Why the quality is suspect: score(structure).reason_count of them.
  std::vector<std::string> reasons(std::size_t structure) const {
    std::vector<std::string> all(score(structure).reason_count);
    for (std::size_t i = 0; i < all.size(); ++i) {
      const char* reason = nullptr;
      check(recallseg_result_reason(result_, structure, i, &reason));
      all[i] = reason;
    }
    return all;
  }
  recallseg_recalled recalled(std::size_t structure, std::size_t index) const {
    auto value = sized<recallseg_recalled>();
    check(recallseg_result_recalled(result_, structure, index, &value));
    return value;
  }
  std::map<std::string, std::string> tags(std::size_t structure, std::size_t index) const {
    std::map<std::string, std::string> all;
    const std::size_t count = recalled(structure, index).tag_count;
    for (std::size_t i = 0; i < count; ++i) {
      recallseg_tag tag{};
      check(recallseg_result_tag(result_, structure, index, i, &tag));
      all[tag.name] = tag.value;
    }
    return all;
  }
  // Milliseconds of each stage, in the order in which they ran.
  std::vector<std::pair<std::string, double>> timings() const {
    std::vector<std::pair<std::string, double>> all(summary().timing_count);
    for (std::size_t i = 0; i < all.size(); ++i) {
      const char* stage = nullptr;
      check(recallseg_result_timing(result_, i, &stage, &all[i].second));
      all[i].first = stage;
    }
    return all;
  }

 private:
  recallseg_result* result_;
};

class Result : public Owned<recallseg_result, recallseg_result_close> {
 public:
  using Owned::Owned;
  // Valid while this result is.
  ResultView view() const { return ResultView(get()); }
  recallseg_summary summary() const { return view().summary(); }
  recallseg_score score(std::size_t structure) const { return view().score(structure); }
  std::vector<std::string> reasons(std::size_t structure) const { return view().reasons(structure); }
  recallseg_recalled recalled(std::size_t structure, std::size_t index) const {
    return view().recalled(structure, index);
  }
  std::map<std::string, std::string> tags(std::size_t structure, std::size_t index) const {
    return view().tags(structure, index);
  }
  std::vector<std::pair<std::string, double>> timings() const { return view().timings(); }
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
  // Segment every exemplar from the others, and store in the library what is normal.
  std::map<std::string, recallseg_calibration> calibrate(const Progress& progress = nullptr) const {
    check(recallseg_segmenter_calibrate(get(), detail::ask, detail::user(progress)));
    std::map<std::string, recallseg_calibration> found;
    const auto names = structures();
    for (std::size_t i = 0; i < names.size(); ++i) {
      auto value = sized<recallseg_calibration>();
      check(recallseg_segmenter_get_calibration(get(), i, &value));
      found[names[i]] = value;
    }
    return found;
  }
  void warm_up(int runs = 2) const { check(recallseg_segmenter_warm_up(get(), runs)); }
  // Throws DeadlineMissed; deadline_ms = 0 is none.
  Result segment(const recallseg_image& image, const recallseg_output& output,
                 double deadline_ms = 0) const {
    recallseg_result* result = nullptr;
    check(recallseg_segment(get(), &image, &output, deadline_ms, &result));
    return Result(result);
  }
  // From any thread: calls that have begun throw Cancelled.
  void cancel() const { check(recallseg_segmenter_cancel(get())); }
};

// Give its get() to recallseg_segmenter_options.audit.
class Audit : public Owned<recallseg_audit, recallseg_audit_close> {
 public:
  using Owned::Owned;
  static Audit open(const std::string& file, const recallseg_audit_options* options = nullptr) {
    recallseg_audit* audit = nullptr;
    check(recallseg_audit_open(file.c_str(), options, &audit));
    return Audit(audit);
  }
};

// All exemplars of a library as they were when it was made.
class List : public Owned<recallseg_list, recallseg_list_close> {
 public:
  using Owned::Owned;
  std::size_t size() const {
    std::size_t count = 0;
    check(recallseg_list_count(get(), &count));
    return count;
  }
  // What it points to lives as long as this list.
  recallseg_listed operator[](std::size_t index) const {
    auto value = sized<recallseg_listed>();
    check(recallseg_list_exemplar(get(), index, &value));
    return value;
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
  // The text lives until the next call for this library.
  recallseg_library_info info() const {
    auto value = sized<recallseg_library_info>();
    check(recallseg_library_get_info(get(), &value));
    return value;
  }
  std::string add(const recallseg_image& image, const recallseg_exemplar& exemplar) const {
    char key[1025];
    check(recallseg_library_add(get(), &image, &exemplar, key, sizeof key));
    return key;
  }
  List list() const {
    recallseg_list* list = nullptr;
    check(recallseg_library_list(get(), &list));
    return List(list);
  }
  void remove(const std::string& key) const {
    check(recallseg_library_remove(get(), key.c_str()));
  }
  // Recall it no more, or again.
  void retire(const std::string& key, bool retired = true) const {
    check(recallseg_library_retire(get(), key.c_str(), retired ? 1 : 0));
  }
  // Returns what was wrong, too: look at problem_count. Its text lives until the next call for this
  // library.
  recallseg_verification verify(const Progress& progress = nullptr) const {
    auto value = sized<recallseg_verification>();
    const recallseg_status status =
        recallseg_library_verify(get(), detail::ask, detail::user(progress), &value);
    if (value.problem_count == 0) check(status);
    return value;
  }
  Segmenter segmenter(const recallseg_segmenter_options* options = nullptr) const {
    recallseg_segmenter* segmenter = nullptr;
    check(recallseg_segmenter_open(get(), options, &segmenter));
    return Segmenter(segmenter);
  }
};

// Live frames. The callback runs on the stream's own thread, gets every frame that was not dropped,
// and must not throw; what it uses has to outlive the stream, which is closed by its destructor.
class Stream {
 public:
  using Callback = std::function<void(const recallseg_frame&)>;

  Stream(const Segmenter& segmenter, Callback callback,
         const recallseg_stream_options* options = nullptr)
      : callback_(std::make_unique<Callback>(std::move(callback))) {
    recallseg_stream* stream = nullptr;
    check(recallseg_stream_open(
        segmenter.get(), options,
        [](const recallseg_frame* frame, void* user) { (*static_cast<Callback*>(user))(*frame); },
        callback_.get(), &stream));
    stream_ = Handle(stream);
  }
  // The frame's number; the image is copied.
  uint64_t push(const recallseg_image& image) const {
    uint64_t number = 0;
    check(recallseg_stream_push(get(), &image, &number));
    return number;
  }
  void pause() const { check(recallseg_stream_pause(get())); }
  void resume() const { check(recallseg_stream_resume(get())); }
  void restart() const { check(recallseg_stream_restart(get())); }
  // Throws DeadlineMissed after timeout_ms.
  void drain(double timeout_ms) const { check(recallseg_stream_drain(get(), timeout_ms)); }
  recallseg_stream_statistics statistics() const {
    auto value = sized<recallseg_stream_statistics>();
    check(recallseg_stream_get_statistics(get(), &value));
    return value;
  }
  void close() { stream_.close(); }
  recallseg_stream* get() const noexcept { return stream_.get(); }

 private:
  using Handle = Owned<recallseg_stream, recallseg_stream_close>;
  std::unique_ptr<Callback> callback_;  // destroyed after the stream
  Handle stream_;
};

}  // namespace recallseg
#endif
