// A hostile, forgetful and busy caller of librecallseg: checks NAME [LIBRARY] [FOLDER].
// LIBRARY is one that the engine "fake" made and whose two structures are disc and core.
#include <recallseg.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <thread>
#include <vector>

#define CHECK(condition)                                                                  \
  do {                                                                                    \
    if (!(condition)) {                                                                   \
      std::fprintf(stderr, "%s:%d: %s\nlast error: %s\n", __FILE__, __LINE__, #condition, \
                   recallseg_last_error());                                               \
      std::exit(1);                                                                       \
    }                                                                                     \
  } while (false)
#define GIVES(status, call) CHECK((call) == (status))

namespace {

std::string library_folder, scratch_folder;
constexpr int64_t kRows = 48, kColumns = 64;

struct Query {
  std::vector<uint8_t> pixels, labels, masks;
  recallseg_image image = RECALLSEG_IMAGE_INIT;
  recallseg_output output = RECALLSEG_OUTPUT_INIT;

  explicit Query(int64_t rows = kRows, int64_t columns = kColumns)
      : pixels(static_cast<size_t>(rows * columns)),
        labels(pixels.size(), 99),
        masks(2 * pixels.size(), 99) {
    for (size_t i = 0; i < pixels.size(); ++i) {
      const double y = static_cast<double>(i / static_cast<size_t>(columns)) / rows - 0.5;
      const double x = static_cast<double>(i % static_cast<size_t>(columns)) / columns - 0.5;
      pixels[i] = std::hypot(x, y) < 0.1 ? 240 : std::hypot(x, y) < 0.22 ? 180 : 60;
    }
    image.dtype = RECALLSEG_UINT8;
    image.data = pixels.data();
    image.ndim = 2;
    image.shape[0] = output.rows = rows;
    image.shape[1] = output.columns = columns;
    output.label_map = labels.data();
    output.masks = masks.data();
    output.mask_count = 2;
  }
  Query(const Query&) = delete;
};

void init() { GIVES(RECALLSEG_OK, recallseg_init(RECALLSEG_ABI_VERSION, nullptr)); }

recallseg_library* open_library() {
  recallseg_library* library = nullptr;
  GIVES(RECALLSEG_OK, recallseg_library_open(library_folder.c_str(), nullptr, &library));
  return library;
}

recallseg_segmenter* open_segmenter(recallseg_library* library) {
  recallseg_segmenter_options options = RECALLSEG_SEGMENTER_OPTIONS_INIT;
  const char* const names[] = {"disc", "core"};
  options.engine = "fake";
  options.k = 2;
  options.structures = names;
  options.structure_count = 2;
  recallseg_segmenter* segmenter = nullptr;
  GIVES(RECALLSEG_OK, recallseg_segmenter_open(library, &options, &segmenter));
  return segmenter;
}

// What needs no Python: everything here works on a machine without one.
void no_python() {
  GIVES(RECALLSEG_E_ABI, recallseg_init(RECALLSEG_ABI_VERSION + 1, nullptr));
  CHECK(std::strstr(recallseg_last_error(), "ABI") != nullptr);
  CHECK(recallseg_abi_version() == RECALLSEG_ABI_VERSION);
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
  refused(argument, [](Query& q) { q.image.dtype = 77; });
  refused(argument, [](Query& q) { q.image.dtype = -1; });
  refused(argument, [](Query& q) { q.image.ndim = 1; });
  refused(argument, [](Query& q) { q.image.ndim = INT_MAX; });
  refused(argument, [](Query& q) { q.image.ndim = 3; q.image.shape[2] = 4; });
  for (const int64_t side : {int64_t{0}, int64_t{-1}, int64_t{RECALLSEG_MAX_SIDE + 1}, most, least}) {
    refused(argument, [&](Query& q) { q.image.shape[0] = q.output.rows = side; });
    refused(argument, [&](Query& q) { q.image.shape[1] = q.output.columns = side; });
  }
  for (const int64_t stride : {most, least, most / 2, least / 2}) {
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
  options.engine = "steam";
  GIVES(RECALLSEG_E_INPUT, recallseg_segmenter_open(library, &options, &none));
  CHECK(none == nullptr);

  Query sample;
  recallseg_exemplar exemplar = RECALLSEG_EXEMPLAR_INIT;
  GIVES(RECALLSEG_E_LIBRARY_WRITE,
        recallseg_library_add(library, &sample.image, &exemplar, nullptr, 0));
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

void threads() {
  init();
  recallseg_library* library = open_library();
  recallseg_segmenter* shared = open_segmenter(library);
  Query expected;
  GIVES(RECALLSEG_OK, recallseg_segment(shared, &expected.image, &expected.output, 0, nullptr));
  std::atomic<bool> over{false};
  std::vector<std::thread> all;
  for (int t = 0; t < 4; ++t)
    all.emplace_back([&, t] {
      recallseg_segmenter* own = t % 2 == 0 ? shared : open_segmenter(library);
      for (int i = 0; i < 25; ++i) {
        Query query;
        recallseg_result* result = nullptr;
        GIVES(RECALLSEG_OK, recallseg_segment(own, &query.image, &query.output, 0, &result));
        CHECK(query.labels == expected.labels && query.masks == expected.masks);
        GIVES(RECALLSEG_OK, recallseg_result_close(result));
        GIVES(RECALLSEG_E_HANDLE, recallseg_result_close(result));
      }
    });
  // Meanwhile: handles that are closed while others use them, logs, information.
  std::thread closing([&] {
    while (!over) {
      recallseg_segmenter* brief = open_segmenter(library);
      std::thread user([brief] {
        Query query;
        const auto status = recallseg_segment(brief, &query.image, &query.output, 0, nullptr);
        CHECK(status == RECALLSEG_OK || status == RECALLSEG_E_HANDLE);
      });
      GIVES(RECALLSEG_OK, recallseg_segmenter_close(brief));
      user.join();
      GIVES(RECALLSEG_OK, recallseg_set_log([](int32_t, const char*, const char*, void*) {},
                                            nullptr, RECALLSEG_LOG_INFO));
      GIVES(RECALLSEG_OK, recallseg_set_log(nullptr, nullptr, 0));
      recallseg_library_info info = RECALLSEG_LIBRARY_INFO_INIT;
      GIVES(RECALLSEG_OK, recallseg_library_get_info(library, &info));
    }
  });
  for (std::thread& thread : all) thread.join();
  over = true;
  closing.join();
  GIVES(RECALLSEG_OK, recallseg_shutdown());
}

size_t resident_kib() {
  long total = 0, resident = 0;
  std::FILE* file = std::fopen("/proc/self/statm", "r");
  CHECK(file != nullptr && std::fscanf(file, "%ld %ld", &total, &resident) == 2);
  std::fclose(file);
  return static_cast<size_t>(resident * sysconf(_SC_PAGESIZE) / 1024);
}

void memory() {
  init();
  recallseg_segmenter* segmenter = open_segmenter(open_library());
  Query query;
  const auto rounds = [&](int count) {
    for (int i = 0; i < count; ++i) {
      recallseg_result* result = nullptr;
      GIVES(RECALLSEG_OK, recallseg_segment(segmenter, &query.image, &query.output, 0, &result));
      GIVES(RECALLSEG_OK, recallseg_result_close(result));
      if (i % 10 == 0) {
        const auto missed = recallseg_segment(segmenter, &query.image, &query.output, 1e-3, &result);
        GIVES(RECALLSEG_E_DEADLINE, missed);
      }
    }
  };
  rounds(300);
  const size_t before = resident_kib();
  rounds(700);
  const size_t after = resident_kib();
  std::printf("resident %zu KiB, then %zu KiB\n", before, after);
  CHECK(after <= before + 1024);  // a leak of one mask in each call would be 4 MiB
}

void forked() {
  init();
  recallseg_segmenter* segmenter = open_segmenter(open_library());
  Query query;
  GIVES(RECALLSEG_OK, recallseg_segment(segmenter, &query.image, &query.output, 0, nullptr));
  const pid_t child = fork();
  if (child == 0) {
    const bool refused =
        recallseg_segment(segmenter, &query.image, &query.output, 0, nullptr) ==
            RECALLSEG_E_FORKED &&
        recallseg_init(RECALLSEG_ABI_VERSION, nullptr) == RECALLSEG_E_FORKED &&
        recallseg_shutdown() == RECALLSEG_E_FORKED;
    _exit(refused ? 0 : 1);
  }
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
  GIVES(RECALLSEG_OK, recallseg_segment(segmenter, &query.image, &query.output, 0, nullptr));
}

void signals() {
  std::vector<struct sigaction> before(65), after(65);
  const auto read = [](std::vector<struct sigaction>& all) {
    for (int s = 1; s < 65; ++s) sigaction(s, nullptr, &all[static_cast<size_t>(s)]);
  };
  read(before);
  init();
  recallseg_segmenter* segmenter = open_segmenter(open_library());
  Query query;
  GIVES(RECALLSEG_OK, recallseg_segment(segmenter, &query.image, &query.output, 0, nullptr));
  read(after);
  for (size_t s = 1; s < 65; ++s) CHECK(before[s].sa_handler == after[s].sa_handler);
}

struct Seen {
  std::vector<uint64_t> numbers;
  std::vector<recallseg_status> statuses;
  std::vector<uint8_t> labels;
  recallseg_stream* close_at_once = nullptr;
};

void see(const recallseg_frame* frame, void* user) {
  auto& seen = *static_cast<Seen*>(user);
  seen.numbers.push_back(frame->number);
  seen.statuses.push_back(frame->status);
  if (frame->status == RECALLSEG_OK) {
    CHECK(*frame->message == '\0' && frame->rows == kRows && frame->columns == kColumns);
    seen.labels.assign(frame->label_map, frame->label_map + kRows * kColumns);
    recallseg_score score = RECALLSEG_SCORE_INIT;
    GIVES(RECALLSEG_OK, recallseg_result_score(frame->result, 0, &score));
    CHECK(std::isnan(score.area_mm2) && score.recalled_count == 2);
  } else {
    CHECK(*frame->message != '\0' && frame->label_map == nullptr && frame->result == nullptr);
  }
  if (seen.close_at_once != nullptr)
    GIVES(RECALLSEG_OK, recallseg_stream_close(seen.close_at_once));
}

void streams() {
  init();
  recallseg_segmenter* segmenter = open_segmenter(open_library());
  Query query;
  GIVES(RECALLSEG_OK, recallseg_segment(segmenter, &query.image, &query.output, 0, nullptr));
  recallseg_stream_options options = RECALLSEG_STREAM_OPTIONS_INIT;
  recallseg_stream* stream = nullptr;
  GIVES(RECALLSEG_E_ARGUMENT, recallseg_stream_open(segmenter, &options, nullptr, nullptr, &stream));
  options.deadline_ms = -1;
  Seen seen;
  GIVES(RECALLSEG_E_ARGUMENT, recallseg_stream_open(segmenter, &options, see, &seen, &stream));
  options.deadline_ms = 0;
  options.queue = -3;
  GIVES(RECALLSEG_E_INPUT, recallseg_stream_open(segmenter, &options, see, &seen, &stream));
  CHECK(stream == nullptr);
  options.queue = 3;
  GIVES(RECALLSEG_OK, recallseg_stream_open(segmenter, &options, see, &seen, &stream));
  uint64_t number = 99;
  for (uint64_t i = 0; i < 3; ++i) {
    GIVES(RECALLSEG_OK, recallseg_stream_push(stream, &query.image, &number));
    CHECK(number == i);
  }
  GIVES(RECALLSEG_OK, recallseg_stream_drain(stream, 60e3));
  GIVES(RECALLSEG_OK, recallseg_stream_pause(stream));
  GIVES(RECALLSEG_OK, recallseg_stream_push(stream, &query.image, nullptr));
  GIVES(RECALLSEG_OK, recallseg_stream_resume(stream));
  GIVES(RECALLSEG_OK, recallseg_stream_restart(stream));
  std::vector<float> bad(query.pixels.size(), std::nanf(""));
  Query broken;
  broken.image.dtype = RECALLSEG_FLOAT32;
  broken.image.data = bad.data();
  GIVES(RECALLSEG_OK, recallseg_stream_push(stream, &broken.image, nullptr));
  GIVES(RECALLSEG_OK, recallseg_stream_drain(stream, 60e3));
  CHECK((seen.numbers == std::vector<uint64_t>{0, 1, 2, 4}));
  CHECK(seen.statuses.back() == RECALLSEG_E_INPUT && seen.statuses.front() == RECALLSEG_OK);
  CHECK(seen.labels == query.labels);
  recallseg_stream_statistics counts = RECALLSEG_STREAM_STATISTICS_INIT;
  GIVES(RECALLSEG_OK, recallseg_stream_get_statistics(stream, &counts));
  CHECK(counts.pushed == 5 && counts.segmented == 3 && counts.failed == 1 && counts.ignored == 1);
  CHECK(counts.dropped == 0 && counts.late == 0);
  GIVES(RECALLSEG_OK, recallseg_stream_close(stream));
  GIVES(RECALLSEG_E_HANDLE, recallseg_stream_push(stream, &query.image, nullptr));
  GIVES(RECALLSEG_E_HANDLE, recallseg_stream_close(stream));

  Seen late;
  options.deadline_ms = 1e-3;
  GIVES(RECALLSEG_OK, recallseg_stream_open(segmenter, &options, see, &late, &stream));
  GIVES(RECALLSEG_OK, recallseg_stream_push(stream, &query.image, nullptr));
  GIVES(RECALLSEG_OK, recallseg_stream_drain(stream, 60e3));
  CHECK(late.statuses.at(0) == RECALLSEG_E_DEADLINE);

  Seen once;
  options.deadline_ms = 0;
  GIVES(RECALLSEG_OK, recallseg_stream_open(segmenter, &options, see, &once, &stream));
  once.close_at_once = stream;  // from within its callback
  GIVES(RECALLSEG_OK, recallseg_stream_push(stream, &query.image, nullptr));
  while (recallseg_stream_drain(stream, 1) != RECALLSEG_E_HANDLE) usleep(1000);

  Seen open;
  GIVES(RECALLSEG_OK, recallseg_stream_open(segmenter, &options, see, &open, &stream));
  GIVES(RECALLSEG_OK, recallseg_stream_push(stream, &query.image, nullptr));
  GIVES(RECALLSEG_OK, recallseg_shutdown());
}

// SIGINT must end the host, as it did before: Python's own handler would only note it.
void interrupted() {
  init();
  raise(SIGINT);
}

void logging() {
  static std::string seen;
  static int32_t highest = 0;
  static int answer = 42;
  GIVES(RECALLSEG_OK, recallseg_set_log(
                          [](int32_t level, const char* logger, const char* message, void* user) {
                            CHECK(*static_cast<int*>(user) == 42);
                            CHECK(std::strncmp(logger, "recallseg", 9) == 0);
                            if (level > highest) highest = level;
                            seen += message;
                          },
                          &answer, RECALLSEG_LOG_INFO));
  init();
  recallseg_library* library = open_library();
  CHECK(seen.find("opened Library(") != std::string::npos && highest == RECALLSEG_LOG_INFO);
  open_segmenter(library);
  CHECK(seen.find("RANDOM WEIGHTS") != std::string::npos && highest == RECALLSEG_LOG_WARNING);
  GIVES(RECALLSEG_OK, recallseg_set_log(nullptr, nullptr, 0));
  seen.clear();
  open_library();
  CHECK(seen.empty());
}

void exemplars() {
  init();
  recallseg_library_options options = RECALLSEG_LIBRARY_OPTIONS_INIT;
  options.engine = "fake";
  recallseg_library* library = nullptr;
  const std::string folder = scratch_folder + "/made in C: \xc3\xa9";
  GIVES(RECALLSEG_E_INPUT, recallseg_library_create(folder.c_str(), &options, &library));
  recallseg_library* known = open_library();
  recallseg_library_info info = RECALLSEG_LIBRARY_INFO_INIT;
  GIVES(RECALLSEG_OK, recallseg_library_get_info(known, &info));
  const std::string bundle = scratch_folder + "/../bundle";
  options.bundle = bundle.c_str();
  GIVES(RECALLSEG_OK, recallseg_library_create(folder.c_str(), &options, &library));

  Query sample;
  std::vector<uint8_t> disc(sample.pixels.size());
  for (size_t i = 0; i < disc.size(); ++i) disc[i] = sample.pixels[i] > 100 ? 255 : 0;
  const recallseg_mask masks[] = {{"disc", disc.data(), {0, 0}}};
  const char* const absent[] = {"core"};
  const recallseg_tag tags[] = {{"view", "axial"}};
  recallseg_exemplar exemplar = RECALLSEG_EXEMPLAR_INIT;
  exemplar.masks = masks;
  exemplar.mask_count = 1;
  exemplar.absent = absent;
  exemplar.absent_count = 1;
  exemplar.tags = tags;
  exemplar.tag_count = 1;
  char key[1025];
  GIVES(RECALLSEG_OK, recallseg_library_add(library, &sample.image, &exemplar, key, sizeof key));
  CHECK(std::strlen(key) == 32);
  GIVES(RECALLSEG_E_INPUT, recallseg_library_add(library, &sample.image, &exemplar, nullptr, 0));
  exemplar.key = "second";
  GIVES(RECALLSEG_OK, recallseg_library_add(library, &sample.image, &exemplar, key, sizeof key));
  CHECK(std::strcmp(key, "second") == 0);
  const recallseg_mask twice[] = {masks[0], masks[0]};
  exemplar.masks = twice;
  exemplar.mask_count = 2;
  exemplar.key = "third";
  GIVES(RECALLSEG_E_INPUT, recallseg_library_add(library, &sample.image, &exemplar, key, sizeof key));

  GIVES(RECALLSEG_OK, recallseg_library_get_info(library, &info));
  CHECK(info.exemplars == 2 && info.structures == 1 && info.writable == 1);
  recallseg_library_options writing = RECALLSEG_LIBRARY_OPTIONS_INIT;
  writing.writable = 1;
  recallseg_library* second = nullptr;
  const pid_t child = fork();  // the lock is a process's: another program must be refused
  if (child == 0) execl("/proc/self/exe", "checks", "locked", folder.c_str(), nullptr);
  int status = -1;
  CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 0);
  GIVES(RECALLSEG_OK, recallseg_library_close(library));
  GIVES(RECALLSEG_OK, recallseg_library_open(folder.c_str(), &writing, &second));
}

void locked() {
  init();
  recallseg_library_options writing = RECALLSEG_LIBRARY_OPTIONS_INIT;
  writing.writable = 1;
  recallseg_library* library = nullptr;
  GIVES(RECALLSEG_E_LIBRARY_LOCKED,
        recallseg_library_open(library_folder.c_str(), &writing, &library));
}

void info() {
  init();
  init();  // harmless
  recallseg_info info = RECALLSEG_INFO_INIT;
  GIVES(RECALLSEG_OK, recallseg_get_info(&info));
  std::printf("%d\n%s\n%s\n%s\n%s\n%s\n%s\n", info.hosted, info.python_version,
              info.python_library, info.python, info.python_prefix, info.package_version,
              info.package_folder);
}

// The outcome of recallseg_init alone: its status and message.
void starts() {
  std::printf("%d\n", recallseg_init(RECALLSEG_ABI_VERSION, nullptr));
  std::printf("%s\n", recallseg_last_error());
}

}  // namespace

int main(int argc, char** argv) {
  const std::map<std::string, void (*)()> checks = {
      {"no_python", no_python}, {"hostile", hostile},     {"layouts", layouts},
      {"deadline", deadline},   {"threads", threads},     {"memory", memory},
      {"forked", forked},       {"signals", signals},     {"logging", logging},
      {"locked", locked},       {"exemplars", exemplars}, {"info", info},
      {"starts", starts},       {"interrupted", interrupted}, {"streams", streams}};
  const auto found = argc > 1 ? checks.find(argv[1]) : checks.end();
  if (found == checks.end()) return 2;
  if (argc > 2) library_folder = argv[2];
  if (argc > 3) scratch_folder = argv[3];
  found->second();
  std::printf("%s: done\n", argv[1]);
  return 0;
}
