// What the checks share: a failing check ends the process; a query; opened handles.
#pragma once

#include <recallseg.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>
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

inline std::string library_folder, scratch_folder;
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

inline void init() { GIVES(RECALLSEG_OK, recallseg_init(RECALLSEG_ABI_VERSION, nullptr)); }

inline recallseg_library* open_library() {
  recallseg_library* library = nullptr;
  GIVES(RECALLSEG_OK, recallseg_library_open(library_folder.c_str(), nullptr, &library));
  return library;
}

inline recallseg_segmenter* open_segmenter(recallseg_library* library) {
  recallseg_segmenter_options options = RECALLSEG_SEGMENTER_OPTIONS_INIT;
  const char* const names[] = {"disc", "core"};
  options.engine = "fake";
  options.k = 2;
  options.reach = std::numeric_limits<double>::infinity();
  options.structures = names;
  options.structure_count = 2;
  recallseg_segmenter* segmenter = nullptr;
  GIVES(RECALLSEG_OK, recallseg_segmenter_open(library, &options, &segmenter));
  return segmenter;
}

// calls.cpp
void no_python();
void hostile();
void layouts();
void deadline();

// wrapper.cpp
void wrapper();

// second.cpp
void lists();
void verifies();
void cancels();
void audits();
void schedules();
void sessions_log();

// life.cpp
void threads();
void memory();
void forked();
void signals();
void streams();
void interrupted();
void logging();
void exemplars();
void calibrates();
void locked();
void exits_in_a_frame();
void exits_in_calls();
void exits_in_a_callback();
void info();
void starts();
