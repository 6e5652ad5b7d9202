// What every operator needs of ONNX Runtime: tensors, threads, errors.
#pragma once

#include <cstdio>
#include <string>
#include <vector>

#include "calls.h"
#include "onnxruntime_abi.h"

namespace operators {

using ort::Status;

#define RETURN_IF_FAILED(expression) \
  if (Status* failure = (expression); failure != nullptr) return failure

// Something of ONNX Runtime's, given back at the end of the scope.
template <class T>
class Held {
 public:
  explicit Held(const ort::Api& api) : api_(api) {}
  Held(const Held&) = delete;
  Held& operator=(const Held&) = delete;
  ~Held() {
    if (value_ != nullptr) api_.release(value_);
  }
  T** place() { return &value_; }
  T* get() const { return value_; }

 private:
  const ort::Api& api_;
  T* value_ = nullptr;
};

using Shape = std::vector<int64_t>;

inline std::string text(const Shape& shape) {
  std::string joined;
  for (const int64_t size : shape) {
    if (!joined.empty()) joined += 'x';
    joined += std::to_string(size);
  }
  return joined;
}

inline Status* invalid(const ort::Api& api, const char* name, const std::string& message) {
  return api.create_status(ort::kInvalidArgument, (name + (": " + message)).c_str());
}

// Takes none itself: what is thrown while an exception is handled would end the process.
inline Status* no_memory(const ort::Api& api, const char* name) {
  char text[64];
  std::snprintf(text, sizeof text, "%s: no memory", name);
  return api.create_status(ort::kFailed, text);
}

// A tensor of the type that the operator declares.
template <class T>
Status* read_input(const ort::Api& api, const ort::KernelContext* context, size_t index,
                   const T*& data, Shape& shape) {
  const ort::Value* value = nullptr;
  RETURN_IF_FAILED(api.input(context, index, &value));
  Held<ort::ShapeInfo> info(api);
  RETURN_IF_FAILED(api.shape(value, info.place()));
  size_t axes = 0;
  RETURN_IF_FAILED(api.axes(info.get(), &axes));
  shape.resize(axes);
  RETURN_IF_FAILED(api.dimensions(info.get(), shape.data(), axes));
  void* raw = nullptr;  // ONNX Runtime has no other way to read a tensor before version 23
  RETURN_IF_FAILED(api.mutable_data(const_cast<ort::Value*>(value), &raw));
  data = static_cast<const T*>(raw);
  return nullptr;
}

template <class T>
Status* make_output(const ort::Api& api, ort::KernelContext* context, const Shape& shape, T*& data) {
  ort::Value* output = nullptr;
  RETURN_IF_FAILED(api.output(context, 0, shape.data(), shape.size(), &output));
  void* raw = nullptr;
  RETURN_IF_FAILED(api.mutable_data(output, &raw));
  data = static_cast<T*>(raw);
  return nullptr;
}

// The session's own threads, as a Pool.
struct Session {
  const ort::Api& api;
  const ort::KernelContext* context;
  Status* failure = nullptr;
};

inline void run(void* pool, Task task, size_t count, void* state) {
  auto& session = *static_cast<Session*>(pool);
  if (session.failure == nullptr)
    session.failure = session.api.parallel(session.context, task, count, 0, state);
}

}  // namespace operators
