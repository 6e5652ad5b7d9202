// `recallseg::QuantizedAttention` for ONNX Runtime's CPU provider: inputs, output, `num_heads` and
// `scale` are those of `com.microsoft::MultiHeadAttention` with three inputs.
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <string>

#include "attention.h"
#include "onnxruntime_abi.h"

namespace {

using ort::Status;

struct Kernel {
  ort::Api api;
  int64_t heads;
  float scale;  // 0: one over the root of a head's width
  ort::MemoryInfo* memory;
};

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

#define RETURN_IF_FAILED(expression) \
  if (Status* failure = (expression); failure != nullptr) return failure

std::string text(const int64_t (&shape)[3]) {
  return std::to_string(shape[0]) + "x" + std::to_string(shape[1]) + "x" +
         std::to_string(shape[2]);
}

Status* invalid(const ort::Api& api, const std::string& message) {
  return api.create_status(ort::kInvalidArgument, ("QuantizedAttention: " + message).c_str());
}

Status* read_input(const ort::Api& api, const ort::KernelContext* context, size_t index,
                   const float*& data, int64_t (&shape)[3]) {
  const ort::Value* value = nullptr;
  RETURN_IF_FAILED(api.input(context, index, &value));
  Held<ort::ShapeInfo> info(api);
  RETURN_IF_FAILED(api.shape(value, info.place()));
  size_t axes = 0;
  RETURN_IF_FAILED(api.axes(info.get(), &axes));
  if (axes != 3)
    return invalid(api, "query, key and value must have 3 axes, got " + std::to_string(axes));
  RETURN_IF_FAILED(api.dimensions(info.get(), shape, 3));
  void* raw = nullptr;  // ONNX Runtime has no other way to read a tensor before version 23
  RETURN_IF_FAILED(api.mutable_data(const_cast<ort::Value*>(value), &raw));
  data = static_cast<const float*>(raw);
  return nullptr;
}

struct Session {
  const ort::Api& api;
  const ort::KernelContext* context;
  Status* failure;
};

void run(void* pool, attention::Task task, size_t count, void* state) {
  auto& session = *static_cast<Session*>(pool);
  if (session.failure == nullptr)
    session.failure = session.api.parallel(session.context, task, count, 0, state);
}

Status* compute(const Kernel& kernel, ort::KernelContext* context) {
  const ort::Api& api = kernel.api;
  int64_t q[3], k[3], v[3];
  attention::Call call{};
  RETURN_IF_FAILED(read_input(api, context, 0, call.query, q));
  RETURN_IF_FAILED(read_input(api, context, 1, call.key, k));
  RETURN_IF_FAILED(read_input(api, context, 2, call.value, v));
  if (q[0] != k[0] || q[0] != v[0] || k[1] != v[1] || q[2] != k[2] || q[2] % kernel.heads != 0 ||
      v[2] % kernel.heads != 0 || k[1] < 1 || q[2] < 1 || v[2] < 1)
    return invalid(api, "expected query BxSxE, key BxLxE, value BxLxF with L, E, F > 0 and E and F "
                        "multiples of num_heads = " + std::to_string(kernel.heads) + "; got " +
                            text(q) + ", " + text(k) + ", " + text(v));
  const int64_t width = q[2] / kernel.heads;
  if (width > 65536) return invalid(api, "a head wider than 65536: sums would not fit into 32 bits");
  const int64_t shape[3] = {q[0], q[1], v[2]};
  ort::Value* output = nullptr;
  RETURN_IF_FAILED(api.output(context, 0, shape, 3, &output));
  void* raw = nullptr;
  RETURN_IF_FAILED(api.mutable_data(output, &raw));
  if (q[0] == 0 || q[1] == 0) return nullptr;
  call.output = static_cast<float*>(raw);
  call.batch = q[0];
  call.heads = kernel.heads;
  const float scale =
      kernel.scale > 0.0f ? kernel.scale : 1.0f / std::sqrt(static_cast<float>(width));
  call.sizes = {q[1], k[1], width, v[2] / kernel.heads, scale};

  Held<ort::Allocator> allocator(api);
  RETURN_IF_FAILED(api.allocator(context, kernel.memory, allocator.place()));
  void* scratch = nullptr;
  const size_t bytes = attention::scratch_bytes(call) + 64;
  RETURN_IF_FAILED(api.allocate(allocator.get(), bytes, &scratch));
  if (scratch == nullptr) return api.create_status(ort::kFailed, "QuantizedAttention: no memory");
  void* aligned = scratch;
  size_t space = bytes;
  std::align(64, bytes - 64, aligned, space);
  Session session{api, context, nullptr};
  const bool done = attention::attend(call, aligned, run, &session);
  RETURN_IF_FAILED(api.free(allocator.get(), scratch));
  if (session.failure != nullptr) return session.failure;
  return done ? nullptr : api.create_status(ort::kFailed, "QuantizedAttention: no memory");
}

Status* create(const void* table, const ort::KernelInfo* info, void** made) {
  const ort::Api api(table);
  Kernel kernel{api, 0, 0.0f, nullptr};
  RETURN_IF_FAILED(api.attribute(info, "num_heads", &kernel.heads));
  if (kernel.heads < 1) return invalid(api, "num_heads must be at least 1");
  if (Status* missing = api.attribute(info, "scale", &kernel.scale); missing != nullptr) {
    api.release(missing);  // it has a default
    kernel.scale = 0.0f;
  }
  if (!(kernel.scale >= 0.0f) || std::isinf(kernel.scale))
    return invalid(api, "scale must be a positive number");
  RETURN_IF_FAILED(api.cpu_memory(ort::kArena, ort::kDefaultMemory, &kernel.memory));
  *made = new (std::nothrow) Kernel(kernel);
  if (*made != nullptr) return nullptr;
  api.release(kernel.memory);
  return api.create_status(ort::kFailed, "QuantizedAttention: no memory");
}

// No exception may pass into ONNX Runtime.
template <class Function>
Status* guarded(const ort::Api& api, const Function& function) {
  try {
    return function();
  } catch (...) {
    return api.create_status(ort::kFailed, "QuantizedAttention: no memory");
  }
}

constexpr int kRequired = 0;

ort::Operator describe() {
  ort::Operator op{};
  op.version = ort::kVersion;
  op.name = [](const ort::Operator*) { return "QuantizedAttention"; };
  op.provider = [](const ort::Operator*) { return "CPUExecutionProvider"; };
  op.input_type = [](const ort::Operator*, size_t) { return ort::kFloat; };
  op.inputs = [](const ort::Operator*) { return size_t{3}; };
  op.output_type = [](const ort::Operator*, size_t) { return ort::kFloat; };
  op.outputs = [](const ort::Operator*) { return size_t{1}; };
  op.destroy = [](void* kernel) {
    const std::unique_ptr<Kernel> own(static_cast<Kernel*>(kernel));
    own->api.release(own->memory);
  };
  op.input_kind = [](const ort::Operator*, size_t) { return kRequired; };
  op.output_kind = [](const ort::Operator*, size_t) { return kRequired; };
  op.input_memory = [](const ort::Operator*, size_t) { return ort::kDefaultMemory; };
  op.variadic_inputs = [](const ort::Operator*) { return 1; };
  op.variadic_inputs_alike = [](const ort::Operator*) { return 1; };
  op.variadic_outputs = [](const ort::Operator*) { return 1; };
  op.variadic_outputs_alike = [](const ort::Operator*) { return 1; };
  op.create = [](const ort::Operator*, const void* api, const ort::KernelInfo* info, void** made) {
    return guarded(ort::Api(api), [&] { return create(api, info, made); });
  };
  op.compute = [](void* made, ort::KernelContext* context) {
    const auto& kernel = *static_cast<const Kernel*>(made);
    return guarded(kernel.api, [&] { return compute(kernel, context); });
  };
  op.first_version = [](const ort::Operator*) { return 1; };
  op.last_version = [](const ort::Operator*) { return std::numeric_limits<int>::max(); };
  return op;
}

// One for the life of the process: every session that was told of it may still use it.
struct Registered {
  ort::Operator op = describe();
  ort::Domain* domain = nullptr;
  Status* failure;

  explicit Registered(const ort::Api& api) : failure(api.create_domain("recallseg", &domain)) {
    if (failure == nullptr) failure = api.add_operator(domain, &op);
  }
};

}  // namespace

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Called by ONNX Runtime when a session is told of this library.
EXPORTED Status* RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base) {
  const void* table = base->table(ort::kVersion);
  if (table == nullptr) {
    const ort::Api oldest(base->table(1));
    return oldest.create_status(ort::kFailed,
                                "recallseg's operators need ONNX Runtime 1.17 or later");
  }
  const ort::Api api(table);
  static const Registered registered(api);
  if (registered.failure != nullptr)
    return api.create_status(ort::kFailed, "recallseg's operators could not be registered");
  return api.add_domain(options, registered.domain);
}

// The chosen level of vector units, for reports.
EXPORTED const char* recallseg_attention_level() { return attention::level().name; }

// For tests: how many levels run here, and the choice of one, best first.
EXPORTED int recallseg_attention_levels() { return attention::levels().count; }
EXPORTED void recallseg_attention_choose(int index) {
  attention::choose(*attention::levels().first[index]);
}
