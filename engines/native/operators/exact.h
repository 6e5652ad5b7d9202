// Products and attention in fp32: how the work is split. The same numbers come out of any number of
// threads.
#pragma once

#include "calls.h"

namespace operators {

void apply_linear(const LinearCall& call, Pool run, void* pool);

// False if a thread could not get memory for its part; nothing of the output is to be used then.
bool attend_exact(const AttentionCall& call, Pool run, void* pool);

}  // namespace operators
