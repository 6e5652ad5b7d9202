#include <atomic>

#include "../processor.h"
#include "rows.h"

namespace pixels {

extern const Rows rows_baseline;
#if defined(PIXELS_X86_LEVELS)
extern const Rows rows_v3;
extern const Rows rows_v4;
#endif

namespace {

#if defined(PIXELS_X86_LEVELS)
const Rows* const kAll[] = {&rows_v4, &rows_v3, &rows_baseline};

int best() {
  return runs_v4() ? 0 : runs_v3() ? 1 : 2;
}
#else
const Rows* const kAll[] = {&rows_baseline};

int best() { return 0; }
#endif

std::atomic<const Rows*>& chosen() {
  static std::atomic<const Rows*> level{kAll[best()]};
  return level;
}

}  // namespace

const Rows& rows() { return *chosen().load(std::memory_order_relaxed); }

Levels levels() {
  const int first = best();
  return {kAll + first, static_cast<int>(sizeof kAll / sizeof kAll[0]) - first};
}

void choose(const Rows& level) { chosen().store(&level, std::memory_order_relaxed); }

}  // namespace pixels
