// Statuses, the calling thread's last error, and the border that no exception crosses.
#pragma once

#include <cstddef>
#include <cstring>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "recallseg.h"

namespace capi {

class Error : public std::runtime_error {
 public:
  Error(recallseg_status status, const std::string& message)
      : std::runtime_error(message), status_(status) {}
  recallseg_status status() const { return status_; }

 private:
  recallseg_status status_;
};

[[noreturn]] inline void refuse(const std::string& message) {
  throw Error(RECALLSEG_E_ARGUMENT, message);
}

// Record an error of this thread; a message too long for the buffer is cut.
recallseg_status fail(recallseg_status status, const char* message) noexcept;

// Counts the calls at work, of all threads and of this one; whoever ends the process waits for them.
class InFlight {
 public:
  InFlight() noexcept;
  ~InFlight();
  InFlight(const InFlight&) = delete;
  InFlight& operator=(const InFlight&) = delete;
  // Wait until no other thread is in a call; false after `seconds`.
  static bool wait_for_others(double seconds);
};

// Run the body of an exported function.
template <typename Body>
recallseg_status guarded(Body&& body) noexcept {
  const InFlight counted;
  try {
    std::forward<Body>(body)();
    return RECALLSEG_OK;
  } catch (const Error& error) {
    return fail(error.status(), error.what());
  } catch (const std::bad_alloc&) {
    return fail(RECALLSEG_E_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return fail(RECALLSEG_E_INTERNAL, error.what());
  } catch (...) {
    return fail(RECALLSEG_E_INTERNAL, "an unknown exception");
  }
}

template <typename T>
T& required(T* pointer, const char* name) {
  if (pointer == nullptr) refuse(std::string(name) + " is null");
  return *pointer;
}

inline const char* required_text(const char* text, const char* name) {
  if (text == nullptr || *text == '\0') refuse(std::string(name) + " is null or empty");
  return text;
}

inline const char* text_or(const char* text, const char* otherwise) {
  return text == nullptr || *text == '\0' ? otherwise : text;
}

// Structs grow at their end. One from an older header is shorter: the rest is 0. One from a newer
// header is longer: taken if what this version does not know is 0, refused otherwise.
// Its size in the first ABI that had it: none that was ever handed over is shorter.
template <typename T>
inline constexpr std::size_t kFirstSize = sizeof(T);
template <>
inline constexpr std::size_t kFirstSize<recallseg_library_options> =
    offsetof(recallseg_library_options, gpu);
template <>
inline constexpr std::size_t kFirstSize<recallseg_image> = offsetof(recallseg_image, location);
template <>
inline constexpr std::size_t kFirstSize<recallseg_output> = offsetof(recallseg_output, location);
template <>
inline constexpr std::size_t kFirstSize<recallseg_segmenter_options> =
    offsetof(recallseg_segmenter_options, audit);
template <>
inline constexpr std::size_t kFirstSize<recallseg_summary> =
    offsetof(recallseg_summary, provenance_digest);
template <>
inline constexpr std::size_t kFirstSize<recallseg_score> = offsetof(recallseg_score, presence);
template <>
inline constexpr std::size_t kFirstSize<recallseg_calibration> =
    offsetof(recallseg_calibration, left_out);

template <typename T, typename = void>
struct HasReserved : std::false_type {};
template <typename T>
struct HasReserved<T, std::void_t<decltype(T::reserved)>> : std::true_type {};

template <typename T, typename = void>
struct HasReserved2 : std::false_type {};
template <typename T>
struct HasReserved2<T, std::void_t<decltype(T::reserved2)>> : std::true_type {};

template <typename T>
T read_struct(const T* given, const char* name) {
  const std::size_t size = required(given, name).struct_size;
  const std::string what = std::string(name) + "->struct_size";
  if (size < kFirstSize<T> || size > 4096)
    refuse(what + " is " + std::to_string(size) + ", this version's is " +
           std::to_string(sizeof(T)) + ": set it to the struct's sizeof");
  const auto* bytes = reinterpret_cast<const unsigned char*>(given);
  for (std::size_t i = sizeof(T); i < size; ++i)
    if (bytes[i] != 0)
      throw Error(RECALLSEG_E_ABI, std::string(name) + " asks for something newer than version " +
                                       RECALLSEG_VERSION);
  T copy{};
  std::memcpy(&copy, given, size < sizeof(T) ? size : sizeof(T));
  const auto check = [&](const char* member, long long value) {
    if (value != 0)
      throw Error(RECALLSEG_E_ABI, std::string(name) + "->" + member + " is " +
                                       std::to_string(value) +
                                       ", and must be 0: use the *_INIT macro, which sets it");
  };
  if constexpr (HasReserved<T>::value) check("reserved", copy.reserved);
  if constexpr (HasReserved2<T>::value) check("reserved2", copy.reserved2);
  return copy;
}

// The same for structs that the library fills.
template <typename T>
void write_struct(T value, T* target, const char* name) {
  const std::size_t size = required(target, name).struct_size;
  if (size < kFirstSize<T> || size > 4096)
    refuse(std::string(name) + "->struct_size is " + std::to_string(size) +
           ", this version's is " + std::to_string(sizeof(T)) + ": use the *_INIT macro");
  value.struct_size = static_cast<std::uint32_t>(size);
  std::memcpy(target, &value, size < sizeof(T) ? size : sizeof(T));
}

}  // namespace capi
