// What the second ABI has: exemplars listed and erased, verification, cancelling, the audit log.
#include <recallseg.hpp>

#include <sched.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <set>
#include <thread>

#include "checks.h"

namespace {

recallseg::Library writable() {
  auto options = recallseg::sized<recallseg_library_options>();
  options.writable = 1;
  options.engine = "fake";
  return recallseg::Library::open(library_folder, &options);
}

recallseg_summary summary_of(recallseg_segmenter* segmenter, recallseg_result** result) {
  Query query;
  GIVES(RECALLSEG_OK, recallseg_segment(segmenter, &query.image, &query.output, 0, result));
  recallseg_summary summary = RECALLSEG_SUMMARY_INIT;
  GIVES(RECALLSEG_OK, recallseg_result_summary(*result, &summary));
  return summary;
}

}  // namespace

void lists() {
  init();
  auto library = writable();
  const auto list = library.list();
  CHECK(list.size() == 5);
  for (size_t i = 0; i < list.size(); ++i) {
    const recallseg_listed one = list[i];
    CHECK(std::strncmp(one.key, "disc-", 5) == 0 && one.retired == 0 && one.has_source == 1);
    CHECK(one.structure_count == 2 && one.absent_count == 0 && one.rows > 0 && one.columns > 0);
    CHECK(std::strcmp(one.structures[0], "core") == 0 || std::strcmp(one.structures[0], "disc") == 0);
    CHECK(one.tag_count == 1 && std::strcmp(one.tags[0].name, "modality") == 0 &&
          std::strcmp(one.tags[0].value, "MR") == 0);
    CHECK(std::strlen(one.content) == 64 && std::strlen(one.created) > 18);
  }
  recallseg_listed one = RECALLSEG_LISTED_INIT;
  GIVES(RECALLSEG_E_ARGUMENT, recallseg_list_exemplar(list.get(), 5, &one));
  one.struct_size = 4;
  GIVES(RECALLSEG_E_ARGUMENT, recallseg_list_exemplar(list.get(), 0, &one));

  const std::string first = list[0].key, second = list[1].key;
  library.retire(first);
  library.remove(second);
  GIVES(RECALLSEG_E_INPUT, recallseg_library_remove(library.get(), second.c_str()));
  GIVES(RECALLSEG_E_INPUT, recallseg_library_retire(library.get(), "none", 1));
  GIVES(RECALLSEG_E_ARGUMENT, recallseg_library_remove(library.get(), ""));
  CHECK(list.size() == 5 && list[1].key == second);  // as it was
  const auto later = library.list();
  CHECK(later.size() == 4 && later[3].key == first && later[3].retired == 1);
  CHECK(library.info().exemplars == 3);
  library.retire(first, false);
  CHECK(library.info().exemplars == 4 && library.list()[3].retired == 0);
  auto reading = recallseg::Library::open(library_folder);
  GIVES(RECALLSEG_E_LIBRARY_WRITE, recallseg_library_remove(reading.get(), first.c_str()));
  CHECK(std::strstr(recallseg_last_error(), "recallseg_library_options.writable") != nullptr);
  GIVES(RECALLSEG_E_HANDLE, recallseg_list_close(reinterpret_cast<recallseg_list*>(library.get())));
  recallseg::shutdown();
}

void verifies() {
  init();
  recallseg_library* library = open_library();
  recallseg_verification found = RECALLSEG_VERIFICATION_INIT;
  GIVES(RECALLSEG_OK, recallseg_library_verify(library, nullptr, nullptr, &found));
  CHECK(found.exemplars == 5 && found.memories == 10 && found.sources == 5);
  CHECK(found.problem_count == 0 && *found.problems == '\0');
  GIVES(RECALLSEG_OK, recallseg_library_verify(library, nullptr, nullptr, nullptr));
  const recallseg_progress_callback stop = [](uint64_t, uint64_t, void*) { return int32_t{1}; };
  GIVES(RECALLSEG_E_STATE, recallseg_library_verify(library, stop, nullptr, nullptr));
  found.struct_size = 3;
  GIVES(RECALLSEG_E_ARGUMENT, recallseg_library_verify(library, nullptr, nullptr, &found));

  // Bytes of a stored file are others.
  std::fstream stored(std::getenv("DAMAGE"), std::ios::in | std::ios::out | std::ios::binary);
  stored.seekg(0, std::ios::end);
  for (std::streamoff at = 256; at < stored.tellg(); at += 256) {
    const std::streamoff end = stored.tellg();
    stored.seekg(at);
    const char was = static_cast<char>(stored.get());
    stored.seekp(at);
    stored.put(static_cast<char>(was ^ 1));
    stored.seekg(end);
  }
  stored.close();
  found = RECALLSEG_VERIFICATION_INIT;
  GIVES(RECALLSEG_E_LIBRARY_CORRUPT, recallseg_library_verify(library, nullptr, nullptr, &found));
  CHECK(found.problem_count >= 1 && std::strlen(found.problems) > 10);
  CHECK(std::strstr(recallseg_last_error(), "problems: ") != nullptr);
  CHECK(recallseg::Library::open(library_folder).verify().problem_count == found.problem_count);
}

void cancels() {
  init();
  recallseg_library* library = open_library();
  recallseg_segmenter* segmenter = open_segmenter(library);
  GIVES(RECALLSEG_OK, recallseg_segmenter_cancel(segmenter));  // nothing is in work: nothing ends
  recallseg_result* result = nullptr;
  const recallseg_summary summary = summary_of(segmenter, &result);
  CHECK(std::strlen(summary.provenance_digest) == 64);
  CHECK(std::strstr(summary.provenance, summary.provenance_digest) != nullptr);
  CHECK(summary.quality == RECALLSEG_QUALITY_UNCALIBRATED);
  CHECK(std::strstr(summary.mend, "recallseg library calibrate") != nullptr);
  recallseg_score score = RECALLSEG_SCORE_INIT;
  GIVES(RECALLSEG_OK, recallseg_result_score(result, 0, &score));
  CHECK(score.presence == 1.0);  // all that is recalled shows it

  // From another thread, until a call in work has ended by it; the next one goes on.
  std::atomic<bool> over{false};
  std::thread other([&] {
    while (!over) GIVES(RECALLSEG_OK, recallseg_segmenter_cancel(segmenter));
  });
  Query query;
  recallseg_status status = RECALLSEG_OK;
  for (int i = 0; i < 1000 && status == RECALLSEG_OK; ++i)
    status = recallseg_segment(segmenter, &query.image, &query.output, 0, &result);
  over = true;
  other.join();
  CHECK(status == RECALLSEG_E_CANCELLED && result == nullptr);
  CHECK(std::strstr(recallseg_last_error(), "cancelled at '") != nullptr);
  GIVES(RECALLSEG_OK, recallseg_segment(segmenter, &query.image, &query.output, 0, nullptr));
  GIVES(RECALLSEG_OK, recallseg_segmenter_close(segmenter));
  GIVES(RECALLSEG_E_HANDLE, recallseg_segmenter_cancel(segmenter));

  // A calibration, by its own progress callback: nothing is stored.
  GIVES(RECALLSEG_OK, recallseg_library_close(library));
  auto writing = writable();
  segmenter = open_segmenter(writing.get());
  const recallseg_progress_callback cancel = [](uint64_t, uint64_t, void* user) {
    GIVES(RECALLSEG_OK, recallseg_segmenter_cancel(static_cast<recallseg_segmenter*>(user)));
    return int32_t{0};
  };
  GIVES(RECALLSEG_E_CANCELLED, recallseg_segmenter_calibrate(segmenter, cancel, segmenter));
  CHECK(summary_of(segmenter, &result).quality == RECALLSEG_QUALITY_UNCALIBRATED);
  GIVES(RECALLSEG_OK, recallseg_segmenter_calibrate(segmenter, nullptr, nullptr));
  const recallseg_summary calibrated = summary_of(segmenter, &result);
  CHECK(calibrated.quality != RECALLSEG_QUALITY_UNCALIBRATED && *calibrated.mend == '\0');
}

void audits() {
  init();
  const std::string log = scratch_folder + "/log.jsonl", head = scratch_folder + "/head.json";
  const std::string key = scratch_folder + "/audit.key";
  recallseg_audit_options sealed = RECALLSEG_AUDIT_OPTIONS_INIT;
  sealed.key = key.c_str();
  sealed.head = head.c_str();
  recallseg_audit* audit = nullptr;
  GIVES(RECALLSEG_E_ARGUMENT, recallseg_audit_open(nullptr, &sealed, &audit));
  GIVES(RECALLSEG_E_AUDIT, recallseg_audit_open("/nowhere/log", nullptr, &audit));
  CHECK(audit == nullptr);
  GIVES(RECALLSEG_OK, recallseg_audit_open(log.c_str(), &sealed, &audit));
  recallseg_segmenter_options options = RECALLSEG_SEGMENTER_OPTIONS_INIT;
  options.engine = "fake";
  options.k = 2;
  options.audit = audit;
  recallseg_library* library = open_library();
  recallseg_segmenter* segmenter = nullptr;
  GIVES(RECALLSEG_OK, recallseg_segmenter_open(library, &options, &segmenter));
  GIVES(RECALLSEG_OK, recallseg_audit_close(audit));  // the segmenter keeps it
  recallseg_segmenter* none = nullptr;
  GIVES(RECALLSEG_E_HANDLE, recallseg_segmenter_open(library, &options, &none));
  Query query;
  recallseg_result* result = nullptr;
  GIVES(RECALLSEG_OK, recallseg_segment(segmenter, &query.image, &query.output, 0, &result));
  recallseg_stream* stream = nullptr;
  recallseg_stream_options waiting = RECALLSEG_STREAM_OPTIONS_INIT;
  waiting.queue = 2;
  static std::vector<recallseg_status> told;
  const recallseg_frame_callback tell = [](const recallseg_frame* frame, void*) {
    told.push_back(frame->status);
  };
  GIVES(RECALLSEG_OK, recallseg_stream_open(segmenter, &waiting, tell, nullptr, &stream));
  for (int i = 0; i < 2; ++i) GIVES(RECALLSEG_OK, recallseg_stream_push(stream, &query.image, nullptr));
  GIVES(RECALLSEG_OK, recallseg_stream_drain(stream, 60e3));

  // The log is there no more: what cannot be recorded is not handed over.
  const std::string aside = log + ".aside";
  CHECK(std::rename(log.c_str(), aside.c_str()) == 0);
  GIVES(RECALLSEG_E_AUDIT, recallseg_segment(segmenter, &query.image, &query.output, 0, &result));
  CHECK(result == nullptr);
  for (const uint8_t label : query.labels) CHECK(label == 0);
  for (const uint8_t mask : query.masks) CHECK(mask == 0);
  GIVES(RECALLSEG_OK, recallseg_stream_push(stream, &query.image, nullptr));
  GIVES(RECALLSEG_OK, recallseg_stream_drain(stream, 60e3));
  CHECK((told == std::vector<recallseg_status>{RECALLSEG_OK, RECALLSEG_OK, RECALLSEG_E_AUDIT}));
  std::remove(log.c_str());
  CHECK(std::rename(aside.c_str(), log.c_str()) == 0);
  // Sealed: without the key it is refused.
  GIVES(RECALLSEG_E_AUDIT, recallseg_audit_open(log.c_str(), nullptr, &audit));
  CHECK(std::strstr(recallseg_last_error(), "recallseg_audit_options.key") != nullptr);
}

namespace {

// The threads of this process that have this niceness and may run on this core alone; one that
// was just joined may still be listed.
std::set<int> threads_with(int nice, int core) {
  std::set<int> found;
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
    const int id = std::stoi(task.path().filename());
    cpu_set_t set;
    if (sched_getaffinity(id, sizeof set, &set) != 0) {
      CHECK(errno == ESRCH);  // it has ended meanwhile
      continue;
    }
    const bool alone = CPU_COUNT(&set) == 1 && CPU_ISSET(core, &set);
    if (alone && getpriority(PRIO_PROCESS, static_cast<id_t>(id)) == nice) found.insert(id);
  }
  return found;
}

}  // namespace

void schedules() {
  init();
  recallseg_library* library = open_library();
  cpu_set_t allowed;
  CHECK(sched_getaffinity(0, sizeof allowed, &allowed) == 0);
  int32_t core = 0;
  while (!CPU_ISSET(core, &allowed)) ++core;
  const int before = getpriority(PRIO_PROCESS, 0);
  const int32_t nice = before < 19 ? before + 1 : 18;  // at 19 a busy machine lets none run
  recallseg_segmenter_options options = RECALLSEG_SEGMENTER_OPTIONS_INIT;
  options.k = 2;
  options.threads = 3;
  recallseg_segmenter* plain = nullptr;
  GIVES(RECALLSEG_OK, recallseg_segmenter_open(library, &options, &plain));
  CHECK(threads_with(nice, core).empty());

  recallseg_segmenter* segmenter = nullptr;
  options.cores = &core;
  options.core_count = 1;
  options.nice = nice;
  GIVES(RECALLSEG_OK, recallseg_segmenter_open(library, &options, &segmenter));
  const auto opened = threads_with(nice, core);
  CHECK(opened.size() >= 2);  // beside the caller, each graph has two threads
  recallseg_stream* stream = nullptr;
  const recallseg_frame_callback callback = [](const recallseg_frame* frame, void* user) {
    CHECK(frame->status == RECALLSEG_OK);
    *static_cast<int*>(user) = getpriority(PRIO_PROCESS, static_cast<id_t>(syscall(SYS_gettid)));
  };
  static int told = 0;
  GIVES(RECALLSEG_OK, recallseg_stream_open(segmenter, nullptr, callback, &told, &stream));
  // The stream's thread says how urgent it is once it runs.
  std::set<int> streams;
  for (int tries = 0; streams.empty() && tries < 12000; ++tries) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    for (const int id : threads_with(nice, core)) {
      if (opened.count(id) == 0) streams.insert(id);
    }
  }
  CHECK(streams.size() == 1);
  Query query, same;
  query.output.masks = same.output.masks = nullptr;
  GIVES(RECALLSEG_OK, recallseg_stream_push(stream, &query.image, nullptr));
  GIVES(RECALLSEG_OK, recallseg_stream_drain(stream, 60e3));
  CHECK(told == nice);
  // This thread is as it was, and the answer is the same.
  CHECK(getpriority(PRIO_PROCESS, 0) == before);
  cpu_set_t now;
  CHECK(sched_getaffinity(0, sizeof now, &now) == 0 && CPU_EQUAL(&now, &allowed));
  GIVES(RECALLSEG_OK, recallseg_segment(segmenter, &query.image, &query.output, 0, nullptr));
  GIVES(RECALLSEG_OK, recallseg_segment(plain, &same.image, &same.output, 0, nullptr));
  CHECK(query.labels == same.labels);

  recallseg_segmenter* none = nullptr;
  const auto refused = [&](recallseg_status status, const char* word) {
    GIVES(status, recallseg_segmenter_open(library, &options, &none));
    CHECK(none == nullptr && std::strstr(recallseg_last_error(), word) != nullptr);
  };
  const int32_t nowhere = 100000;
  options.cores = &nowhere;
  refused(RECALLSEG_E_INPUT, "core 100000");
  options.cores = nullptr;
  refused(RECALLSEG_E_ARGUMENT, "cores is null");
  options.core_count = 0;
  options.nice = 20;
  refused(RECALLSEG_E_INPUT, "nice must be");
  options.nice = 0;
  options.realtime = 100;
  refused(RECALLSEG_E_INPUT, "realtime priority");
}

// ONNX Runtime says a lot while it loads a graph, at level DEBUG.
void sessions_log() {
  static std::atomic<int> of_sessions{0};
  const recallseg_log_callback count = [](int32_t, const char* logger, const char* message, void*) {
    if (std::strcmp(logger, "recallseg.onnxruntime") != 0) return;
    CHECK(std::strlen(message) > 10);
    ++of_sessions;
  };
  GIVES(RECALLSEG_OK, recallseg_set_log(count, nullptr, RECALLSEG_LOG_DEBUG));
  init();
  recallseg_segmenter_options options = RECALLSEG_SEGMENTER_OPTIONS_INIT;
  options.k = 2;
  recallseg_segmenter* segmenter = nullptr;
  GIVES(RECALLSEG_OK, recallseg_segmenter_open(open_library(), &options, &segmenter));
  CHECK(of_sessions > 10);
  // From a session that is there, too, and no more once nobody listens.
  GIVES(RECALLSEG_OK, recallseg_set_log(nullptr, nullptr, 0));
  of_sessions = 0;
  Query query;
  query.output.masks = nullptr;
  GIVES(RECALLSEG_OK, recallseg_segment(segmenter, &query.image, &query.output, 0, nullptr));
  CHECK(of_sessions == 0);
}
