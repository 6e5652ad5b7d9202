#include "rows.h"

namespace pixels {

extern const Rows rows_baseline;
#if defined(PIXELS_X86_LEVELS)
extern const Rows rows_v3;
extern const Rows rows_v4;
#endif

namespace {

const Rows& best() {
#if defined(PIXELS_X86_LEVELS)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return rows_v4;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2"))
    return rows_v3;
#endif
  return rows_baseline;
}

}  // namespace

const Rows& rows() {
  static const Rows& chosen = best();
  return chosen;
}

}  // namespace pixels
