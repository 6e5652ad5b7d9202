#include "dispatch.h"

#include <atomic>

#include "../processor.h"

namespace operators {

#define DECLARE(level)                             \
  extern const QuantizedKernels quantized_##level; \
  extern const ExactKernels exact_##level;         \
  extern const HeadKernels head_##level
#define LEVEL(level) {#level, &quantized_##level, &exact_##level, &head_##level}

DECLARE(baseline);
#if defined(OPERATORS_X86_LEVELS)
DECLARE(v3);
DECLARE(vnni);
#endif

namespace {

#if defined(OPERATORS_X86_LEVELS)
const Level kAll[] = {LEVEL(vnni), LEVEL(v3), LEVEL(baseline)};

int best() {
  if (runs_v4() && __builtin_cpu_supports("avx512vnni")) return 0;
  return runs_v3() ? 1 : 2;
}
#else
const Level kAll[] = {LEVEL(baseline)};

int best() { return 0; }
#endif

std::atomic<const Level*>& chosen() {
  static std::atomic<const Level*> found{&kAll[best()]};
  return found;
}

}  // namespace

const Level& level() { return *chosen().load(std::memory_order_relaxed); }

Levels levels() {
  const int first = best();
  return {kAll + first, static_cast<int>(sizeof kAll / sizeof kAll[0]) - first};
}

void choose(const Level& wanted) { chosen().store(&wanted, std::memory_order_relaxed); }

}  // namespace operators
