// The host's log callback.
#pragma once

namespace capi {

// Give Python the callback that recallseg_set_log stored; under the GIL.
void install_log();

}  // namespace capi
