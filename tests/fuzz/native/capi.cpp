// librecallseg as a careless program calls it: any function, any order, any contents of its structs,
// while its allocations fail. What points to memory points to memory of that size, with a guard page
// behind it. The environment says where Python, a library and a folder to write into are.
#include <dlfcn.h>
#include <recallseg.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <limits>

#include "bytes.h"
#include "starving.h"

namespace {

using fuzz::Bytes;

std::string library_folder, scratch;
recallseg_library *reading = nullptr, *writing = nullptr;
recallseg_segmenter* segmenter = nullptr;
long long calls = 0, defects = 0;

void must(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "broken: %s\nlast error: %s\n", what, recallseg_last_error());
  __builtin_trap();
}

recallseg_status seen(recallseg_status status) {
  ++calls;
  must(status != RECALLSEG_E_INTERNAL, "no call is told to be a defect");
  must(status == RECALLSEG_OK || *recallseg_last_error() != '\0', "an error has a reason");
  return status;
}

// Memory whose end is the end of a page before one that cannot be touched.
class Guarded {
 public:
  Guarded() = default;
  explicit Guarded(size_t bytes) : size(bytes) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    whole_ = (size + page - 1) / page * page + page;
    first_ = static_cast<uint8_t*>(
        mmap(nullptr, whole_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    mprotect(first_ + whole_ - page, page, PROT_NONE);
    data = first_ + whole_ - page - size;
  }
  Guarded(Guarded&& other) noexcept { *this = std::move(other); }
  Guarded& operator=(Guarded&& other) noexcept {
    std::swap(first_, other.first_);
    std::swap(whole_, other.whole_);
    std::swap(data, other.data);
    std::swap(size, other.size);
    return *this;
  }
  ~Guarded() {
    if (first_ != nullptr) munmap(first_, whole_);
  }
  uint8_t* data = nullptr;
  size_t size = 0;

 private:
  uint8_t* first_ = nullptr;
  size_t whole_ = 0;
};

// A struct of its own size, or of another one, and then not a byte more than it says.
template <class T>
class Given {
 public:
  Given(Bytes& from, const T& value) {
    uint32_t size = sizeof(T);
    if (from.once_in(12)) {
      const uint32_t sizes[] = {0, 4, 8, sizeof(T) - 8, sizeof(T) + 8, 4096, 5000, UINT32_MAX};
      size = sizes[from.take<uint8_t>() % 8];
    }
    const size_t room = size < 4 ? 4 : size > 5000 ? sizeof(T) : size;
    memory_.reset(new uint8_t[room]());
    memcpy(memory_.get(), &value, room < sizeof(T) ? room : sizeof(T));
    memcpy(memory_.get(), &size, 4);
    if (room > sizeof(T) && from.once_in(3)) memory_[room - 1] = 1;
  }
  T* get() { return reinterpret_cast<T*>(memory_.get()); }
  T read() const {
    T value{};
    uint32_t size = 0;
    memcpy(&size, memory_.get(), 4);
    memcpy(&value, memory_.get(), size < sizeof(T) ? (size < 4 ? 4 : size) : sizeof(T));
    return value;
  }

 private:
  std::unique_ptr<uint8_t[]> memory_;
};

// Texts on the heap, each with no byte behind its end.
class Texts {
 public:
  const char* one(Bytes& from) {
    static const char* const known[] = {"disc", "core",  "fake", "fp32", "", "a",
                                        "key",  "onnxruntime-cpu", "\xff\xfe", "disc\n"};
    const int which = static_cast<int>(from.take<uint8_t>() % 16);
    if (which == 15) return nullptr;
    std::string text = which < 10 ? known[which] : which == 10 ? std::string(300, 'x') : "";
    if (which > 10)
      for (int64_t left = from.between(0, 20); left > 0; --left)
        text += static_cast<char>(from.between(1, 255));
    return keep(text);
  }
  const char* keep(const std::string& text) {
    kept_.emplace_back(new char[text.size() + 1]);
    memcpy(kept_.back().get(), text.c_str(), text.size() + 1);
    return kept_.back().get();
  }
  const char* const* several(Bytes& from, size_t& count) {
    count = static_cast<size_t>(from.between(0, 3));
    lists_.emplace_back(new const char*[count + 1]);
    for (size_t i = 0; i < count; ++i) lists_.back()[i] = one(from);
    const char* const* given = lists_.back().get();
    if (from.once_in(20)) given = nullptr;
    if (from.once_in(20)) count = size_t{65537} + from.take<uint32_t>();
    return given;
  }
  const recallseg_tag* tags(Bytes& from, size_t& count) {
    count = static_cast<size_t>(from.between(0, 2));
    tags_.emplace_back(new recallseg_tag[count + 1]);
    for (size_t i = 0; i < count; ++i) tags_.back()[i] = {one(from), one(from)};
    if (from.once_in(20)) count = SIZE_MAX;
    return tags_.back().get();
  }

 private:
  std::vector<std::unique_ptr<char[]>> kept_;
  std::vector<std::unique_ptr<const char*[]>> lists_;
  std::vector<std::unique_ptr<recallseg_tag[]>> tags_;
};

// No program has memory of kImpossible bytes, on any machine that this is built for.
constexpr __int128 kMostBytes = 1 << 20, kImpossible = static_cast<__int128>(1) << 56;

// Strides of any kind, and memory of just the extent that they make; false if that is too much to
// give, and not so much that it has to be refused.
bool lay_out(Bytes& from, int axes, const int64_t* shape, int64_t* strides, int64_t size,
             Guarded& memory, uint8_t*& data) {
  const int kind = static_cast<int>(from.take<uint8_t>() % 10);
  int64_t packed = size;
  for (int axis = axes; axis-- > 0;) {
    strides[axis] = packed;
    packed = static_cast<int64_t>(static_cast<uint64_t>(packed) * static_cast<uint64_t>(shape[axis]));
  }
  if (kind < 4) {
    for (int axis = 0; axis < axes; ++axis)
      if (kind == 1 || (kind == 2 && from.once_in(2)))
        strides[axis] = static_cast<int64_t>(-static_cast<uint64_t>(strides[axis]));
  } else if (kind == 4) {
    for (int axis = 0; axis < axes; ++axis) strides[axis] = size * from.between(-200, 200);
  } else if (kind == 5) {
    for (int axis = 0; axis < axes; ++axis) strides[axis] = from.take<int64_t>();
  }
  __int128 low = 0, high = size;
  for (int axis = 0; axis < axes; ++axis) {
    const __int128 steps = static_cast<__int128>(shape[axis]) - 1, most = kImpossible * 4;
    const __int128 reach = std::max(-most, std::min(most, strides[axis] * steps));
    (reach < 0 ? low : high) += reach;
  }
  if (kind > 5)  // all 0: packed, which is what was reckoned with
    for (int axis = 0; axis < axes; ++axis) strides[axis] = 0;
  if (high - low > kMostBytes && high - low < kImpossible) return false;
  const bool there = high - low <= kMostBytes && high > low;
  memory = Guarded(there ? static_cast<size_t>(high - low) : 64);
  data = memory.data + (there ? static_cast<int64_t>(-low) : 0);
  if (from.once_in(16)) data -= 1;  // not aligned
  return true;
}

int64_t side(Bytes& from) {
  if (!from.once_in(24)) return from.between(1, 40);
  const int64_t odd[] = {0, -1, 32768, INT64_MAX, INT64_MIN, 1 << 20};
  return odd[from.take<uint8_t>() % 6];
}

struct Picture {
  Guarded memory;
  recallseg_image image = RECALLSEG_IMAGE_INIT;
  bool usable = false;

  explicit Picture(Bytes& from) {
    constexpr int64_t sizes[] = {1, 1, 1, 2, 2, 4, 4, 4, 8};
    image.dtype = static_cast<int32_t>(from.between(1, 8));
    int64_t size = sizes[image.dtype];
    if (from.once_in(24)) image.dtype = from.take<int32_t>();
    if (image.dtype < 1 || image.dtype > 8) size = 1;
    if (image.dtype >= 1 && image.dtype <= 8) size = sizes[image.dtype];
    image.ndim = from.once_in(3) ? 3 : 2;
    for (int i = 0; i < image.ndim; ++i) image.shape[i] = i == 2 ? 3 : side(from);
    uint8_t* data = nullptr;
    usable = lay_out(from, image.ndim, image.shape, image.strides, size, memory, data);
    if (!usable) return;
    image.data = from.once_in(30) ? nullptr : data;
    if (from.once_in(24)) image.ndim = from.take<int32_t>();
    if (image.ndim == 3 && from.once_in(30)) image.shape[2] = from.take<int64_t>();
    if (image.ndim == 3 && image.shape[2] != 3) image.shape[2] = 4;
    if (from.once_in(8)) image.spacing[0] = from.take<double>();
    if (from.once_in(8)) image.spacing[1] = from.take<double>();
    if (from.once_in(30)) image.reserved = from.take<int32_t>();
    if (from.once_in(30)) image.location = from.take<int8_t>();
    if (image.location == RECALLSEG_CUDA || from.once_in(40)) image.stream = &image;
    if (image.data != nullptr) from.fill(memory.data, memory.size < 64 ? memory.size : 64);
  }
};

struct Asked {
  Guarded labels, masks;
  recallseg_output output = RECALLSEG_OUTPUT_INIT;
  bool usable = true;

  Asked(Bytes& from, const recallseg_image& image) {
    output.rows = image.shape[0];
    output.columns = image.shape[1];
    if (from.once_in(24)) output.rows = side(from);
    if (from.once_in(24)) output.columns = side(from);
    const int64_t plane[2] = {output.rows, output.columns};
    uint8_t* data = nullptr;
    if (!from.once_in(6)) {
      usable = lay_out(from, 2, plane, output.label_strides, 1, labels, data);
      output.label_map = data;
    }
    output.mask_count = from.once_in(20) ? from.take<int64_t>() : 2;
    if (usable && from.once_in(2)) {
      const int64_t all[3] = {output.mask_count, output.rows, output.columns};
      usable = lay_out(from, 3, all, output.mask_strides, 1, masks, data);
      output.masks = data;
    }
    if (from.once_in(30)) output.reserved = from.take<uint32_t>();
    if (from.once_in(30)) output.location = from.take<int8_t>();
  }
};

double deadline(Bytes& from) {
  const double odd[] = {0, 0, 0, 0, 1e-9, 5, 1e300, -1, std::nan(""), INFINITY};
  return odd[from.take<uint8_t>() % 10];
}

int32_t told(uint64_t, uint64_t, void* user) { return --*static_cast<int*>(user) < 0 ? 1 : 0; }

void read_result(Bytes& from, recallseg_result* result) {
  Given<recallseg_summary> summary(from, RECALLSEG_SUMMARY_INIT);
  seen(recallseg_result_summary(result, from.once_in(20) ? nullptr : summary.get()));
  for (int i = 0; i < 4; ++i) {
    const size_t which = from.once_in(6) ? from.take<size_t>() : static_cast<size_t>(from.between(0, 2));
    Given<recallseg_score> score(from, RECALLSEG_SCORE_INIT);
    Given<recallseg_recalled> recalled(from, RECALLSEG_RECALLED_INIT);
    const char* text = nullptr;
    double ms = 0;
    recallseg_tag tag{};
    switch (from.take<uint8_t>() % 5) {
      case 0: seen(recallseg_result_score(result, which, score.get())); break;
      case 1: seen(recallseg_result_reason(result, which, from.take<uint8_t>(), &text)); break;
      case 2: seen(recallseg_result_recalled(result, which, from.take<uint8_t>() % 4, recalled.get())); break;
      case 3: seen(recallseg_result_tag(result, which, 0, from.take<uint8_t>() % 3, &tag)); break;
      default: seen(recallseg_result_timing(result, which, &text, from.once_in(9) ? nullptr : &ms));
    }
  }
}

void segment(Bytes& from, recallseg_segmenter* by) {
  Picture picture(from);
  if (!picture.usable) return;
  Asked asked(from, picture.image);
  if (!asked.usable) return;
  Given<recallseg_image> image(from, picture.image);
  Given<recallseg_output> output(from, asked.output);
  recallseg_result* result = nullptr;
  const bool wanted = !from.once_in(4);
  if (seen(recallseg_segment(by, image.get(), output.get(), deadline(from), wanted ? &result : nullptr)) != RECALLSEG_OK)
    must(result == nullptr, "no result of what failed");
  if (result == nullptr) return;
  read_result(from, result);
  must(seen(recallseg_result_close(result)) == RECALLSEG_OK, "a result is closed");
  must(seen(recallseg_result_close(result)) == RECALLSEG_E_HANDLE, "and not twice");
}

void add(Bytes& from, recallseg_library* to) {
  Picture picture(from);
  if (!picture.usable) return;
  Texts texts;
  recallseg_exemplar exemplar = RECALLSEG_EXEMPLAR_INIT;
  recallseg_mask masks[3] = {};
  Guarded planes[3];
  exemplar.mask_count = static_cast<size_t>(from.between(0, 3));
  for (size_t i = 0; i < exemplar.mask_count; ++i) {
    uint8_t* data = nullptr;
    if (!lay_out(from, 2, picture.image.shape, masks[i].strides, 1, planes[i], data)) return;
    masks[i].structure = texts.one(from);
    masks[i].data = data;
    if (data != nullptr && !from.once_in(4)) *planes[i].data = 1;
  }
  exemplar.masks = masks;
  if (from.once_in(20)) exemplar.masks = nullptr;
  exemplar.absent = texts.several(from, exemplar.absent_count);
  exemplar.tags = texts.tags(from, exemplar.tag_count);
  exemplar.key = texts.one(from);
  Given<recallseg_image> image(from, picture.image);
  Given<recallseg_exemplar> given(from, exemplar);
  const size_t room = from.once_in(3) ? static_cast<size_t>(from.between(0, 40)) : 1025;
  std::unique_ptr<char[]> key(new char[room + 1]);
  if (seen(recallseg_library_add(to, image.get(), given.get(), from.once_in(6) ? nullptr : key.get(), room)) != RECALLSEG_OK)
    return;
}

// What was added is removed again, or every run would be slower than the one before.
void tidy() {
  recallseg_list* list = nullptr;
  if (recallseg_library_list(writing, &list) != RECALLSEG_OK) return;
  size_t count = 0;
  recallseg_list_count(list, &count);
  for (size_t i = 5; i < count; ++i) {
    recallseg_listed one = RECALLSEG_LISTED_INIT;
    if (recallseg_list_exemplar(list, i, &one) == RECALLSEG_OK)
      must(recallseg_library_remove(writing, one.key) == RECALLSEG_OK, "what was added is removed");
  }
  recallseg_list_close(list);
}

void list(Bytes& from, recallseg_library* of) {
  recallseg_list* made = nullptr;
  if (seen(recallseg_library_list(of, from.once_in(20) ? nullptr : &made)) != RECALLSEG_OK) return;
  size_t count = 0;
  seen(recallseg_list_count(made, &count));
  Given<recallseg_listed> one(from, RECALLSEG_LISTED_INIT);
  seen(recallseg_list_exemplar(made, from.once_in(4) ? from.take<size_t>() : from.take<uint8_t>() % 6, one.get()));
  must(seen(recallseg_list_close(made)) == RECALLSEG_OK, "a list is closed");
}

recallseg_gpu_options gpu(Bytes& from) {
  recallseg_gpu_options made = RECALLSEG_GPU_OPTIONS_INIT;
  made.ordinal = from.take<int8_t>();
  made.cache_bytes = from.take<uint64_t>();
  made.cuda_graphs = from.take<int8_t>();
  return made;
}

recallseg_segmenter* open_segmenter(Bytes& from, recallseg_library* of) {
  Texts texts;
  recallseg_segmenter_options options = RECALLSEG_SEGMENTER_OPTIONS_INIT;
  const recallseg_gpu_options device = gpu(from);
  Given<recallseg_gpu_options> given_device(from, device);
  const int32_t cores[] = {0, 1, -1, 100000};
  options.k = from.once_in(8) ? from.take<int32_t>() : static_cast<int32_t>(from.between(0, 5));
  if (!from.once_in(3)) options.structures = texts.several(from, options.structure_count);
  options.engine = from.once_in(4) ? texts.one(from) : "fake";
  if (options.engine == nullptr || *options.engine == '\0') options.engine = "fake";
  options.precision = from.once_in(6) ? texts.one(from) : nullptr;
  options.threads = from.once_in(12) ? (from.once_in(2) ? -1 : 1 << 20) : 1;
  options.memories = from.once_in(8) ? from.take<int32_t>() : static_cast<int32_t>(from.between(0, 3));
  options.tags = from.once_in(3) ? texts.tags(from, options.tag_count) : nullptr;
  options.reach = from.once_in(6) ? from.take<double>() : 0;
  if (from.once_in(10)) options.audit = reinterpret_cast<recallseg_audit*>(from.take<uintptr_t>());
  if (from.once_in(10)) options.gpu = given_device.get();
  if (from.once_in(8)) {
    options.cores = cores + from.take<uint8_t>() % 4;
    options.core_count = from.once_in(9) ? 1u << 20 : 1;
  }
  if (from.once_in(12)) options.nice = from.once_in(2) ? 100 : -100;
  if (from.once_in(12)) options.realtime = from.once_in(2) ? 1000 : -1;
  Given<recallseg_segmenter_options> given(from, options);
  recallseg_segmenter* made = nullptr;
  seen(recallseg_segmenter_open(of, from.once_in(30) ? nullptr : given.get(), &made));
  return made;
}

void ask_segmenter(Bytes& from, recallseg_segmenter* by, bool own) {
  size_t count = 0;
  const char* name = nullptr;
  int patience = static_cast<int>(from.between(0, 8));
  Given<recallseg_calibration> calibration(from, RECALLSEG_CALIBRATION_INIT);
  switch (from.take<uint8_t>() % 6) {
    case 0: seen(recallseg_segmenter_structure_count(by, from.once_in(9) ? nullptr : &count)); break;
    case 1: seen(recallseg_segmenter_structure(by, from.take<uint8_t>() % 4, &name)); break;
    case 2: seen(recallseg_segmenter_warm_up(by, from.once_in(2) ? from.take<int8_t>() % 3 : -5)); break;
    case 3: if (own) seen(recallseg_segmenter_calibrate(by, told, &patience)); break;
    case 4: seen(recallseg_segmenter_get_calibration(by, from.take<uint8_t>() % 4, calibration.get())); break;
    default: seen(recallseg_segmenter_cancel(by));
  }
}

void frame(const recallseg_frame* made, void*) {
  if (made->status != RECALLSEG_OK) return;
  recallseg_summary summary = RECALLSEG_SUMMARY_INIT;
  must(recallseg_result_summary(made->result, &summary) == RECALLSEG_OK, "a frame has its result");
  volatile uint8_t last = made->label_map[made->rows * made->columns - 1];
  (void)last;
}

void stream(Bytes& from, recallseg_segmenter* by) {
  recallseg_stream_options options = RECALLSEG_STREAM_OPTIONS_INIT;
  options.queue = from.once_in(5) ? from.take<int32_t>() : static_cast<int32_t>(from.between(0, 3));
  options.deadline_ms = deadline(from);
  Given<recallseg_stream_options> given(from, options);
  recallseg_stream* opened = nullptr;
  seen(recallseg_stream_open(by, given.get(), from.once_in(20) ? nullptr : frame, nullptr, &opened));
  if (opened == nullptr) return;
  for (int64_t left = from.between(0, 4); left > 0; --left) {
    Picture picture(from);
    if (!picture.usable) continue;
    Given<recallseg_image> image(from, picture.image);
    uint64_t number = 0;
    seen(recallseg_stream_push(opened, image.get(), from.once_in(2) ? &number : nullptr));
    switch (from.take<uint8_t>() % 8) {
      case 0: seen(recallseg_stream_pause(opened)); break;
      case 1: seen(recallseg_stream_resume(opened)); break;
      case 2: seen(recallseg_stream_restart(opened)); break;
      case 3: seen(recallseg_stream_drain(opened, deadline(from) > 1e6 ? 1 : deadline(from))); break;
      default: break;
    }
  }
  Given<recallseg_stream_statistics> statistics(from, RECALLSEG_STREAM_STATISTICS_INIT);
  seen(recallseg_stream_get_statistics(opened, statistics.get()));
  must(seen(recallseg_stream_close(opened)) == RECALLSEG_OK, "a stream is closed");
}

void open_others(Bytes& from) {
  Texts texts;
  recallseg_library_options options = RECALLSEG_LIBRARY_OPTIONS_INIT;
  options.writable = from.once_in(4);
  options.bundle = from.once_in(4) ? texts.one(from) : nullptr;
  options.engine = from.once_in(3) ? texts.one(from) : "fake";
  options.precision = from.once_in(6) ? texts.one(from) : nullptr;
  options.threads = from.once_in(8) ? -7 : 1;
  Given<recallseg_library_options> given(from, options);
  const char* folder = from.once_in(2) ? texts.keep(library_folder) : texts.one(from);
  recallseg_library* opened = nullptr;
  if (from.once_in(3)) {
    const std::string fresh = scratch + "/new";
    seen(recallseg_library_create(from.once_in(3) ? folder : texts.keep(fresh), given.get(), &opened));
    if (opened != nullptr) must(seen(recallseg_library_close(opened)) == RECALLSEG_OK, "closed");
    std::filesystem::remove_all(fresh);
    return;
  }
  seen(recallseg_library_open(folder, given.get(), from.once_in(20) ? nullptr : &opened));
  if (opened != nullptr) must(seen(recallseg_library_close(opened)) == RECALLSEG_OK, "closed");
}

void audit(Bytes& from) {
  Texts texts;
  recallseg_audit_options options = RECALLSEG_AUDIT_OPTIONS_INIT;
  options.key = from.once_in(4) ? texts.one(from) : nullptr;
  Given<recallseg_audit_options> given(from, options);
  recallseg_audit* opened = nullptr;
  const std::string file = scratch + "/audit.jsonl";
  seen(recallseg_audit_open(from.once_in(4) ? texts.one(from) : texts.keep(file), given.get(), &opened));
  if (opened != nullptr) must(seen(recallseg_audit_close(opened)) == RECALLSEG_OK, "closed");
  std::filesystem::remove(file);
}

template <class Handle>
Handle* odd(Bytes& from, Handle* usual, void* other) {
  if (!from.once_in(16)) return usual;
  if (from.once_in(3)) return nullptr;
  return from.once_in(2) ? reinterpret_cast<Handle*>(from.take<uintptr_t>())
                         : reinterpret_cast<Handle*>(other);
}

void log_line(int32_t, const char* logger, const char* message, void*) {
  must(logger != nullptr && message != nullptr, "a line of the log");
}

void call(Bytes& from) {
  Texts texts;
  recallseg_library* const read = odd(from, reading, segmenter);
  recallseg_library* const write = odd(from, writing, segmenter);
  recallseg_segmenter* const by = odd(from, segmenter, reading);
  int patience = static_cast<int>(from.between(0, 12));
  switch (from.take<uint8_t>() % 16) {
    case 0: case 1: case 2: segment(from, by); break;
    case 3: case 4: add(from, write); break;
    case 5: list(from, read); break;
    case 6: {
      const auto made = open_segmenter(from, read);
      if (made == nullptr) break;
      segment(from, made);
      ask_segmenter(from, made, false);
      must(seen(recallseg_segmenter_close(made)) == RECALLSEG_OK, "closed");
      break;
    }
    case 7: ask_segmenter(from, by, false); break;
    case 8: stream(from, by); break;
    case 9: open_others(from); break;
    case 10: audit(from); break;
    case 11: seen(recallseg_library_remove(write, texts.one(from))); break;
    case 12: seen(recallseg_library_retire(write, texts.one(from), from.take<int8_t>())); break;
    case 13: {
      Given<recallseg_verification> report(from, RECALLSEG_VERIFICATION_INIT);
      seen(recallseg_library_verify(read, from.once_in(3) ? nullptr : told, &patience, from.once_in(4) ? nullptr : report.get()));
      break;
    }
    case 14: {
      Given<recallseg_library_info> info(from, RECALLSEG_LIBRARY_INFO_INIT);
      seen(recallseg_library_get_info(read, info.get()));
      Given<recallseg_info> all(from, RECALLSEG_INFO_INIT);
      seen(recallseg_get_info(all.get()));
      break;
    }
    default: {
      seen(recallseg_set_log(from.once_in(3) ? nullptr : log_line, nullptr, from.once_in(4) ? from.take<int32_t>() : 10));
      Given<recallseg_init_options> options(from, RECALLSEG_INIT_OPTIONS_INIT);
      seen(recallseg_init(from.once_in(3) ? from.take<uint32_t>() : RECALLSEG_ABI_VERSION, options.get()));
      recallseg_status_text(from.take<int32_t>());
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  library_folder = getenv("RECALLSEG_FUZZ_LIBRARY");
  scratch = getenv("RECALLSEG_FUZZ_SCRATCH");
  static const char* const ours[] = {"librecallseg", nullptr};
  starving::of = ours;
  must(recallseg_init(RECALLSEG_ABI_VERSION, nullptr) == RECALLSEG_OK, "it starts");
  recallseg_library_options options = RECALLSEG_LIBRARY_OPTIONS_INIT;
  options.engine = "fake";
  options.threads = 1;
  must(recallseg_library_open(library_folder.c_str(), &options, &reading) == RECALLSEG_OK, "opens");
  const std::string copy = scratch + "/writing";
  std::filesystem::copy(library_folder, copy, std::filesystem::copy_options::recursive);
  options.writable = 1;
  must(recallseg_library_open(copy.c_str(), &options, &writing) == RECALLSEG_OK, "opens");
  recallseg_segmenter_options asked = RECALLSEG_SEGMENTER_OPTIONS_INIT;
  const char* const names[] = {"disc", "core"};
  asked.structures = names;
  asked.structure_count = 2;
  asked.engine = "fake";
  asked.threads = 1;
  must(recallseg_segmenter_open(reading, &asked, &segmenter) == RECALLSEG_OK, "opens");
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes from(data, size);
  for (int i = 0; i < 6 && from.left() > 0; ++i) {
    const long starved = from.once_in(3) ? from.between(1, 60) : 0;
    if (starved == 0) {
      call(from);
    } else {
      const starving::Starved hungry(starved);
      call(from);
    }
  }
  tidy();
  return 0;
}
