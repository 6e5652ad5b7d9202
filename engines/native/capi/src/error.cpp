#include "error.h"

#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <mutex>

namespace capi {
namespace {

constexpr std::size_t kLongest = 2048;
thread_local char last_error[kLongest];

// Never destroyed: other threads may be in a call while the process exits.
struct Calls {
  std::mutex mutex;
  std::condition_variable fewer;
  int count = 0;
};

Calls& calls() {
  static auto* const one = new Calls;
  return *one;
}

thread_local int calls_here = 0;

}  // namespace

InFlight::InFlight() noexcept {
  ++calls_here;
  const std::lock_guard<std::mutex> lock(calls().mutex);
  ++calls().count;
}

InFlight::~InFlight() {
  --calls_here;
  const std::lock_guard<std::mutex> lock(calls().mutex);
  --calls().count;
  calls().fewer.notify_all();
}

bool InFlight::wait_for_others(double seconds) {
  Calls& all = calls();
  std::unique_lock<std::mutex> lock(all.mutex);
  return all.fewer.wait_for(lock, std::chrono::duration<double>(seconds),
                            [&] { return all.count == calls_here; });
}

recallseg_status fail(recallseg_status status, const char* message) noexcept {
  std::snprintf(last_error, sizeof last_error, "%s", message);
  return status;
}

}  // namespace capi

extern "C" {

const char* recallseg_version(void) { return RECALLSEG_VERSION; }

uint32_t recallseg_abi_version(void) { return RECALLSEG_ABI_VERSION; }

const char* recallseg_last_error(void) { return capi::last_error; }

const char* recallseg_status_text(recallseg_status status) {
  switch (status) {
    case RECALLSEG_OK: return "ok";
    case RECALLSEG_E_ARGUMENT: return "wrong argument";
    case RECALLSEG_E_HANDLE: return "wrong or closed handle";
    case RECALLSEG_E_ABI: return "versions do not fit together";
    case RECALLSEG_E_STATE: return "not in this state";
    case RECALLSEG_E_FORKED: return "forked process";
    case RECALLSEG_E_PYTHON: return "Python unusable";
    case RECALLSEG_E_INPUT: return "unusable input";
    case RECALLSEG_E_BUNDLE: return "unusable bundle";
    case RECALLSEG_E_ENGINE_UNAVAILABLE: return "engine unavailable";
    case RECALLSEG_E_ENGINE: return "engine failed";
    case RECALLSEG_E_DEADLINE: return "deadline missed";
    case RECALLSEG_E_LIBRARY: return "unusable library";
    case RECALLSEG_E_LIBRARY_NOT_FOUND: return "library not found";
    case RECALLSEG_E_LIBRARY_CORRUPT: return "library corrupt";
    case RECALLSEG_E_LIBRARY_VERSION: return "library too new";
    case RECALLSEG_E_LIBRARY_MISMATCH: return "library of another bundle";
    case RECALLSEG_E_LIBRARY_LOCKED: return "library locked";
    case RECALLSEG_E_LIBRARY_WRITE: return "library not writable";
    case RECALLSEG_E_MEMORY: return "out of memory";
    case RECALLSEG_E_CANCELLED: return "cancelled";
    case RECALLSEG_E_AUDIT: return "audit log";
    case RECALLSEG_E_INTERNAL: return "defect";
    default: return "unknown status";
  }
}
}
