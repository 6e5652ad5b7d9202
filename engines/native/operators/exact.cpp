#include "exact.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>

#include "dispatch.h"

namespace operators {
namespace {

// Enough tasks for any number of threads to end together, few enough to be handed out cheaply.
constexpr int64_t kTasks = 64;
constexpr int64_t kRowsOfTask = 8 * kRows;
constexpr int64_t kColumnsOfTask = 4 * kStripe;

int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }

struct LinearWork {
  const LinearCall& call;
  int64_t rows, columns;  // of a task
  int64_t across;         // tasks side by side
};

struct AttentionWork {
  const AttentionCall& call;
  int64_t tiles;  // of a head
  int64_t all, each;
  std::atomic<bool> failed{false};

  void attend(int64_t first) {
    const auto floats = static_cast<size_t>(scratch_floats(call.sizes));
    size_t space = floats * sizeof(float) + 64;
    const std::unique_ptr<char[]> own(new (std::nothrow) char[space]);
    if (own == nullptr) {
      failed = true;
      return;
    }
    void* aligned = own.get();
    std::align(64, floats * sizeof(float), aligned, space);
    for (int64_t i = first; i < std::min(first + each, all); ++i) {
      const int64_t from = i % tiles * kQueries;
      level().exact->attend(call, i / tiles, from, std::min(from + kQueries, call.sizes.queries),
                            static_cast<float*>(aligned));
    }
  }
};

}  // namespace

void apply_linear(const LinearCall& call, Pool run, void* pool) {
  if (call.rows == 0) return;
  // Few rows are split by columns too; many rows are given out several tiles at a time.
  const int64_t tiles = parts(call.rows, kRowsOfTask);
  const int64_t most = parts(call.columns, kColumnsOfTask);
  const int64_t across = std::clamp(kTasks / 4 / tiles, int64_t{1}, most);
  LinearWork work{call, parts(tiles, kTasks) * kRowsOfTask, parts(most, across) * kColumnsOfTask, 0};
  work.across = parts(call.columns, work.columns);
  run(pool, [](void* state, size_t index) {
    const auto& all = *static_cast<const LinearWork*>(state);
    const int64_t i = static_cast<int64_t>(index);
    const int64_t from = i / all.across * all.rows, first = i % all.across * all.columns;
    const int64_t to = std::min(from + all.rows, all.call.rows);
    const int64_t last = std::min(first + all.columns, all.call.columns);
    for (int64_t row = from; row < to; row += kRowsOfTask)
      level().exact->linear(all.call, row, std::min(row + kRowsOfTask, to), first, last);
  }, static_cast<size_t>(parts(call.rows, work.rows) * work.across), &work);
}

bool attend_exact(const AttentionCall& call, Pool run, void* pool) {
  const int64_t tiles = parts(call.sizes.queries, kQueries);
  const int64_t all = call.batch * call.heads * tiles;
  if (all == 0) return true;
  AttentionWork work{call, tiles, all, parts(all, kTasks)};
  run(pool, [](void* state, size_t index) {
    auto& shared = *static_cast<AttentionWork*>(state);
    shared.attend(static_cast<int64_t>(index) * shared.each);
  }, static_cast<size_t>(parts(all, work.each)), &work);
  return !work.failed;
}

}  // namespace operators
