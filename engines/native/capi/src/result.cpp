#include "result.h"

#include "interpreter.h"

namespace capi {
namespace {

template <typename Take>
void each(PyObject* tuple, Take&& take) {
  Reader items(tuple);
  for (std::size_t left = items.size(); left > 0; --left) take(items);
}

RecalledExemplar read_recalled(PyObject* tuple) {
  Reader reader(tuple);
  RecalledExemplar found;
  found.key = reader.text();
  found.similarity = reader.real();
  found.absent = reader.truth();
  each(reader.next(), [&](Reader& tags) {
    Reader tag(tags.next());
    std::string name = tag.text();
    found.tags.emplace_back(std::move(name), tag.text());
  });
  return found;
}

StructureScore read_score(PyObject* tuple) {
  Reader reader(tuple);
  StructureScore score;
  score.structure = reader.text();
  score.label = static_cast<int32_t>(reader.integer());
  score.present = reader.truth();
  score.iou = reader.real();
  score.object_score = reader.real();
  score.distance = reader.real();
  score.pixels = static_cast<std::uint64_t>(reader.integer());
  score.area_mm2 = reader.real();
  each(reader.next(), [&](Reader& reasons) { score.reasons.push_back(reasons.text()); });
  each(reader.next(),
       [&](Reader& all) { score.recalled.push_back(read_recalled(all.next())); });
  score.presence = reader.real();
  return score;
}

template <typename T>
const T& at(const std::vector<T>& items, std::size_t index, const char* what) {
  if (index >= items.size())
    refuse(std::string(what) + " " + std::to_string(index) + ": there are " +
           std::to_string(items.size()));
  return items[index];
}

}  // namespace

Result::Result(PyObject* record) {
  Reader reader(record);
  quality = static_cast<int32_t>(reader.integer());
  bundle_identity = reader.text();
  library_digest = reader.text();
  engine = reader.text();
  precision = reader.text();
  notice = reader.text();
  provenance = reader.text();
  provenance_digest = reader.text();
  mend = reader.text();
  k = static_cast<int32_t>(reader.integer());
  each(reader.next(), [&](Reader& all) {
    Reader timing(all.next());
    std::string stage = timing.text();
    timings.emplace_back(std::move(stage), timing.real());
  });
  each(reader.next(), [&](Reader& all) { scores.push_back(read_score(all.next())); });
}

}  // namespace capi

using namespace capi;

extern "C" {

recallseg_status recallseg_result_summary(recallseg_result* result, recallseg_summary* summary) {
  return guarded([&] {
    require_ready();
    const auto self = get<Result>(result);
    recallseg_summary answer = RECALLSEG_SUMMARY_INIT;
    answer.quality = self->quality;
    answer.structure_count = self->scores.size();
    answer.timing_count = self->timings.size();
    answer.total_ms = self->timings.empty() ? 0.0 : self->timings.back().second;
    answer.bundle_identity = self->bundle_identity.c_str();
    answer.library_digest = self->library_digest.c_str();
    answer.engine = self->engine.c_str();
    answer.precision = self->precision.c_str();
    answer.notice = self->notice.c_str();
    answer.k = self->k;
    answer.provenance = self->provenance.c_str();
    answer.provenance_digest = self->provenance_digest.c_str();
    answer.mend = self->mend.c_str();
    write_struct(answer, summary, "summary");
  });
}

recallseg_status recallseg_result_score(recallseg_result* result, size_t structure,
                                        recallseg_score* score) {
  return guarded([&] {
    require_ready();
    const auto self = get<Result>(result);
    const StructureScore& found = at(self->scores, structure, "structure");
    recallseg_score answer = RECALLSEG_SCORE_INIT;
    answer.label = found.label;
    answer.structure = found.structure.c_str();
    answer.present = found.present ? 1 : 0;
    answer.iou = found.iou;
    answer.object_score = found.object_score;
    answer.distance = found.distance;
    answer.pixels = found.pixels;
    answer.area_mm2 = found.area_mm2;
    answer.recalled_count = found.recalled.size();
    answer.reason_count = found.reasons.size();
    answer.presence = found.presence;
    write_struct(answer, score, "score");
  });
}

recallseg_status recallseg_result_reason(recallseg_result* result, size_t structure, size_t index,
                                         const char** reason) {
  return guarded([&] {
    require_ready();
    const auto self = get<Result>(result);
    const StructureScore& found = at(self->scores, structure, "structure");
    required(reason, "reason") = at(found.reasons, index, "reason").c_str();
  });
}

recallseg_status recallseg_result_recalled(recallseg_result* result, size_t structure,
                                           size_t index, recallseg_recalled* recalled) {
  return guarded([&] {
    require_ready();
    const auto self = get<Result>(result);
    const RecalledExemplar& found =
        at(at(self->scores, structure, "structure").recalled, index, "recalled exemplar");
    recallseg_recalled answer = RECALLSEG_RECALLED_INIT;
    answer.absent = found.absent ? 1 : 0;
    answer.key = found.key.c_str();
    answer.similarity = found.similarity;
    answer.tag_count = found.tags.size();
    write_struct(answer, recalled, "recalled");
  });
}

recallseg_status recallseg_result_tag(recallseg_result* result, size_t structure, size_t recalled,
                                      size_t index, recallseg_tag* tag) {
  return guarded([&] {
    require_ready();
    const auto self = get<Result>(result);
    const RecalledExemplar& found =
        at(at(self->scores, structure, "structure").recalled, recalled, "recalled exemplar");
    const auto& [name, value] = at(found.tags, index, "tag");
    required(tag, "tag") = {name.c_str(), value.c_str()};
  });
}

recallseg_status recallseg_result_timing(recallseg_result* result, size_t index,
                                         const char** stage, double* ms) {
  return guarded([&] {
    require_ready();
    const auto self = get<Result>(result);
    const auto& [name, spent] = at(self->timings, index, "timing");
    required(stage, "stage");
    required(ms, "ms") = spent;
    *stage = name.c_str();
  });
}

recallseg_status recallseg_result_close(recallseg_result* result) {
  return guarded([&] {
    require_ready();
    close_handle<Result>(result);
  });
}
}
