// As much of ONNX Runtime as the operators see: a table of functions, tensors, tasks in no order.
// Every one of its own calls may be told to fail.
#pragma once

#include <string.h>

#include <cstdlib>
#include <memory>
#include <string>
#include <vector>

#include "onnxruntime_abi.h"
#include "starving.h"

namespace ort {

struct Status {
  std::string text;
};
struct Value {
  std::vector<int64_t> shape;
  std::unique_ptr<char[]> data;
};
struct ShapeInfo {
  const Value* of;
};
struct KernelInfo {
  int64_t heads = 1, columns = 1, activation = 0;
  float scale = 0.0f;
  bool has_scale = false;
};
struct KernelContext {
  Value inputs[10];
  Value output;
};
struct SessionOptions {};
struct Domain {
  std::vector<const Operator*> operators;
};
struct Allocator {};
struct MemoryInfo {};

}  // namespace ort

namespace session {

using namespace ort;

// What an output holds before it is written: a NaN that signals, which no arithmetic gives.
constexpr uint32_t kUnwritten = 0x7f8d1f57;

// The n-th call from now on fails; 0: none does.
inline long failing = 0;
inline long open_things = 0;  // handed out and not given back

inline Status* status_if_due() {
  const starving::Fed fed;
  if (failing > 0 && --failing == 0) {
    ++open_things;
    return new Status{"told to fail"};
  }
  return nullptr;
}

inline size_t elements(const std::vector<int64_t>& shape) {
  size_t count = 1;
  for (const int64_t side : shape) count *= static_cast<size_t>(side);
  return count;
}

#define FAIL_IF_DUE \
  if (Status* told = status_if_due()) return told

inline Domain& domain() {
  static Domain one;
  return one;
}

inline const void* const* table() {
  static const void* functions[300] = {};
  const auto set = [](int place, auto function) {
    functions[place] = reinterpret_cast<const void*>(+function);
  };
  set(0, [](int, const char* message) {
    const starving::Fed fed;
    ++open_things;
    return new Status{message};
  });
  set(26, [](const char*, Domain** made) -> Status* { *made = &domain(); return nullptr; });
  set(27, [](Domain* to, const void* op) -> Status* {
    to->operators.push_back(static_cast<const Operator*>(op));
    return nullptr;
  });
  set(28, [](SessionOptions*, Domain*) -> Status* { return nullptr; });
  set(51, [](Value* value, void** data) -> Status* {
    FAIL_IF_DUE;
    *data = value->data.get();
    return nullptr;
  });
  set(61, [](const ShapeInfo* info, size_t* count) -> Status* {
    FAIL_IF_DUE;
    *count = info->of->shape.size();
    return nullptr;
  });
  set(62, [](const ShapeInfo* info, int64_t* values, size_t count) -> Status* {
    FAIL_IF_DUE;
    for (size_t i = 0; i < count; ++i) values[i] = info->of->shape[i];
    return nullptr;
  });
  set(65, [](const Value* value, ShapeInfo** made) -> Status* {
    const starving::Fed fed;
    FAIL_IF_DUE;
    *made = new ShapeInfo{value};
    ++open_things;
    return nullptr;
  });
  set(69, [](int, int, MemoryInfo** made) -> Status* {
    const starving::Fed fed;
    FAIL_IF_DUE;
    *made = new MemoryInfo;
    ++open_things;
    return nullptr;
  });
  set(75, [](Allocator*, size_t bytes, void** place) -> Status* {
    FAIL_IF_DUE;
    *place = std::malloc(bytes);
    ++open_things;
    return nullptr;
  });
  set(76, [](Allocator*, void* place) -> Status* {
    std::free(place);
    --open_things;
    return nullptr;
  });
  set(85, [](const KernelInfo* info, const char*, float* value) -> Status* {
    const starving::Fed fed;
    if (!info->has_scale) {
      ++open_things;
      return new Status{"no such attribute"};
    }
    *value = info->scale;
    return nullptr;
  });
  set(86, [](const KernelInfo* info, const char* name, int64_t* value) -> Status* {
    FAIL_IF_DUE;
    *value = !strcmp(name, "num_heads") ? info->heads
             : !strcmp(name, "columns") ? info->columns
                                        : info->activation;
    return nullptr;
  });
  set(90, [](const KernelContext* context, size_t index, const Value** value) -> Status* {
    FAIL_IF_DUE;
    *value = &context->inputs[index];
    return nullptr;
  });
  set(91, [](KernelContext* context, size_t, const int64_t* sides, size_t axes, Value** value) -> Status* {
    const starving::Fed fed;
    FAIL_IF_DUE;
    context->output.shape.assign(sides, sides + axes);
    const size_t count = elements(context->output.shape);
    context->output.data.reset(new char[count * sizeof(float)]);
    for (size_t i = 0; i < count; ++i)
      memcpy(context->output.data.get() + i * sizeof(float), &kUnwritten, sizeof kUnwritten);
    *value = &context->output;
    return nullptr;
  });
  set(93, [](Status* status) { --open_things; delete status; });
  set(94, [](MemoryInfo* memory) { --open_things; delete memory; });
  set(99, [](ShapeInfo* shape) { --open_things; delete shape; });
  set(132, [](Allocator* allocator) { --open_things; delete allocator; });
  set(193, [](const KernelContext*, void** stream) -> Status* {
    FAIL_IF_DUE;
    *stream = nullptr;
    return nullptr;
  });
  set(253, [](const KernelContext*, const MemoryInfo*, Allocator** found) -> Status* {
    const starving::Fed fed;
    FAIL_IF_DUE;
    *found = new Allocator;
    ++open_things;
    return nullptr;
  });
  set(274, [](const KernelContext*, Parallel task, size_t count, size_t, void* state) -> Status* {
    FAIL_IF_DUE;
    for (size_t i = count; i-- > 0;) task(state, i);  // no order is promised
    return nullptr;
  });
  return functions;
}

inline const ApiBase& base() {
  static const ApiBase one = {[](uint32_t) -> const void* { return table(); },
                              []() -> const char* { return "1.17.0"; }};
  return one;
}

}  // namespace session
