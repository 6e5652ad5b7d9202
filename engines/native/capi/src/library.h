// An open library and the segmenters that keep it open.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "handles.h"
#include "python.h"

namespace capi {

class Library final : public Object {
 public:
  static constexpr Kind kKind = Kind::kLibrary;
  explicit Library(Ref library) : object(std::move(library)) {}
  ~Library() override;  // takes the GIL; what goes wrong is logged

  Ref object;  // recallseg.Library
  std::mutex mutex;
  std::string bundle_name, bundle_identity, digest, notice;  // as last read
};

class Segmenter final : public Object {
 public:
  static constexpr Kind kKind = Kind::kSegmenter;
  Segmenter(std::shared_ptr<Library> of, Ref query) : library(std::move(of)), object(std::move(query)) {}
  ~Segmenter() override;  // takes the GIL

  const std::shared_ptr<Library> library;
  Ref object;  // recallseg.runtime.services.c_interface.Query
  std::vector<std::string> structures;
  std::mutex mutex;
  std::vector<recallseg_calibration> calibrations;  // by structure; empty before the first
};

// Tuples for Python of counted arrays of the caller.
Ref names_of(const char* const* names, std::size_t count, const char* what);
Ref tags_of(const recallseg_tag* tags, std::size_t count);

}  // namespace capi
