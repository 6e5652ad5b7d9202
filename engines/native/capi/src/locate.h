// Which interpreter: from options, environment variables and what was known when building.
#pragma once

#include <string>

#include "recallseg.h"

namespace capi {

struct Choice {
  std::string python, python_library, python_home, site_packages;
};

Choice choose(const recallseg_init_options& options);
bool is_default(const recallseg_init_options& options);
bool same_interpreter(const Choice& one, const Choice& other);

// Throws E_PYTHON unless the executable is there.
void check_executable(const Choice& choice);

// Return the libpython that belongs to an executable, or "" if there is none.
std::string find_library(const Choice& choice);

}  // namespace capi
