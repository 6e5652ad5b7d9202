// An open library and the segmenters that keep it open.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "audit.h"
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
  std::string bundle_name, bundle_identity, digest, notice, problems;  // as last read
};

class Segmenter final : public Object {
 public:
  static constexpr Kind kKind = Kind::kSegmenter;
  Segmenter(std::shared_ptr<Library> of, std::shared_ptr<Audit> into, Ref query)
      : library(std::move(of)), audit(std::move(into)), object(std::move(query)) {}
  ~Segmenter() override;  // takes the GIL

  const std::shared_ptr<Library> library;
  const std::shared_ptr<Audit> audit;  // may be null
  Ref object;  // recallseg.runtime.services.c_interface.Query
  std::vector<std::string> structures;
  std::mutex mutex;
  std::vector<recallseg_calibration> calibrations;  // by structure; empty before the first
  std::atomic<std::uint64_t> cancels{0};            // read by Python, by its address
};

// What `cancelled_since` of c_interface.py takes: where the number of cancels is, and what it was.
struct Begun {
  explicit Begun(const Segmenter& self)
      : address(static_cast<long long>(reinterpret_cast<std::intptr_t>(&self.cancels))),
        cancels(static_cast<long long>(self.cancels.load())) {}
  Ref pair() const { return tuple_of(address, cancels); }
  long long address, cancels;
};
static_assert(sizeof(std::atomic<std::uint64_t>) == 8 && std::atomic<std::uint64_t>::is_always_lock_free,
              "Python reads it as a number of 8 bytes");

// Tuples for Python of counted arrays of the caller.
Ref names_of(const char* const* names, std::size_t count, const char* what);
Ref tags_of(const recallseg_tag* tags, std::size_t count);

// What `gpu_options` of c_interface.py takes; None for null.
Ref gpu_of(const recallseg_gpu_options* gpu);

}  // namespace capi
