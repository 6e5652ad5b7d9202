#include "head.h"

#include <algorithm>

#include "dispatch.h"

namespace operators {
namespace {

// Enough for few threads to end together; each has rows of its own.
constexpr int64_t kTasks = 16;

struct Work {
  const HeadCall& call;
  float* rows;
  int64_t each;   // bands of a task
  void (*band)(const HeadCall&, int64_t band, float* rows);
};

void for_each_band(const HeadCall& call, float* rows, decltype(Work::band) band, Pool run,
                   void* pool) {
  Work work{call, rows, (call.bands() + kTasks - 1) / kTasks, band};
  run(pool, [](void* state, size_t index) {
    const auto& shared = *static_cast<const Work*>(state);
    const auto task = static_cast<int64_t>(index);
    float* own = shared.rows + task * row_floats(shared.call);
    const int64_t end = std::min((task + 1) * shared.each, shared.call.bands());
    for (int64_t i = task * shared.each; i < end; ++i) shared.band(shared.call, i, own);
  }, static_cast<size_t>((call.bands() + work.each - 1) / work.each), &work);
}

}  // namespace

int64_t head_floats(const HeadCall& call) {
  return plane_floats(call) + std::min(kTasks, call.bands()) * row_floats(call);
}

void refine_head(HeadCall call, float* memory, Pool run, void* pool) {
  call.planes = memory;
  float* rows = memory + plane_floats(call);
  const auto reduce = [](const HeadCall& all, int64_t band, float*) {
    level().head->reduce(all, band);
  };
  for_each_band(call, rows, reduce, run, pool);
  for_each_band(call, rows, level().head->filter, run, pool);
  for_each_band(call, rows, level().head->refine, run, pool);
}

}  // namespace operators
