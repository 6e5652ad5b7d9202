// Every allocation of librecallseg fails once, in every kind of call: starving LIBRARY FOLDER. The call
// says so or has been done, nothing is half done, and the same call succeeds afterwards.
#include "starving.h"

#include <cstring>
#include <filesystem>
#include <functional>

#include "checks.h"

namespace {

long failures = 0;

// `call` must be able to be repeated; `undo` is done when it succeeded.
void starve(const char* name, const std::function<recallseg_status()>& call,
            const std::function<void()>& undo = [] {}) {
  GIVES(RECALLSEG_OK, call());  // also what is made once and kept
  undo();
  long number = 1;
  for (;; ++number) {
    recallseg_status status = RECALLSEG_OK;
    bool fired = false;
    {
      const starving::Starved hungry(number);
      status = call();
      fired = starving::fired > 0;
    }
    if (status == RECALLSEG_OK) {
      undo();
    } else {
      if (status != RECALLSEG_E_MEMORY)
        std::fprintf(stderr, "%s, allocation %ld: status %d\n", name, number, status);
      CHECK(status == RECALLSEG_E_MEMORY && fired);
      CHECK(*recallseg_last_error() != '\0');
    }
    if (!fired) break;
    ++failures;
    GIVES(RECALLSEG_OK, call());
    undo();
  }
  std::printf("%s: %ld\n", name, number - 1);
}

size_t count_of(recallseg_library* library) {
  recallseg_library_info info = RECALLSEG_LIBRARY_INFO_INIT;
  GIVES(RECALLSEG_OK, recallseg_library_get_info(library, &info));
  return info.exemplars;
}

void ignore(const recallseg_frame*, void*) {}
void ignore_line(int32_t, const char*, const char*, void*) {}
int32_t go_on(uint64_t, uint64_t, void*) { return 0; }

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  library_folder = argv[1];
  scratch_folder = argv[2];
  static const char* const ours[] = {"librecallseg", "libstdc++", nullptr};
  starving::of = ours;
  init();

  recallseg_library* library = nullptr;
  const auto close_library = [&] { GIVES(RECALLSEG_OK, recallseg_library_close(library)); };
  recallseg_library_options writing = RECALLSEG_LIBRARY_OPTIONS_INIT;
  writing.engine = "fake";
  writing.writable = 1;
  starve("library_open", [&] { return recallseg_library_open(library_folder.c_str(), &writing, &library); },
         close_library);
  GIVES(RECALLSEG_OK, recallseg_library_open(library_folder.c_str(), &writing, &library));
  recallseg_library_info info = RECALLSEG_LIBRARY_INFO_INIT;
  starve("library_get_info", [&] { return recallseg_library_get_info(library, &info); });

  // Stored in full and told so, or not stored.
  Query query;
  const std::vector<uint8_t> mask(query.pixels.size(), 1);
  const recallseg_mask masks[] = {{"disc", mask.data(), {0, 0}}};
  const recallseg_tag tags[] = {{"a tag that is longer than a short text", "and so is its value"}};
  const char* const absent[] = {"a structure that is longer than a short text"};
  recallseg_exemplar exemplar = RECALLSEG_EXEMPLAR_INIT;
  exemplar.masks = masks;
  exemplar.mask_count = 1;
  exemplar.absent = absent;
  exemplar.absent_count = 1;
  exemplar.tags = tags;
  exemplar.tag_count = 1;
  char key[1025];
  const size_t before = count_of(library);
  starve("library_add",
         [&] {
           const auto status =
               recallseg_library_add(library, &query.image, &exemplar, key, sizeof key);
           const bool counting = starving::counting;
           starving::counting = false;
           CHECK(count_of(library) == before + (status == RECALLSEG_OK ? 1 : 0));
           starving::counting = counting;
           return status;
         },
         [&] { GIVES(RECALLSEG_OK, recallseg_library_remove(library, key)); });

  recallseg_list* list = nullptr;
  starve("library_list", [&] { return recallseg_library_list(library, &list); },
         [&] { GIVES(RECALLSEG_OK, recallseg_list_close(list)); });
  recallseg_verification report = RECALLSEG_VERIFICATION_INIT;
  starve("library_verify",
         [&] { return recallseg_library_verify(library, go_on, nullptr, &report); });
  starve("set_log", [&] { return recallseg_set_log(ignore_line, nullptr, RECALLSEG_LOG_DEBUG); });
  GIVES(RECALLSEG_OK, recallseg_set_log(nullptr, nullptr, RECALLSEG_LOG_INFO));

  recallseg_segmenter* segmenter = nullptr;
  const char* const names[] = {"disc", "core"};
  recallseg_segmenter_options options = RECALLSEG_SEGMENTER_OPTIONS_INIT;
  options.engine = "fake";
  options.k = 2;
  options.structures = names;
  options.structure_count = 2;
  options.memories = 2;
  starve("segmenter_open",
         [&] { return recallseg_segmenter_open(library, &options, &segmenter); },
         [&] { GIVES(RECALLSEG_OK, recallseg_segmenter_close(segmenter)); });
  GIVES(RECALLSEG_OK, recallseg_segmenter_open(library, &options, &segmenter));
  recallseg_result* result = nullptr;
  starve("segment",
         [&] { return recallseg_segment(segmenter, &query.image, &query.output, 0, &result); },
         [&] { GIVES(RECALLSEG_OK, recallseg_result_close(result)); });
  starve("segmenter_calibrate",
         [&] { return recallseg_segmenter_calibrate(segmenter, go_on, nullptr); });

  recallseg_stream* stream = nullptr;
  const auto open_stream = [&] {
    return recallseg_stream_open(segmenter, nullptr, ignore, nullptr, &stream);
  };
  starve("stream_open", open_stream, [&] { GIVES(RECALLSEG_OK, recallseg_stream_close(stream)); });
  GIVES(RECALLSEG_OK, open_stream());
  starve("stream_push", [&] { return recallseg_stream_push(stream, &query.image, nullptr); },
         [&] { GIVES(RECALLSEG_OK, recallseg_stream_drain(stream, 60000)); });
  recallseg_stream_statistics statistics = RECALLSEG_STREAM_STATISTICS_INIT;
  starve("stream_get_statistics",
         [&] { return recallseg_stream_get_statistics(stream, &statistics); });

  recallseg_audit* audit = nullptr;
  const std::string log = scratch_folder + "/starving.jsonl";
  starve("audit_open", [&] { return recallseg_audit_open(log.c_str(), nullptr, &audit); },
         [&] { GIVES(RECALLSEG_OK, recallseg_audit_close(audit)); });

  // Closing needs no memory: a handle that could not be closed would be lost.
  GIVES(RECALLSEG_OK, recallseg_segment(segmenter, &query.image, &query.output, 0, &result));
  const auto closed = [](const std::function<recallseg_status()>& close) {
    const starving::Starved hungry(1, true);
    GIVES(RECALLSEG_OK, close());
  };
  closed([&] { return recallseg_result_close(result); });
  closed([&] { return recallseg_stream_close(stream); });
  closed([&] { return recallseg_segmenter_close(segmenter); });
  closed([&] { return recallseg_library_close(library); });
  GIVES(RECALLSEG_OK, recallseg_library_open(library_folder.c_str(), &writing, &library));
  closed([] { return recallseg_shutdown(); });
  init();
  GIVES(RECALLSEG_OK, recallseg_library_open(library_folder.c_str(), &writing, &library));
  CHECK(count_of(library) == before);
  close_library();
  std::printf("starving: done, %ld allocations failed\n", failures);
  return 0;
}
