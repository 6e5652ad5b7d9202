#include <atomic>

#include "../processor.h"
#include "kernels.h"

namespace attention {

extern const Level level_baseline;
#if defined(ATTENTION_X86_LEVELS)
extern const Level level_v3;
extern const Level level_vnni;
#endif

namespace {

#if defined(ATTENTION_X86_LEVELS)
const Level* const kAll[] = {&level_vnni, &level_v3, &level_baseline};

int best() {
  if (runs_v4() && __builtin_cpu_supports("avx512vnni")) return 0;
  return runs_v3() ? 1 : 2;
}
#else
const Level* const kAll[] = {&level_baseline};

int best() { return 0; }
#endif

std::atomic<const Level*>& chosen() {
  static std::atomic<const Level*> found{kAll[best()]};
  return found;
}

}  // namespace

const Level& level() { return *chosen().load(std::memory_order_relaxed); }

Levels levels() {
  const int first = best();
  return {kAll + first, static_cast<int>(sizeof kAll / sizeof kAll[0]) - first};
}

void choose(const Level& wanted) { chosen().store(&wanted, std::memory_order_relaxed); }

}  // namespace attention
