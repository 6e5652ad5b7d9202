// A result without its pixels, in plain C++: reading it needs no Python.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "handles.h"
#include "python.h"

namespace capi {

struct RecalledExemplar {
  std::string key;
  double similarity;
  bool absent;
  std::vector<std::pair<std::string, std::string>> tags;
};

struct StructureScore {
  std::string structure;
  int32_t label;
  bool present;
  double iou, object_score, distance;
  std::uint64_t pixels;
  double area_mm2;
  std::vector<std::string> reasons;
  std::vector<RecalledExemplar> recalled;
  double presence;
};

class Result final : public Object {
 public:
  static constexpr Kind kKind = Kind::kResult;
  // From what embedding.record returns.
  explicit Result(PyObject* record);

  int32_t quality;
  std::string bundle_identity, library_digest, engine, precision, notice, provenance,
      provenance_digest, mend;
  int32_t k;
  std::vector<std::pair<std::string, double>> timings;
  std::vector<StructureScore> scores;
};

}  // namespace capi
