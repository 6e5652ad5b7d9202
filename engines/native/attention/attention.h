// Attention of all heads: how the work is split and where its parts lie in memory. The same numbers
// come out of any number of threads.
#pragma once

#include <stddef.h>

#include "kernels.h"

namespace attention {

// BxSx(heads*width) queries, BxLx(heads*width) keys, BxLx(heads*values) values, all contiguous.
struct Call {
  int64_t batch;
  int64_t heads;
  Sizes sizes;  // of one head
  const float* query;
  const float* key;
  const float* value;
  float* output;  // BxSx(heads*values)
};

// Calls task(state, i) for each i below `count`, on whatever threads there are, and waits.
using Task = void (*)(void* state, size_t index);
using Pool = void (*)(void* pool, Task task, size_t count, void* state);

// Bytes that `attend` needs beside its inputs, aligned to 64.
size_t scratch_bytes(const Call& call);

// False if a thread could not get memory for its part; nothing of the output is to be used then.
bool attend(const Call& call, void* scratch, Pool run, void* pool);

}  // namespace attention
