// Single calls: right ones, wrong ones, and those that come too late.
#include "checks.h"

#include <climits>
#include <cstring>
#include <functional>
#include <limits>
#include <thread>

// What needs no Python: everything here works on a machine without one.
void no_python() {
  GIVES(RECALLSEG_E_ABI, recallseg_init(RECALLSEG_ABI_VERSION + 100, nullptr));
  CHECK(std::strstr(recallseg_last_error(), "ABI") != nullptr);
  GIVES(RECALLSEG_E_ABI, recallseg_init(0, nullptr));
  CHECK(recallseg_abi_version() >= RECALLSEG_ABI_VERSION);  // an older program's is less
  CHECK(std::strcmp(recallseg_version(), RECALLSEG_VERSION) == 0);
  CHECK(std::strcmp(recallseg_status_text(12345), "unknown status") == 0);
  CHECK(std::strcmp(recallseg_status_text(RECALLSEG_OK), "ok") == 0);

  recallseg_library* library = nullptr;
  Query query;
  GIVES(RECALLSEG_E_STATE, recallseg_library_open("x", nullptr, &library));
  GIVES(RECALLSEG_E_STATE, recallseg_segment(nullptr, &query.image, &query.output, 0, nullptr));
  GIVES(RECALLSEG_E_STATE, recallseg_shutdown());

  recallseg_init_options options = RECALLSEG_INIT_OPTIONS_INIT;
  options.struct_size = 3;
  GIVES(RECALLSEG_E_ARGUMENT, recallseg_init(RECALLSEG_ABI_VERSION, &options));
  options.struct_size = UINT_MAX;
  GIVES(RECALLSEG_E_ARGUMENT, recallseg_init(RECALLSEG_ABI_VERSION, &options));
  struct {
    recallseg_init_options known = RECALLSEG_INIT_OPTIONS_INIT;
    uint64_t newer = 1;
  } future;
  future.known.struct_size = sizeof future;
  GIVES(RECALLSEG_E_ABI, recallseg_init(RECALLSEG_ABI_VERSION, &future.known));

  options.struct_size = sizeof options;
  options.reserved = 7;
  GIVES(RECALLSEG_E_ABI, recallseg_init(RECALLSEG_ABI_VERSION, &options));
  options.reserved = 0;
  options.python = "/nowhere/python3";
  GIVES(RECALLSEG_E_PYTHON, recallseg_init(RECALLSEG_ABI_VERSION, &options));
  CHECK(std::strstr(recallseg_last_error(), "/nowhere/python3") != nullptr);
  options.python = "python3";  // never looked for along PATH
  GIVES(RECALLSEG_E_PYTHON, recallseg_init(RECALLSEG_ABI_VERSION, &options));
  options.python = "/bin/sh";
  options.python_library = "/nowhere/libpython.so";
  GIVES(RECALLSEG_E_PYTHON, recallseg_init(RECALLSEG_ABI_VERSION, &options));

  // Every thread has its own last error.
  std::thread([] { CHECK(*recallseg_last_error() == '\0'); }).join();
  CHECK(*recallseg_last_error() != '\0');
}

void hostile() {
  init();
  recallseg_library* library = open_library();
  recallseg_segmenter* segmenter = open_segmenter(library);
  recallseg_result* result = nullptr;
  const auto refused = [&](recallseg_status status, const std::function<void(Query&)>& spoil) {
    Query query;
    spoil(query);
    GIVES(status, recallseg_segment(segmenter, &query.image, &query.output, 0, &result));
    CHECK(result == nullptr);
    for (const uint8_t label : query.labels) CHECK(label == 99);
  };
  const auto argument = RECALLSEG_E_ARGUMENT;
  constexpr int64_t most = std::numeric_limits<int64_t>::max();
  constexpr int64_t least = std::numeric_limits<int64_t>::min();

  refused(argument, [](Query& q) { q.image.data = nullptr; });
  refused(argument, [](Query& q) { q.image.struct_size = 0; });
  refused(RECALLSEG_E_ABI, [](Query& q) { q.image.reserved = 1; });
  refused(RECALLSEG_E_ABI, [](Query& q) { q.output.reserved = 1; });
  CHECK(std::strstr(recallseg_last_error(), "output->reserved is 1, and must be 0") != nullptr);
  refused(argument, [](Query& q) { q.image.dtype = 77; });
  refused(argument, [](Query& q) { q.image.dtype = -1; });
  refused(argument, [](Query& q) { q.image.ndim = 1; });
  refused(argument, [](Query& q) { q.image.ndim = INT_MAX; });
  refused(argument, [](Query& q) { q.image.ndim = 3; q.image.shape[2] = 4; });
  for (const int64_t side : {int64_t{0}, int64_t{-1}, int64_t{RECALLSEG_MAX_SIDE + 1}, most, least}) {
    refused(argument, [&](Query& q) { q.image.shape[0] = q.output.rows = side; });
    refused(argument, [&](Query& q) { q.image.shape[1] = q.output.columns = side; });
  }
  for (const int64_t stride : {most, least, most / 2, least / 2, most >> 8, -(most >> 8) - 1}) {
    refused(argument, [&](Query& q) { q.image.strides[0] = stride; q.image.strides[1] = 1; });
    refused(argument, [&](Query& q) { q.output.label_strides[0] = stride; q.output.label_strides[1] = 1; });
    refused(argument, [&](Query& q) { q.output.mask_strides[0] = stride; q.output.mask_strides[2] = 1; });
  }
  refused(argument, [](Query& q) { q.image.strides[0] = kColumns; });  // and 0 for columns
  refused(argument, [](Query& q) { q.image.dtype = RECALLSEG_UINT16; q.image.shape[1] = q.output.columns = 8; q.image.strides[0] = 17; q.image.strides[1] = 2; });
  refused(argument, [](Query& q) { q.image.dtype = RECALLSEG_UINT16; q.image.data = q.pixels.data() + 1; q.image.shape[1] = q.output.columns = 8; });
  for (const double spacing : {-1.0, std::nan(""), static_cast<double>(INFINITY)})
    refused(argument, [&](Query& q) { q.image.spacing[1] = spacing; });
  refused(argument, [](Query& q) { q.output.rows = kRows - 1; });
  refused(argument, [](Query& q) { q.output.label_map = q.output.masks = nullptr; });
  refused(argument, [](Query& q) { q.output.mask_count = 3; });
  refused(argument, [](Query& q) { q.output.struct_size = 7; });
  refused(argument, [](Query& q) { q.output.label_strides[0] = 1; q.output.label_strides[1] = 1; });
  refused(argument, [](Query& q) { q.output.mask_strides[0] = 5; q.output.mask_strides[1] = kColumns; q.output.mask_strides[2] = 1; });
  Query query;
  const recallseg_image* no_image = nullptr;
  GIVES(argument, recallseg_segment(segmenter, no_image, &query.output, 0, &result));
  GIVES(argument, recallseg_segment(segmenter, &query.image, nullptr, 0, &result));
  for (const double deadline : {-1.0, std::nan(""), static_cast<double>(INFINITY)})
    GIVES(argument, recallseg_segment(segmenter, &query.image, &query.output, deadline, &result));

  // What numpy would take and RecallSeg does not: its own message and status.
  std::vector<float> floats(query.pixels.size(), std::nanf(""));
  query.image.dtype = RECALLSEG_FLOAT32;
  query.image.data = floats.data();
  GIVES(RECALLSEG_E_INPUT, recallseg_segment(segmenter, &query.image, &query.output, 0, &result));
  CHECK(std::strstr(recallseg_last_error(), "NaN") != nullptr);

  // Handles: null, made up, of another kind, closed, and their slot used again.
  Query good;
  const auto run = [&](recallseg_segmenter* on) {
    return recallseg_segment(on, &good.image, &good.output, 0, &result);
  };
  GIVES(RECALLSEG_E_HANDLE, run(nullptr));
  GIVES(RECALLSEG_E_HANDLE, run(reinterpret_cast<recallseg_segmenter*>(library)));
  GIVES(RECALLSEG_E_HANDLE, run(reinterpret_cast<recallseg_segmenter*>(&good)));
  for (const uintptr_t made_up : {uintptr_t{1}, uintptr_t{2}, ~uintptr_t{0}, uintptr_t{0xdeadbeef}})
    GIVES(RECALLSEG_E_HANDLE, run(reinterpret_cast<recallseg_segmenter*>(made_up)));
  GIVES(RECALLSEG_OK, recallseg_segmenter_close(segmenter));
  GIVES(RECALLSEG_E_HANDLE, recallseg_segmenter_close(segmenter));
  recallseg_segmenter* later = open_segmenter(library);
  CHECK(later != segmenter);
  GIVES(RECALLSEG_E_HANDLE, run(segmenter));
  GIVES(RECALLSEG_OK, recallseg_library_close(library));  // its segmenter keeps it open
  GIVES(RECALLSEG_E_HANDLE, recallseg_library_close(library));
  GIVES(RECALLSEG_OK, run(later));

  // Results: indexes, null answers, a struct of another size.
  recallseg_score score = RECALLSEG_SCORE_INIT;
  recallseg_tag tag;
  const char* text = nullptr;
  double ms = 0;
  GIVES(argument, recallseg_result_score(result, 2, &score));
  GIVES(argument, recallseg_result_score(result, SIZE_MAX, &score));
  GIVES(argument, recallseg_result_score(result, 0, nullptr));
  GIVES(argument, recallseg_result_tag(result, 0, 99, 0, &tag));
  GIVES(argument, recallseg_result_reason(result, 0, 99, &text));
  GIVES(argument, recallseg_result_timing(result, 0, nullptr, &ms));
  score.struct_size = 1;
  GIVES(argument, recallseg_result_score(result, 0, &score));
  GIVES(RECALLSEG_OK, recallseg_result_close(result));
  score.struct_size = sizeof score;
  GIVES(RECALLSEG_E_HANDLE, recallseg_result_score(result, 0, &score));

  // Text and options.
  recallseg_library* other = nullptr;
  GIVES(argument, recallseg_library_open(nullptr, nullptr, &other));
  GIVES(argument, recallseg_library_open("", nullptr, &other));
  GIVES(argument, recallseg_library_open("x", nullptr, nullptr));
  GIVES(argument, recallseg_library_open("\xff\xfe", nullptr, &other));
  GIVES(RECALLSEG_E_LIBRARY_NOT_FOUND, recallseg_library_open("/nowhere/lib", nullptr, &other));
  CHECK(other == nullptr);
  recallseg_library_options of = RECALLSEG_LIBRARY_OPTIONS_INIT;
  of.threads = -5;
  GIVES(argument, recallseg_library_open(library_folder.c_str(), &of, &other));
  of.threads = 0;
  of.reserved = -1;
  GIVES(RECALLSEG_E_ABI, recallseg_library_open(library_folder.c_str(), &of, &other));
  of.reserved = 0;
  of.bundle = "/nowhere/bundle";
  GIVES(RECALLSEG_E_BUNDLE, recallseg_library_open(library_folder.c_str(), &of, &other));
  library = open_library();
  recallseg_segmenter* none = nullptr;
  recallseg_segmenter_options options = RECALLSEG_SEGMENTER_OPTIONS_INIT;
  options.structure_count = SIZE_MAX;
  GIVES(argument, recallseg_segmenter_open(library, &options, &none));
  const char* const unknown[] = {"liver", nullptr};
  options.structures = unknown;
  options.structure_count = 2;
  GIVES(argument, recallseg_segmenter_open(library, &options, &none));
  options.structure_count = 1;
  GIVES(RECALLSEG_E_INPUT, recallseg_segmenter_open(library, &options, &none));
  options.structure_count = 0;
  GIVES(RECALLSEG_E_INPUT, recallseg_segmenter_open(library, &options, &none));
  CHECK(std::strstr(recallseg_last_error(), "leave it null") != nullptr);
  options.structures = nullptr;
  options.reach = 0.5;
  GIVES(RECALLSEG_E_INPUT, recallseg_segmenter_open(library, &options, &none));
  CHECK(std::strstr(recallseg_last_error(), "reach") != nullptr);
  options.reach = 0;
  const recallseg_tag nobodys[] = {{"modality", "thermometer"}};
  options.tags = nobodys;
  options.tag_count = 1;
  GIVES(RECALLSEG_E_INPUT, recallseg_segmenter_open(library, &options, &none));
  CHECK(std::strstr(recallseg_last_error(), "thermometer") != nullptr);
  options.tag_count = 0;
  options.engine = "steam";
  GIVES(RECALLSEG_E_INPUT, recallseg_segmenter_open(library, &options, &none));
  CHECK(none == nullptr);

  Query sample;
  recallseg_exemplar exemplar = RECALLSEG_EXEMPLAR_INIT;
  GIVES(RECALLSEG_E_LIBRARY_WRITE,
        recallseg_library_add(library, &sample.image, &exemplar, nullptr, 0));
  CHECK(std::strstr(recallseg_last_error(), "recallseg_library_options.writable") != nullptr);
  exemplar.reserved = 1;
  GIVES(RECALLSEG_E_ABI, recallseg_library_add(library, &sample.image, &exemplar, nullptr, 0));
  exemplar.reserved = 0;
  char small[8];
  GIVES(argument, recallseg_library_add(library, &sample.image, &exemplar, small, sizeof small));
  exemplar.mask_count = 1;
  GIVES(argument, recallseg_library_add(library, &sample.image, &exemplar, nullptr, 0));
  GIVES(RECALLSEG_E_ARGUMENT, recallseg_set_log([](int32_t, const char*, const char*, void*) {},
                                                nullptr, 0));

  GIVES(RECALLSEG_OK, recallseg_shutdown());
  GIVES(RECALLSEG_E_STATE, run(later));
  init();
  GIVES(RECALLSEG_E_HANDLE, run(later));  // shutdown closed it
  recallseg_init_options elsewhere = RECALLSEG_INIT_OPTIONS_INIT;
  elsewhere.python = "/bin/sh";
  GIVES(RECALLSEG_E_STATE, recallseg_init(RECALLSEG_ABI_VERSION, &elsewhere));
}

// Every layout of the same pixels gives the same answer.
void layouts() {
  init();
  recallseg_segmenter* segmenter = open_segmenter(open_library());
  Query plain;
  recallseg_result* result = nullptr;
  plain.image.spacing[0] = plain.image.spacing[1] = 0.5;
  GIVES(RECALLSEG_OK, recallseg_segment(segmenter, &plain.image, &plain.output, 0, &result));
  const size_t count = plain.pixels.size();
  size_t labelled = 0;
  for (const uint8_t label : plain.labels) labelled += label != 0;
  CHECK(labelled > 0);
  for (const uint8_t mask : plain.masks) CHECK(mask <= 1);

  recallseg_summary summary = RECALLSEG_SUMMARY_INIT;
  GIVES(RECALLSEG_OK, recallseg_result_summary(result, &summary));
  CHECK(summary.structure_count == 2 && summary.k == 2 && summary.timing_count > 5);
  CHECK(std::strlen(summary.library_digest) == 64 && std::strlen(summary.bundle_identity) == 64);
  for (const char* part : {"\"recipe\"", "\"reach\"", "\"graphs\"", "\"memories\"", "\"version\""})
    CHECK(std::strstr(summary.provenance, part) != nullptr);
  for (size_t s = 0; s < 2; ++s) {
    recallseg_score score = RECALLSEG_SCORE_INIT;
    GIVES(RECALLSEG_OK, recallseg_result_score(result, s, &score));
    size_t pixels = 0;
    for (size_t i = 0; i < count; ++i) pixels += plain.masks[s * count + i];
    CHECK(score.pixels == pixels && score.area_mm2 == 0.25 * static_cast<double>(pixels));
    CHECK(score.label == static_cast<int>(s) + 1 && score.recalled_count == 2);
    recallseg_recalled first = RECALLSEG_RECALLED_INIT, second = RECALLSEG_RECALLED_INIT;
    GIVES(RECALLSEG_OK, recallseg_result_recalled(result, s, 0, &first));
    GIVES(RECALLSEG_OK, recallseg_result_recalled(result, s, 1, &second));
    CHECK(first.similarity >= second.similarity && first.similarity > 0.9);
    recallseg_tag tag;
    GIVES(RECALLSEG_OK, recallseg_result_tag(result, s, 0, 0, &tag));
    CHECK(first.tag_count == 1 && std::strcmp(tag.name, "modality") == 0 &&
          std::strcmp(tag.value, "MR") == 0);
  }

  // Padded rows, bottom-up rows, every second column; outputs alike.
  constexpr int64_t pitch = 2 * kColumns + 6;
  std::vector<uint8_t> wide(kRows * pitch, 7), out(kRows * pitch, 99);
  for (int64_t y = 0; y < kRows; ++y)
    for (int64_t x = 0; x < kColumns; ++x)
      wide[static_cast<size_t>((kRows - 1 - y) * pitch + 2 * x)] =
          plain.pixels[static_cast<size_t>(y * kColumns + x)];
  Query odd;
  odd.image.data = wide.data() + (kRows - 1) * pitch;
  odd.image.strides[0] = -pitch;
  odd.image.strides[1] = 2;
  odd.output.label_map = out.data() + (kRows - 1) * pitch;
  odd.output.label_strides[0] = -pitch;
  odd.output.label_strides[1] = 2;
  odd.output.mask_strides[0] = 1;  // interleaved masks
  odd.output.mask_strides[1] = 2 * kColumns;
  odd.output.mask_strides[2] = 2;
  GIVES(RECALLSEG_OK, recallseg_segment(segmenter, &odd.image, &odd.output, 0, nullptr));
  for (int64_t y = 0; y < kRows; ++y)
    for (int64_t x = 0; x < pitch; ++x) {
      const uint8_t value = out[static_cast<size_t>((kRows - 1 - y) * pitch + x)];
      const bool used = x < 2 * kColumns && x % 2 == 0;
      CHECK(value == (used ? plain.labels[static_cast<size_t>(y * kColumns + x / 2)] : 99));
    }
  for (size_t i = 0; i < count; ++i)
    for (size_t s = 0; s < 2; ++s) CHECK(odd.masks[2 * i + s] == plain.masks[s * count + i]);
}

void deadline() {
  init();
  recallseg_segmenter* segmenter = open_segmenter(open_library());
  GIVES(RECALLSEG_OK, recallseg_segmenter_warm_up(segmenter, 1));
  Query large(2048, 2048), query;
  recallseg_result* result = nullptr;
  GIVES(RECALLSEG_E_DEADLINE,
        recallseg_segment(segmenter, &large.image, &large.output, 0.01, &result));
  CHECK(result == nullptr && std::strstr(recallseg_last_error(), "not done in") != nullptr);
  GIVES(RECALLSEG_OK, recallseg_segment(segmenter, &query.image, &query.output, 60e3, &result));
}
