#include "log.h"

#include <condition_variable>
#include <mutex>

#include "interpreter.h"

namespace capi {
namespace {

struct Target {
  recallseg_log_callback callback = nullptr;
  void* user = nullptr;
  int32_t level = RECALLSEG_LOG_INFO;
};

// Never destroyed: a thread may log while the process exits.
struct Log {
  std::mutex mutex;
  std::condition_variable idle;
  Target target;
  int running = 0;
};

Log& state() {
  static auto* const one = new Log;
  return *one;
}

thread_local int running_here = 0;

void pass_on(int32_t level, const char* logger, const char* message) {
  Log& log = state();
  Target target;
  {
    const std::lock_guard<std::mutex> lock(log.mutex);
    target = log.target;
    if (target.callback == nullptr || is_ending()) return;
    ++log.running;
  }
  ++running_here;
  target.callback(level, logger, message, target.user);
  --running_here;
  const std::lock_guard<std::mutex> lock(log.mutex);
  --log.running;
  log.idle.notify_all();
}

// emit(level, logger, message), called by Python under the GIL; the callback runs without it.
PyObject* emit(PyObject*, PyObject* arguments) {
  const recallseg_status status = guarded([&] {
    Reader reader(arguments);
    const auto level = static_cast<int32_t>(reader.integer());
    const std::string logger = reader.text(), message = reader.text();
    PyThreadState* const thread = python.PyEval_SaveThread();
    pass_on(level, logger.c_str(), message.c_str());
    python.PyEval_RestoreThread(thread);
  });
  return status == RECALLSEG_OK ? python.Py_BuildValue("") : raise_last_error();
}

PyMethodDef emit_definition = {"emit", emit, METH_VARARGS, nullptr};

}  // namespace

void install_log() {
  Target target;
  {
    const std::lock_guard<std::mutex> lock(state().mutex);
    target = state().target;
  }
  call("set_log",
       target.callback == nullptr
           ? none()
           : checked((python.PyCFunction_NewEx)(&emit_definition, nullptr, nullptr)),  // a macro without these parentheses
       target.level, own_file().c_str());
}

void log_native(int32_t level, const char* logger, const char* message) {
  bool wanted = false;
  {
    const std::lock_guard<std::mutex> lock(state().mutex);
    wanted = level >= state().target.level;
  }
  if (wanted) pass_on(level, logger, message);
}

}  // namespace capi

using namespace capi;

extern "C" recallseg_status recallseg_set_log(recallseg_log_callback callback, void* user,
                                              int32_t level) {
  return guarded([&] {
    if (callback != nullptr && (level < 1 || level > 50))
      refuse("level must be 1 to 50, such as RECALLSEG_LOG_INFO, got " + std::to_string(level));
    Log& log = state();
    {
      std::unique_lock<std::mutex> lock(log.mutex);
      log.target = {callback, user, level};
      log.idle.wait(lock, [&] { return log.running == running_here; });
    }
    if (!embedding()) return;  // recallseg_init will install it
    require_ready();
    const Gil gil;
    install_log();
  });
}
