// ONNX Runtime's messages: a session that registers this library as one of operators (it has none) is
// given a logging function that needs no Python.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>

#include "log.h"

namespace {

// Of ONNX Runtime's C interface, whose functions keep their places for ever: version 17 is 1.17, and
// there SetUserLoggingFunction is the 266th.
constexpr std::uint32_t kVersion = 17;
constexpr int kPlace = 266;

struct ApiBase {
  const void* const* (*table)(std::uint32_t version);
  const char* (*version)();
};
using LogFunction = void (*)(void* user, int severity, const char* category, const char* id,
                             const char* where, const char* message);
using SetLogFunction = void* (*)(void* options, LogFunction function, void* user);

// Severities: verbose, info, warning, error, fatal. Takes no memory, as nothing may be thrown at ONNX
// Runtime; a longer line is cut.
void log(void*, int severity, const char* category, const char*, const char*, const char* message) {
  const int level = severity >= 3   ? RECALLSEG_LOG_ERROR
                    : severity == 2 ? RECALLSEG_LOG_WARNING
                                    : RECALLSEG_LOG_DEBUG;
  char line[2048];
  std::snprintf(line, sizeof line, "%s: %s", category == nullptr ? "" : category,
                message == nullptr ? "" : message);
  capi::log_native(level, "recallseg.onnxruntime", line);
}

}  // namespace

namespace capi {

std::string own_file() {
  Dl_info info{};
  void* here = nullptr;
  const auto function = &recallseg_version;
  std::memcpy(&here, &function, sizeof here);
  return dladdr(here, &info) != 0 && info.dli_fname != nullptr ? info.dli_fname : "";
}

}  // namespace capi

// Looked for by this name; returns a status, null being success.
extern "C" __attribute__((visibility("default"))) void* RegisterCustomOps(void* options,
                                                                          const ApiBase* base) {
  const void* const* const table = base->table(kVersion);
  if (table == nullptr) return nullptr;  // older than any that is supported
  SetLogFunction set = nullptr;
  std::memcpy(&set, &table[kPlace], sizeof set);
  return set(options, log, nullptr);
}
