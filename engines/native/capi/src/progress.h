// A caller's progress callback, as Python calls it.
#pragma once

#include "python.h"

namespace capi {

struct Progress {
  recallseg_progress_callback callback;  // may be null
  void* user;
};

// What `follow` of c_interface.py takes: a function, and the address that it is called with. `to`
// must outlive the call.
Ref report_function();
inline long long address_of(const Progress& to) {
  return static_cast<long long>(reinterpret_cast<std::intptr_t>(&to));
}

}  // namespace capi
