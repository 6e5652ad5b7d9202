// Attention with 8-bit products, all heads: how the work is split and where its parts lie in memory.
// The same numbers come out of any number of threads.
#pragma once

#include "calls.h"

namespace operators {

// Bytes that `attend_quantized` needs beside its inputs, aligned to 64.
size_t scratch_bytes(const AttentionCall& call);

// False if a thread could not get memory for its part; nothing of the output is to be used then.
bool attend_quantized(const AttentionCall& call, void* scratch, Pool run, void* pool);

}  // namespace operators
