#include "locate.h"

#include <patchlevel.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <vector>

#include "error.h"

namespace capi {
namespace {

namespace fs = std::filesystem;

// The first that is given: an option, an environment variable, a value known when building. A
// program that runs with more rights than its caller takes nothing from the caller's environment.
std::string first(const char* option, const char* variable, const char* built_in) {
  const char* from_environment = variable == nullptr ? nullptr : ::secure_getenv(variable);
  return text_or(option, text_or(from_environment, built_in));
}

// The folder of the interpreter that a virtual environment was made with; empty if it is none.
fs::path home_of_environment(const fs::path& executable) {
  std::ifstream file(executable.parent_path().parent_path() / "pyvenv.cfg");
  for (std::string line; std::getline(file, line);) {
    const auto sign = line.find('=');
    if (sign == std::string::npos || line.compare(0, 4, "home") != 0) continue;
    const auto begin = line.find_first_not_of(" \t", sign + 1);
    const auto end = line.find_last_not_of(" \t\r");
    if (begin != std::string::npos) return line.substr(begin, end - begin + 1);
  }
  return {};
}

bool is_script(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return file.get() == '#' && file.get() == '!';
}

}  // namespace

Choice choose(const recallseg_init_options& options) {
  return {first(options.python, "RECALLSEG_PYTHON", RECALLSEG_DEFAULT_PYTHON),
          first(options.python_library, "RECALLSEG_PYTHON_LIBRARY", ""),
          first(options.python_home, nullptr, ""),
          first(options.site_packages, "RECALLSEG_SITE_PACKAGES", "")};
}

bool is_default(const recallseg_init_options& options) {
  for (const char* text :
       {options.python, options.python_library, options.python_home, options.site_packages})
    if (text != nullptr && *text != '\0') return false;
  return true;
}

bool same_interpreter(const Choice& one, const Choice& other) {
  return one.python == other.python && one.python_library == other.python_library &&
         one.python_home == other.python_home;
}

void check_executable(const Choice& choice) {
  if (choice.python.empty())
    throw Error(RECALLSEG_E_PYTHON,
                "no Python is chosen. Give the path of the executable whose packages are to be "
                "used in recallseg_init_options.python or in RECALLSEG_PYTHON");
  if (choice.python[0] != '/' || access(choice.python.c_str(), X_OK) != 0)
    throw Error(RECALLSEG_E_PYTHON,
                "there is no Python executable '" + choice.python +
                    "' (a full path is needed). Give another in recallseg_init_options.python or "
                    "in RECALLSEG_PYTHON");
  if (is_script(choice.python))
    throw Error(RECALLSEG_E_PYTHON,
                "'" + choice.python +
                    "' is a script that starts Python, as version managers make them. Give what it "
                    "prints for -c 'import sys; print(sys.executable)' in "
                    "recallseg_init_options.python or in RECALLSEG_PYTHON");
}

std::string find_library(const Choice& choice) {
  if (!choice.python_library.empty()) return choice.python_library;
  check_executable(choice);
  const fs::path executable = choice.python;
  std::error_code ignored;  // a folder that cannot be resolved holds no library
  std::vector<fs::path> folders;
  if (const fs::path home = home_of_environment(executable); !home.empty())
    folders.push_back(home.parent_path());
  folders.push_back(executable.parent_path().parent_path());
  folders.push_back(fs::canonical(executable, ignored).parent_path().parent_path());
  const std::string name = "libpython" + std::to_string(PY_MAJOR_VERSION) + "." +
                           std::to_string(PY_MINOR_VERSION) + ".so";
  for (const fs::path& folder : folders)
    for (const char* inside : {"lib", "lib64", "lib/" RECALLSEG_LIBRARY_ARCHITECTURE})
      for (const char* suffix : {".1.0", ""})
        if (const fs::path file = folder / inside / (name + suffix); fs::exists(file, ignored))
          return file.string();
  return "";
}

}  // namespace capi
