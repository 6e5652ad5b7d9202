// recallseg.hpp: all that recallseg.h has.
#include <recallseg.hpp>

#include <atomic>
#include <cstring>
#include <iostream>

#include "checks.h"

void wrapper() {
  CHECK(recallseg::version() == RECALLSEG_VERSION);
  CHECK(recallseg::abi_version() >= RECALLSEG_ABI_VERSION);
  std::string logged;
  recallseg::set_log([&](int32_t, const char*, const char* message) { logged += message; });
  recallseg::init();
  CHECK(std::string(recallseg::info().package_version) == RECALLSEG_VERSION);
  auto library = recallseg::Library::open(library_folder);
  CHECK(library && logged.find("opened recallseg.Library(") != std::string::npos);
  recallseg::set_log(nullptr);
  const auto facts = library.info();
  CHECK(facts.exemplars == 5 && facts.structures == 2 && std::strlen(facts.digest) == 64);

  auto options = recallseg::sized<recallseg_segmenter_options>();
  const char* const names[] = {"core", "disc"};
  options.engine = "fake";
  options.k = 2;
  options.structures = names;
  options.structure_count = 2;
  auto segmenter = library.segmenter(&options);
  CHECK((segmenter.structures() == std::vector<std::string>{"core", "disc"}));
  segmenter.warm_up(1);
  try {
    segmenter.calibrate();
    CHECK(false);
  } catch (const recallseg::Error& error) {
    CHECK(error.status() == RECALLSEG_E_LIBRARY_WRITE);
  }
  Query query;
  const auto result = segmenter.segment(query.image, query.output);
  CHECK(result.timings().size() == result.summary().timing_count);
  CHECK(result.timings().front().second >= 0 && !result.timings().front().first.empty());
  CHECK(result.tags(0, 0).at("modality") == "MR");
  CHECK(result.reasons(1).size() == result.score(1).reason_count);
  try {
    static_cast<void>(result.recalled(0, 99));
    CHECK(false);
  } catch (const recallseg::Error& error) {
    CHECK(error.status() == RECALLSEG_E_ARGUMENT);
  }

  std::atomic<int> frames{0};
  std::vector<uint8_t> labels;
  auto queue = recallseg::sized<recallseg_stream_options>();
  queue.queue = 4;
  recallseg::Stream stream(
      segmenter,
      [&](const recallseg_frame& frame) {
        CHECK(frame.status == RECALLSEG_OK);
        CHECK(recallseg::ResultView(frame.result).tags(0, 0).size() == 1);
        labels.assign(frame.label_map, frame.label_map + frame.rows * frame.columns);
        ++frames;
      },
      &queue);
  CHECK(stream.push(query.image) == 0 && stream.push(query.image) == 1);
  stream.drain(60e3);
  stream.restart();
  stream.pause();
  CHECK(stream.push(query.image) == 2);
  stream.resume();
  CHECK(frames == 2 && labels == query.labels);
  CHECK(stream.statistics().pushed == 3 && stream.statistics().ignored == 1);
  recallseg::Stream moved(std::move(stream));
  moved.push(query.image);
  moved.drain(60e3);
  CHECK(frames == 3);
  moved.close();
  segmenter.close();
  library.close();
  CHECK(!library);
  recallseg::shutdown();
}
