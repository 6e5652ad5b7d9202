#include "interpreter.h"

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <filesystem>
#include <mutex>
#include <system_error>

#include "handles.h"
#include "locate.h"
#include "log.h"

namespace capi {
namespace {

constexpr long long kInterface = 5;  // INTERFACE of recallseg.runtime.services.c_interface

struct Info {
  std::string python_version, python_library, python, prefix, package_version, package_folder;
};

// Never destroyed: other threads may be in a call while the process exits.
struct Interpreter {
  std::mutex starting;
  std::atomic<bool> ready{false};
  std::atomic<bool> forked{false};
  std::atomic<bool> ending{false};
  std::atomic<unsigned long long> loads{0};  // shared objects loaded when end_... was registered
  std::atomic<unsigned long long> calls{0};  // that have gone through Python
  bool started = false;   // by this library
  bool attached = false;  // to a host's; or started
  Choice choice;          // that it was started with
  Ref embedding;
  Info info;
};

Interpreter& interpreter() {
  static auto* const one = new Interpreter;
  return *one;
}

constexpr double kLongestAtExit = 10.0;  // seconds

// At exit, before what networks are made of is torn down: refuse new calls, let those in flight and
// the frames in work end, and free the models. A thread that goes on calling gets E_STATE.
void end_with_the_process() {
  Interpreter& self = interpreter();
  if (self.forked || !self.attached || self.ending.exchange(true)) return;
  self.ready = false;
  const InFlight counted;  // what exits may itself be a callback
  if (python.Py_IsInitialized() == 0) return;  // a host's Python has ended before: so have we
  bool quiet = true;
  if (self.embedding) {
    const Gil gil;
    guarded([&] {
      const Ref done = call("close_streams", kLongestAtExit);
      quiet = python.PyObject_IsTrue(done.get()) == 1;
    });
  }
  if (quiet && InFlight::wait_for_others(kLongestAtExit)) close_all_handles();
}

int read_loads(dl_phdr_info* info, std::size_t, void* loads) {
  *static_cast<unsigned long long*>(loads) = info->dlpi_adds;
  return 1;  // the same for each object: one is enough
}

void in_forked_child() {
  if (interpreter().attached) interpreter().forked = true;
}

void check_status(const PyStatus& status) {
  if (python.PyStatus_Exception(status) == 0) return;
  throw Error(RECALLSEG_E_PYTHON,
              std::string("Python did not start: ") +
                  (status.err_msg == nullptr ? "it gave no reason" : status.err_msg));
}

void set_text(PyConfig& config, wchar_t** field, const std::string& value) {
  if (!value.empty()) check_status(python.PyConfig_SetBytesString(&config, field, value.c_str()));
}

// Start isolated: no environment variables, no user site, no signal handlers, no change of locale,
// no parsing of arguments; UTF-8 whatever the host's locale is.
void start(const Choice& choice) {
  PyPreConfig before;
  python.PyPreConfig_InitIsolatedConfig(&before);
  before.utf8_mode = 1;
  check_status(python.Py_PreInitialize(&before));
  PyConfig config;
  python.PyConfig_InitIsolatedConfig(&config);
  config.install_signal_handlers = 0;
  try {
    set_text(config, &config.program_name, choice.python);
    set_text(config, &config.executable, choice.python);
    set_text(config, &config.home, choice.python_home);
    check_status(python.Py_InitializeFromConfig(&config));
  } catch (...) {
    python.PyConfig_Clear(&config);
    throw;
  }
  python.PyConfig_Clear(&config);
  python.PyEval_SaveThread();  // from now on whoever needs the GIL takes it
}

// An import hook, as editable installs make them, goes before any folder.
void check_origin(const std::string& file, const std::string& site_packages) {
  namespace fs = std::filesystem;
  std::error_code missing;
  if (!site_packages.empty() &&
      !fs::equivalent(fs::path(file).parent_path().parent_path(), site_packages, missing))
    throw Error(RECALLSEG_E_PYTHON, "the package recallseg was found as " + file + ", not in " +
                                        site_packages +
                                        ": is another one installed as editable?");
}

void import_package(const std::string& site_packages) {
  if (!site_packages.empty()) {
    const Ref folder = to_python(site_packages.c_str());
    if (python.PyList_Insert(python.PySys_GetObject("path"), 0, folder.get()) != 0)
      throw_python_error();
  }
  const Ref package = checked(python.PyImport_ImportModule("recallseg"));
  const Ref file = checked(python.PyObject_GetAttrString(package.get(), "__file__"));
  check_origin(text_of(file.get()), site_packages);
  const Ref version = checked(python.PyObject_GetAttrString(package.get(), "__version__"));
  if (text_of(version.get()) != RECALLSEG_VERSION)
    throw Error(RECALLSEG_E_ABI, "the Python package recallseg has version " +
                                     text_of(version.get()) + ", librecallseg " +
                                     RECALLSEG_VERSION + ": install both from one release");
  Ref module = checked(python.PyImport_ImportModule("recallseg.runtime.services.c_interface"));
  const Ref number = checked(python.PyObject_GetAttrString(module.get(), "INTERFACE"));
  if (python.PyLong_AsLongLong(number.get()) != kInterface)
    throw Error(RECALLSEG_E_ABI,
                "the Python package recallseg is of the right version but has another interface "
                "to librecallseg: install both from one release");
  interpreter().embedding = std::move(module);
}

void read_info() {
  const Ref facts = call("describe");
  Reader reader(facts.get());
  Info& info = interpreter().info;
  info.python_version = reader.text();
  info.python = reader.text();
  info.prefix = reader.text();
  info.package_version = reader.text();
  info.package_folder = reader.text();
  info.python_library = python.file;
}

void attach(const recallseg_init_options& options) {
  Interpreter& self = interpreter();
  if (!self.attached) {
    const bool here = dlsym(RTLD_DEFAULT, "Py_IsInitialized") != nullptr;
    load_python(here ? "" : find_library(choose(options)));
    if (python.Py_IsInitialized() != 0) {
      if (!is_default(options))
        throw Error(RECALLSEG_E_STATE,
                    "this process runs Python already (" + python.file +
                        "), and that is used: leave python, python_library, python_home and "
                        "site_packages null");
    } else {
      self.choice = choose(options);
      check_executable(self.choice);
      start(self.choice);
      self.started = true;
    }
    if (pthread_atfork(nullptr, nullptr, in_forked_child) != 0) throw std::bad_alloc();
    self.attached = true;
  } else if (self.started && !same_interpreter(self.choice, choose(options))) {
    throw Error(RECALLSEG_E_STATE, "the interpreter of " + self.choice.python +
                                       " runs already; a process can have only one");
  }
  const Gil gil;
  if (!self.embedding) {
    import_package(self.started ? choose(options).site_packages : "");
    read_info();
  } else if (self.started && self.choice.site_packages != choose(options).site_packages) {
    throw Error(RECALLSEG_E_STATE, "the package is loaded already from " +
                                       self.info.package_folder);
  }
  if (self.started) self.choice.site_packages = choose(options).site_packages;
  install_log();
}

}  // namespace

// What is registered last runs first. A shared object's destructors are registered when it is loaded,
// and those of what it makes at its first use (thread pools, tables of types) at that use: so the
// handler is registered once more whenever there are new objects, after the first calls, and then
// each time that their number has doubled.
void come_first_at_exit() {
  constexpr unsigned long long kFirst = 256;
  Interpreter& self = interpreter();
  unsigned long long loads = 0;
  dl_iterate_phdr(read_loads, &loads);
  const unsigned long long calls = ++self.calls;
  const bool early = calls <= kFirst || (calls & (calls - 1)) == 0;
  if (self.loads.exchange(loads) != loads || early) std::atexit(end_with_the_process);
}

void require_ready() {
  if (interpreter().ending)
    throw Error(RECALLSEG_E_STATE, "the process is ending (exit, or a return from main)");
  if (interpreter().forked)
    throw Error(RECALLSEG_E_FORKED,
                "this process was forked from one that had called recallseg_init: the threads that "
                "it needs are not here. Fork first, or start another program with exec");
  if (!interpreter().ready)
    throw Error(RECALLSEG_E_STATE, "recallseg_init has not been called, or recallseg_shutdown has");
}

bool is_ending() { return interpreter().ending; }

const Ref& embedding() { return interpreter().embedding; }

}  // namespace capi

using namespace capi;

extern "C" {

recallseg_status recallseg_init(uint32_t abi_version, const recallseg_init_options* options) {
  return guarded([&] {
    if (interpreter().forked || interpreter().ending) require_ready();
    if (abi_version < 1 || abi_version > RECALLSEG_ABI_VERSION)
      throw Error(RECALLSEG_E_ABI, "the program was compiled for ABI " +
                                       std::to_string(abi_version) + ", librecallseg has " +
                                       std::to_string(RECALLSEG_ABI_VERSION) +
                                       " and takes every older one: install a newer librecallseg, "
                                       "or compile the program with the installed recallseg.h");
    recallseg_init_options chosen = RECALLSEG_INIT_OPTIONS_INIT;
    if (options != nullptr) chosen = read_struct(options, "options");
    const std::unique_lock<std::mutex> alone(interpreter().starting, std::try_to_lock);
    if (!alone.owns_lock())
      throw Error(RECALLSEG_E_STATE, "another thread is in recallseg_init or recallseg_shutdown");
    attach(chosen);
    come_first_at_exit();
    interpreter().ready = true;
  });
}

recallseg_status recallseg_get_info(recallseg_info* info) {
  return guarded([&] {
    require_ready();
    const Info& known = interpreter().info;
    recallseg_info answer = RECALLSEG_INFO_INIT;
    answer.hosted = interpreter().started ? 0 : 1;
    answer.python_version = known.python_version.c_str();
    answer.python_library = known.python_library.c_str();
    answer.python = known.python.c_str();
    answer.python_prefix = known.prefix.c_str();
    answer.package_version = known.package_version.c_str();
    answer.package_folder = known.package_folder.c_str();
    write_struct(answer, info, "info");
  });
}

recallseg_status recallseg_shutdown(void) {
  return guarded([&] {
    require_ready();
    const std::unique_lock<std::mutex> alone(interpreter().starting, std::try_to_lock);
    if (!alone.owns_lock())
      throw Error(RECALLSEG_E_STATE, "another thread is in recallseg_init or recallseg_shutdown");
    interpreter().ready = false;
    close_all_handles();
  });
}
}
