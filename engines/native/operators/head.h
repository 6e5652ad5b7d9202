// A head on an image: how the work is split. The same numbers come out of any number of threads.
#pragma once

#include "head_kernels.h"

namespace operators {

// What `memory` of refine_head holds.
int64_t head_floats(const HeadCall& call);

// `memory` is aligned to 64 bytes; it becomes the call's planes, and the threads' rows.
void refine_head(HeadCall call, float* memory, Pool run, void* pool);

}  // namespace operators
