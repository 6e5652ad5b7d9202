#include "quantized_attention.h"

#include <atomic>
#include <cmath>
#include <limits>
#include <memory>
#include <new>

#include "dispatch.h"
#include "quantized_kernels.h"

namespace operators {
namespace {

// With as many heads as this, a head is the task of one thread; what it packs stays in its cache.
constexpr int64_t kManyHeads = 16;

class Memory {
 public:
  explicit Memory(void* first) : first_(static_cast<char*>(first)) {}
  template <class T>
  T* take(int64_t count) {
    char* place = first_ == nullptr ? nullptr : first_ + used_;
    used_ += static_cast<size_t>(rounded_up(count * int64_t{sizeof(T)}, 64));
    return reinterpret_cast<T*>(place);
  }
  size_t used() const { return used_; }

 private:
  char* first_;
  size_t used_ = 0;
};

struct Work {
  const AttentionCall& call;
  const QuantizedKernels& kernels;
  int64_t chunks;
  int64_t tiles;
  Panel first;  // of the first head; the others follow at these distances
  int64_t keys_step, values_step, scales_step, width_step, padded_step;
  Findings* findings;  // of each head's chunks
  float* flaws;        // of each head
  std::atomic<bool> failed{false};

  Work(const AttentionCall& made, Memory& memory)
      : call(made),
        kernels(*level().quantized),
        chunks((made.sizes.keys + kChunk - 1) / kChunk),
        tiles((made.sizes.queries + kTile - 1) / kTile) {
    const Sizes& sizes = call.sizes;
    const int64_t heads = call.batch * call.heads, n = blocks(sizes);
    keys_step = n * kBlock * (rounded_up(sizes.width, 4) / kernels.group);
    values_step = n * kBlock / kernels.group * padded(sizes.values);
    scales_step = n * kBlock;
    width_step = rounded_up(sizes.width, 16);
    padded_step = padded(sizes.values);
    first.keys = memory.take<int32_t>(heads * keys_step);
    first.values = memory.take<int32_t>(heads * values_step);
    first.key_scales = memory.take<float>(heads * scales_step);
    first.key_mean = memory.take<float>(heads * width_step);
    first.value_middle = memory.take<float>(heads * padded_step);
    first.value_scales = memory.take<float>(heads * padded_step);
    first.value_gains = memory.take<float>(heads * padded_step);
    flaws = memory.take<float>(heads);
    findings = memory.take<Findings>(heads * chunks);
    found_ = memory.take<float>(heads * chunks * (width_step + 2 * padded_step));
  }

  Panel panel(int64_t head) const {
    return {first.keys + head * keys_step,           first.values + head * values_step,
            first.key_scales + head * scales_step,   first.key_mean + head * width_step,
            first.value_middle + head * padded_step, first.value_scales + head * padded_step,
            first.value_gains + head * padded_step};
  }
  Rows queries(int64_t head) const {
    return rows_of(call.query, call, call.sizes.queries, call.sizes.width, head);
  }
  Rows keys(int64_t head) const {
    return rows_of(call.key, call, call.sizes.keys, call.sizes.width, head);
  }
  Rows values(int64_t head) const {
    return rows_of(call.value, call, call.sizes.keys, call.sizes.values, head);
  }

  void measure(int64_t head, int64_t chunk) {
    const int64_t index = head * chunks + chunk, end = (chunk + 1) * kChunk;
    float* place = found_ + index * (width_step + 2 * padded_step);
    findings[index] = {place, place + width_step, place + width_step + padded_step, 0.0f};
    kernels.measure(call.sizes, keys(head), values(head), chunk * kChunk,
                  end < call.sizes.keys ? end : call.sizes.keys, findings + index);
  }

  // Chunks are added in their order, whoever measured them.
  void conclude(int64_t head) {
    const Sizes& sizes = call.sizes;
    const Findings* found = findings + head * chunks;
    const Panel made = panel(head);
    float flaw = 0.0f;
    for (int64_t i = 0; i < chunks; ++i) flaw += found[i].flaw;
    flaws[head] = flaw;
    for (int64_t c = 0; c < sizes.width; ++c) {
      double sum = 0.0;
      for (int64_t i = 0; i < chunks; ++i) sum += found[i].sums[c];
      made.key_mean[c] = static_cast<float>(sum / static_cast<double>(sizes.keys));
    }
    for (int64_t c = 0; c < sizes.values; ++c) {
      float lowest = found[0].lowest[c], highest = found[0].highest[c];
      for (int64_t i = 1; i < chunks; ++i) {
        lowest = found[i].lowest[c] < lowest ? found[i].lowest[c] : lowest;
        highest = found[i].highest[c] > highest ? found[i].highest[c] : highest;
      }
      made.value_middle[c] = 0.5f * lowest + 0.5f * highest;
      const float scale = (0.5f * highest - 0.5f * lowest) / 127.0f;
      made.value_scales[c] = scale;
      made.value_gains[c] = scale > 1e-30f ? 1.0f / scale : 0.0f;
    }
  }

  void pack(int64_t head, int64_t block) {
    if (std::isnan(flaws[head])) return;  // means and scales are not numbers
    kernels.pack(call.sizes, keys(head), values(head), block, panel(head));
  }

  void attend(int64_t head, int64_t tile) {
    const Sizes& sizes = call.sizes;
    const int64_t end = (tile + 1) * kTile, from = tile * kTile;
    const int64_t to = end < sizes.queries ? end : sizes.queries;
    const int64_t stride = call.heads * sizes.values;
    float* output = call.output + (head / call.heads) * sizes.queries * stride +
                    (head % call.heads) * sizes.values;
    if (std::isnan(flaws[head])) {
      for (int64_t row = from; row < to; ++row)
        for (int64_t c = 0; c < sizes.values; ++c)
          output[row * stride + c] = std::numeric_limits<float>::quiet_NaN();
      return;
    }
    const auto bytes = static_cast<size_t>(attend_bytes(sizes));
    const std::unique_ptr<char[]> own(new (std::nothrow) char[bytes]);
    if (own == nullptr) {
      failed = true;
      return;
    }
    void* aligned = own.get();
    size_t space = bytes;
    std::align(64, bytes - 64, aligned, space);
    kernels.attend(sizes, queries(head), from, to, panel(head), output, stride, aligned);
  }

 private:
  float* found_;
};

Work& work_of(void* state) { return *static_cast<Work*>(state); }

}  // namespace

size_t scratch_bytes(const AttentionCall& call) {
  Memory memory(nullptr);
  const Work work(call, memory);
  return memory.used();
}

bool attend_quantized(const AttentionCall& call, void* scratch, Pool run, void* pool) {
  Memory memory(scratch);
  Work work(call, memory);
  const auto heads = static_cast<size_t>(call.batch * call.heads);
  if (call.batch * call.heads >= kManyHeads) {
    run(pool, [](void* state, size_t index) {
      Work& all = work_of(state);
      const auto head = static_cast<int64_t>(index);
      for (int64_t i = 0; i < all.chunks; ++i) all.measure(head, i);
      all.conclude(head);
      for (int64_t i = 0; i < blocks(all.call.sizes); ++i) all.pack(head, i);
      for (int64_t i = 0; i < all.tiles; ++i) all.attend(head, i);
    }, heads, &work);
    return !work.failed;
  }
  run(pool, [](void* state, size_t index) {
    const auto i = static_cast<int64_t>(index);
    work_of(state).measure(i / work_of(state).chunks, i % work_of(state).chunks);
  }, heads * static_cast<size_t>(work.chunks), &work);
  // Through the pool too: where that has failed, nothing was measured that could be read.
  run(pool, [](void* state, size_t index) {
    work_of(state).conclude(static_cast<int64_t>(index));
  }, heads, &work);
  run(pool, [](void* state, size_t index) {
    const int64_t i = static_cast<int64_t>(index), n = blocks(work_of(state).call.sizes);
    work_of(state).pack(i / n, i % n);
  }, heads * static_cast<size_t>(blocks(call.sizes)), &work);
  run(pool, [](void* state, size_t index) {
    const auto i = static_cast<int64_t>(index);
    work_of(state).attend(i / work_of(state).tiles, i % work_of(state).tiles);
  }, heads * static_cast<size_t>(work.tiles), &work);
  return !work.failed;
}

}  // namespace operators
