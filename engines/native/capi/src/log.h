// The host's log callback.
#pragma once

#include <cstdint>
#include <string>

#include "recallseg.h"

namespace capi {

// Give Python the callback that recallseg_set_log stored; under the GIL.
void install_log();

// Pass on a message of native code; needs no Python. Must not throw.
void log_native(int32_t level, const char* logger, const char* message);

// The file that this library was loaded from.
std::string own_file();

}  // namespace capi
