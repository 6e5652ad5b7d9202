// Which kernels to use: the best that this processor can run, unless others were chosen.
#pragma once

#include "exact_kernels.h"
#include "head_kernels.h"
#include "quantized_kernels.h"

namespace operators {

struct Level {
  const char* name;
  const QuantizedKernels* quantized;
  const ExactKernels* exact;
  const HeadKernels* head;
};

const Level& level();

struct Levels {
  const Level* first;
  int count;
};
// Every level that this processor can run, best first.
Levels levels();

// For tests: no other call may be in flight.
void choose(const Level& chosen);

}  // namespace operators
