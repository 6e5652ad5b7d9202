// The one interpreter: chosen, started or found, checked, and kept.
#pragma once

#include "python.h"

namespace capi {

// Throws E_FORKED or E_STATE unless recallseg_init has succeeded in this process.
void require_ready();

// The module recallseg.runtime.services.c_interface; null before it is imported.
const Ref& embedding();

}  // namespace capi
