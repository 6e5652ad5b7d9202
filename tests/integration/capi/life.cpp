// A program's life: threads, memory, forks, signals, streams, logs, exemplars.
#include "checks.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <thread>

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
  bool ends = false;  // recallseg_shutdown may have begun when a frame comes
};

void see(const recallseg_frame* frame, void* user) {
  auto& seen = *static_cast<Seen*>(user);
  seen.numbers.push_back(frame->number);
  seen.statuses.push_back(frame->status);
  if (frame->status == RECALLSEG_OK) {
    CHECK(*frame->message == '\0' && frame->rows == kRows && frame->columns == kColumns);
    seen.labels.assign(frame->label_map, frame->label_map + kRows * kColumns);
    recallseg_score score = RECALLSEG_SCORE_INIT;
    const recallseg_status given = recallseg_result_score(frame->result, 0, &score);
    if (seen.ends && given == RECALLSEG_E_STATE) return;
    CHECK(given == RECALLSEG_OK);
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
  open.ends = true;
  GIVES(RECALLSEG_OK, recallseg_stream_open(segmenter, &options, see, &open, &stream));
  GIVES(RECALLSEG_OK, recallseg_stream_push(stream, &query.image, nullptr));
  GIVES(RECALLSEG_OK, recallseg_shutdown());

  init();
  segmenter = open_segmenter(open_library());
  std::atomic<int> at{0};  // 1: in the callback, 2: out of it
  const auto slow = [](const recallseg_frame*, void* user) {
    auto& place = *static_cast<std::atomic<int>*>(user);
    place = 1;
    usleep(300000);
    place = 2;
  };
  GIVES(RECALLSEG_OK, recallseg_stream_open(segmenter, &options, slow, &at, &stream));
  GIVES(RECALLSEG_OK, recallseg_stream_push(stream, &query.image, nullptr));
  while (at == 0) usleep(200);
  GIVES(RECALLSEG_OK, recallseg_shutdown());
  CHECK(at == 2);  // what the callback was given may be gone now
}

namespace {

recallseg_segmenter* open_real_segmenter() {
  recallseg_segmenter* segmenter = nullptr;
  recallseg_segmenter_options options = RECALLSEG_SEGMENTER_OPTIONS_INIT;
  options.k = 2;
  GIVES(RECALLSEG_OK, recallseg_segmenter_open(open_library(), &options, &segmenter));
  return segmenter;
}

}  // namespace

// main returns while a frame is in work, and others wait; `told` is gone then.
void exits_in_a_frame() {
  init();
  recallseg_segmenter* segmenter = open_real_segmenter();
  recallseg_stream_options options = RECALLSEG_STREAM_OPTIONS_INIT;
  options.queue = 8;
  recallseg_stream* stream = nullptr;
  Query query;
  std::atomic<int> told{0};
  GIVES(RECALLSEG_OK,
        recallseg_stream_open(
            segmenter, &options,
            [](const recallseg_frame*, void* user) { ++*static_cast<std::atomic<int>*>(user); },
            &told, &stream));
  for (int i = 0; i < 8; ++i) GIVES(RECALLSEG_OK, recallseg_stream_push(stream, &query.image, nullptr));
  while (told == 0) usleep(200);
}

// main returns while threads segment, and go on trying.
void exits_in_calls() {
  init();
  recallseg_segmenter* segmenter = open_real_segmenter();
  static std::atomic<int> done{0};
  for (int t = 0; t < 3; ++t)
    std::thread([segmenter] {
      Query query;
      for (;;) {
        const auto status = recallseg_segment(segmenter, &query.image, &query.output, 0, nullptr);
        if (status == RECALLSEG_OK) ++done;
        else if (status != RECALLSEG_E_STATE) std::_Exit(3);
        else usleep(100);
      }
    }).detach();
  while (done < 4) usleep(200);
}

// A callback ends the process.
void exits_in_a_callback() {
  init();
  recallseg_stream* stream = nullptr;
  GIVES(RECALLSEG_OK, recallseg_stream_open(
                          open_real_segmenter(), nullptr,
                          [](const recallseg_frame*, void*) {
                            std::printf("exits_in_a_callback: done\n");
                            std::exit(0);
                          },
                          nullptr, &stream));
  Query query;
  GIVES(RECALLSEG_OK, recallseg_stream_push(stream, &query.image, nullptr));
  for (;;) pause();
}

// SIGINT must end the host, as it did before: Python's own handler would only note it.
void interrupted() {
  // A shell lets what it starts in the background ignore this signal.
  signal(SIGINT, SIG_DFL);
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
  CHECK(seen.find("opened recallseg.Library(") != std::string::npos && highest == RECALLSEG_LOG_INFO);
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

// What is normal is stored by C, and a later segmenter knows it.
void calibrates() {
  init();
  recallseg_library_options writing = RECALLSEG_LIBRARY_OPTIONS_INIT;
  writing.engine = "fake";
  recallseg_library* library = open_library();
  recallseg_segmenter* segmenter = open_segmenter(library);
  recallseg_calibration found = RECALLSEG_CALIBRATION_INIT;
  GIVES(RECALLSEG_E_STATE, recallseg_segmenter_get_calibration(segmenter, 0, &found));
  GIVES(RECALLSEG_E_LIBRARY_WRITE, recallseg_segmenter_calibrate(segmenter, nullptr, nullptr));
  CHECK(std::strstr(recallseg_last_error(), "recallseg_library_options.writable") != nullptr);
  GIVES(RECALLSEG_OK, recallseg_library_close(library));
  GIVES(RECALLSEG_OK, recallseg_segmenter_close(segmenter));

  writing.writable = 1;
  GIVES(RECALLSEG_OK, recallseg_library_open(library_folder.c_str(), &writing, &library));
  segmenter = open_segmenter(library);
  Query query;
  recallseg_result* result = nullptr;
  recallseg_summary summary = RECALLSEG_SUMMARY_INIT;
  const auto quality = [&](recallseg_segmenter* of) {
    GIVES(RECALLSEG_OK, recallseg_segment(of, &query.image, &query.output, 0, &result));
    GIVES(RECALLSEG_OK, recallseg_result_summary(result, &summary));
    return summary.quality;
  };
  CHECK(quality(segmenter) == RECALLSEG_QUALITY_UNCALIBRATED);
  std::vector<uint64_t> told;
  const recallseg_progress_callback stop_at_two = [](uint64_t done, uint64_t total, void* user) {
    CHECK(total == 5);
    static_cast<std::vector<uint64_t>*>(user)->push_back(done);
    return int32_t{done == 2};
  };
  GIVES(RECALLSEG_E_STATE, recallseg_segmenter_calibrate(segmenter, stop_at_two, &told));
  CHECK((told == std::vector<uint64_t>{1, 2}));
  CHECK(std::strstr(recallseg_last_error(), "stopped") != nullptr);
  CHECK(quality(segmenter) == RECALLSEG_QUALITY_UNCALIBRATED);
  GIVES(RECALLSEG_OK, recallseg_segmenter_calibrate(segmenter, nullptr, nullptr));
  for (size_t i = 0; i < 2; ++i) {
    GIVES(RECALLSEG_OK, recallseg_segmenter_get_calibration(segmenter, i, &found));
    CHECK(found.calibrated == 1 && found.exemplars >= 4 && found.distance > 0 && found.iou > 0);
    CHECK(found.dice >= 0 && found.dice <= 1);
#if RECALLSEG_ABI_VERSION >= 2
    std::printf("left out: %d\n", found.left_out);
#endif
  }
  GIVES(RECALLSEG_E_ARGUMENT, recallseg_segmenter_get_calibration(segmenter, 2, &found));
  CHECK(quality(segmenter) != RECALLSEG_QUALITY_UNCALIBRATED);
  CHECK(quality(open_segmenter(library)) != RECALLSEG_QUALITY_UNCALIBRATED);
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
