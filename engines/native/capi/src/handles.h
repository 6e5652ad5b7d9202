// The table behind the opaque handles: a closed, foreign or made-up handle is refused.
#pragma once

#include <cstdint>
#include <memory>

#include "error.h"

namespace capi {

enum class Kind : std::uint64_t { kLibrary = 1, kSegmenter = 2, kResult = 3, kStream = 4, kList = 5, kAudit = 6 };

class Object {
 public:
  Object() = default;
  virtual ~Object() = default;
  // Ends what calls back, before the handle's closing returns: a call on another thread may hold the
  // object still.
  virtual void stop() {}
  Object(const Object&) = delete;
  Object& operator=(const Object&) = delete;
};

// Handles are numbers (generation, slot, kind), so that a stale one never meets a later object.
std::uintptr_t insert_object(Kind kind, std::shared_ptr<Object> object);
std::shared_ptr<Object> find_object(Kind kind, std::uintptr_t handle);
// The object lives until the last call that uses it has returned.
std::shared_ptr<Object> remove_object(Kind kind, std::uintptr_t handle);
void close_all_handles();

template <typename T, typename Handle>
std::shared_ptr<T> get(Handle* handle) {
  return std::static_pointer_cast<T>(
      find_object(T::kKind, reinterpret_cast<std::uintptr_t>(handle)));
}

template <typename T, typename Handle>
void publish(std::shared_ptr<T> object, Handle** handle) {
  *handle = reinterpret_cast<Handle*>(insert_object(T::kKind, std::move(object)));
}

template <typename T, typename Handle>
void close_handle(Handle* handle) {
  remove_object(T::kKind, reinterpret_cast<std::uintptr_t>(handle));
}

}  // namespace capi
