// The one interpreter: chosen, started or found, checked, and kept.
#pragma once

#include "python.h"

namespace capi {

// Throws E_FORKED or E_STATE unless recallseg_init has succeeded in this process.
void require_ready();

// Whether exit has begun: callbacks are not called any more, what they use may be gone.
bool is_ending();

// Let the end of the process find the library's handler before the destructors of all that Python has
// loaded and made by now. Cheap.
void come_first_at_exit();

// The module recallseg.runtime.services.c_interface; null before it is imported.
const Ref& embedding();

}  // namespace capi
