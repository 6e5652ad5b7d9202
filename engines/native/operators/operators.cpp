// The operators of domain `recallseg` for ONNX Runtime, and how it is told of them. All are for the
// CPU provider but HalfLinear, which is for CUDA's.
//
// Attention, QuantizedAttention: inputs, output, `num_heads` and `scale` are those of
// `com.microsoft::MultiHeadAttention` with three inputs.
// Linear: input [...][width], weights [stripes][width][16], bias [stripes][16]; attributes `columns`
// and `activation` (an Activation). Output [...][columns].
// Refine: image 1x3xHxW, logits 1xnxHxW, planes beside them 1xmxHxW, weights and biases of three
// layers, mix 1xnx1x1; what engines/heads/refine.onnx makes of them. Output 1xnxHxW.
// HalfLinear: fp16 input [...][width], weights [width][columns], bias [columns]; `activation` as
// there, GELU in its tanh form. Output [...][columns].
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>

#include "dispatch.h"
#include "cublaslt.h"
#include "exact.h"
#include "head.h"
#include "quantized_attention.h"
#include "session.h"

namespace operators {
namespace {

struct AttentionKernel {
  ort::Api api;
  int64_t heads = 0;
  float scale = 0.0f;  // 0: one over the root of a head's width

  explicit AttentionKernel(const ort::Api& made) : api(made) {}

  Status* configure(const char* name, const ort::KernelInfo* info) {
    RETURN_IF_FAILED(api.attribute(info, "num_heads", &heads));
    if (heads < 1) return invalid(api, name, "num_heads must be at least 1");
    if (Status* missing = api.attribute(info, "scale", &scale); missing != nullptr) {
      api.release(missing);  // it has a default
      scale = 0.0f;
    }
    if (!(scale >= 0.0f) || std::isinf(scale))
      return invalid(api, name, "scale must be a positive number");
    return nullptr;
  }

  // Reads the inputs and makes the output; nothing is left to do if that is empty.
  Status* prepare(const char* name, ort::KernelContext* context, AttentionCall& call) const {
    Shape q, k, v;
    RETURN_IF_FAILED(read_input(api, context, 0, call.query, q));
    RETURN_IF_FAILED(read_input(api, context, 1, call.key, k));
    RETURN_IF_FAILED(read_input(api, context, 2, call.value, v));
    if (q.size() != 3 || k.size() != 3 || v.size() != 3 || q[0] != k[0] || q[0] != v[0] ||
        k[1] != v[1] || q[2] != k[2] || q[2] % heads != 0 || v[2] % heads != 0 || k[1] < 1 ||
        q[2] < 1 || v[2] < 1)
      return invalid(api, name, "expected query BxSxE, key BxLxE, value BxLxF with L, E, F > 0 and "
                                "E and F multiples of num_heads = " + std::to_string(heads) +
                                    "; got " + text(q) + ", " + text(k) + ", " + text(v));
    RETURN_IF_FAILED(make_output(api, context, {q[0], q[1], v[2]}, call.output));
    const int64_t width = q[2] / heads;
    const float root = 1.0f / std::sqrt(static_cast<float>(width));
    call.batch = q[0];
    call.heads = heads;
    call.sizes = {q[1], k[1], width, v[2] / heads, scale > 0.0f ? scale : root};
    return nullptr;
  }
};

struct Attention : AttentionKernel {
  static constexpr const char* kName = "Attention";
  static constexpr size_t kInputs = 3;
  using AttentionKernel::AttentionKernel;

  Status* create(const ort::KernelInfo* info) { return configure(kName, info); }

  Status* compute(ort::KernelContext* context) const {
    AttentionCall call{};
    RETURN_IF_FAILED(prepare(kName, context, call));
    Session session{api, context};
    const bool done = attend_exact(call, run, &session);
    if (session.failure != nullptr) return session.failure;
    return done ? nullptr : no_memory(api, kName);
  }
};

Status* arena(const ort::Api& api, std::shared_ptr<ort::MemoryInfo>& memory) {
  ort::MemoryInfo* made = nullptr;
  RETURN_IF_FAILED(api.cpu_memory(ort::kArena, ort::kDefaultMemory, &made));
  memory.reset(made, [api](ort::MemoryInfo* held) { api.release(held); });
  return nullptr;
}

// Memory of ONNX Runtime's arena, aligned to 64 bytes, for one call.
class Scratch {
 public:
  explicit Scratch(const ort::Api& api) : api_(api), allocator_(api) {}
  Status* take(const ort::KernelContext* context, const ort::MemoryInfo* memory, size_t bytes) {
    RETURN_IF_FAILED(api_.allocator(context, memory, allocator_.place()));
    RETURN_IF_FAILED(api_.allocate(allocator_.get(), bytes + 64, &held_));
    size_t space = bytes + 64;
    place_ = held_;
    if (held_ != nullptr) std::align(64, bytes, place_, space);
    return nullptr;
  }
  void* place() const { return place_; }
  Status* give_back() { return api_.free(allocator_.get(), held_); }

 private:
  const ort::Api& api_;
  Held<ort::Allocator> allocator_;
  void *held_ = nullptr, *place_ = nullptr;
};

struct QuantizedAttention : AttentionKernel {
  static constexpr const char* kName = "QuantizedAttention";
  static constexpr size_t kInputs = 3;
  std::shared_ptr<ort::MemoryInfo> memory;
  using AttentionKernel::AttentionKernel;

  Status* create(const ort::KernelInfo* info) {
    RETURN_IF_FAILED(configure(kName, info));
    RETURN_IF_FAILED(arena(api, memory));
    return nullptr;
  }

  Status* compute(ort::KernelContext* context) const {
    AttentionCall call{};
    RETURN_IF_FAILED(prepare(kName, context, call));
    if (call.sizes.width > 65536)
      return invalid(api, kName, "a head wider than 65536: sums would not fit into 32 bits");
    if (call.batch == 0 || call.sizes.queries == 0) return nullptr;
    Scratch scratch(api);
    RETURN_IF_FAILED(scratch.take(context, memory.get(), scratch_bytes(call)));
    if (scratch.place() == nullptr) return no_memory(api, kName);
    Session session{api, context};
    const bool done = attend_quantized(call, scratch.place(), run, &session);
    RETURN_IF_FAILED(scratch.give_back());
    if (session.failure != nullptr) return session.failure;
    return done ? nullptr : no_memory(api, kName);
  }
};

struct Linear {
  static constexpr const char* kName = "Linear";
  static constexpr size_t kInputs = 3;
  ort::Api api;
  int64_t columns = 0, activation = 0;

  explicit Linear(const ort::Api& made) : api(made) {}

  Status* create(const ort::KernelInfo* info) {
    RETURN_IF_FAILED(api.attribute(info, "columns", &columns));
    if (columns < 1) return invalid(api, kName, "columns must be at least 1");
    RETURN_IF_FAILED(api.attribute(info, "activation", &activation));
    if (activation < 0 || activation > 2)
      return invalid(api, kName, "activation must be 0 (none), 1 (gelu) or 2 (relu)");
    return nullptr;
  }

  Status* compute(ort::KernelContext* context) const {
    LinearCall call{};
    Shape x, w, b;
    RETURN_IF_FAILED(read_input(api, context, 0, call.input, x));
    RETURN_IF_FAILED(read_input(api, context, 1, call.weights, w));
    RETURN_IF_FAILED(read_input(api, context, 2, call.bias, b));
    const Shape bias = {rounded_up(columns, kStripe) / kStripe, kStripe};
    if (x.empty() || b != bias || w != Shape{bias[0], x.back(), kStripe})
      return invalid(api, kName, "expected input ...xW, weights " + std::to_string(bias[0]) +
                                     "xWx16 and bias " + text(bias) + " for " +
                                     std::to_string(columns) + " columns; got " + text(x) + ", " +
                                     text(w) + ", " + text(b));
    call.width = x.back();
    call.rows = 1;
    for (size_t i = 0; i + 1 < x.size(); ++i) call.rows *= x[i];
    call.columns = columns;
    call.activation = static_cast<Activation>(activation);
    x.back() = columns;
    RETURN_IF_FAILED(make_output(api, context, x, call.output));
    Session session{api, context};
    apply_linear(call, run, &session);
    return session.failure;
  }
};

struct Refine {
  static constexpr const char* kName = "Refine";
  static constexpr size_t kInputs = 10;
  ort::Api api;
  std::shared_ptr<ort::MemoryInfo> memory;

  explicit Refine(const ort::Api& made) : api(made) {}

  Status* create(const ort::KernelInfo*) { return arena(api, memory); }

  Status* compute(ort::KernelContext* context) const {
    HeadCall call{};
    Shape image, logits, beside, mix, w[3], b[3];
    RETURN_IF_FAILED(read_input(api, context, 0, call.image, image));
    RETURN_IF_FAILED(read_input(api, context, 1, call.logits, logits));
    RETURN_IF_FAILED(read_input(api, context, 2, call.beside, beside));
    for (size_t i = 0; i < 3; ++i) {
      RETURN_IF_FAILED(read_input(api, context, 3 + 2 * i, call.weights[i], w[i]));
      RETURN_IF_FAILED(read_input(api, context, 4 + 2 * i, call.biases[i], b[i]));
    }
    RETURN_IF_FAILED(read_input(api, context, 9, call.mix, mix));
    if (image.size() != 4 || logits.size() != 4 || beside.size() != 4 || b[0].size() != 1 ||
        b[1].size() != 1)
      return misfit(image, logits, beside, w, b, mix);
    call.height = image[2];
    call.width = image[3];
    call.structures = logits[1];
    call.around = beside[1];
    call.units1 = b[0][0];
    call.units2 = b[1][0];
    const int64_t n = call.structures, y = call.height, x = call.width;
    if (image != Shape{1, 3, y, x} || logits != Shape{1, n, y, x} ||
        beside != Shape{1, call.around, y, x} || y < 1 || x < 1 || n < 1 || call.units1 < 1 ||
        call.units2 < 1 || w[0] != Shape{call.units1, call.features(), 1, 1} ||
        w[1] != Shape{call.units2, call.units1, 1, 1} || w[2] != Shape{n, call.units2, 1, 1} ||
        b[2] != Shape{n} || mix != Shape{1, n, 1, 1})
      return misfit(image, logits, beside, w, b, mix);
    RETURN_IF_FAILED(make_output(api, context, logits, call.output));
    Scratch scratch(api);
    const auto bytes = static_cast<size_t>(head_floats(call)) * sizeof(float);
    RETURN_IF_FAILED(scratch.take(context, memory.get(), bytes));
    if (scratch.place() == nullptr) return no_memory(api, kName);
    Session session{api, context};
    refine_head(call, static_cast<float*>(scratch.place()), run, &session);
    RETURN_IF_FAILED(scratch.give_back());
    return session.failure;
  }

 private:
  Status* misfit(const Shape& image, const Shape& logits, const Shape& beside, const Shape (&w)[3],
                 const Shape (&b)[3], const Shape& mix) const {
    std::string got = text(image) + ", " + text(logits) + ", " + text(beside);
    for (size_t i = 0; i < 3; ++i) got += ", " + text(w[i]) + ", " + text(b[i]);
    return invalid(api, kName, "expected image 1x3xHxW, logits 1xnxHxW, planes 1xmxHxW, weights "
                               "UxFx1x1, VxUx1x1 and nxVx1x1 for F = 27 + n + m, each with its "
                               "biases, and mix 1xnx1x1; got " + got + ", " + text(mix));
  }
};

struct HalfLinear {
  static constexpr const char* kName = "HalfLinear";
  static constexpr size_t kInputs = 3;
  ort::Api api;
  int64_t activation = 0;
  std::shared_ptr<HalfProducts> products = std::make_shared<HalfProducts>();

  explicit HalfLinear(const ort::Api& made) : api(made) {}

  Status* create(const ort::KernelInfo* info) {
    RETURN_IF_FAILED(api.attribute(info, "activation", &activation));
    if (activation < 0 || activation > 2)
      return invalid(api, kName, "activation must be 0 (none), 1 (gelu) or 2 (relu)");
    return failed(products->open());
  }

  Status* compute(ort::KernelContext* context) const {
    HalfCall call{};
    Shape x, w, b;
    RETURN_IF_FAILED(read_input(api, context, 0, call.input, x));
    RETURN_IF_FAILED(read_input(api, context, 1, call.weights, w));
    RETURN_IF_FAILED(read_input(api, context, 2, call.bias, b));
    if (x.empty() || w.size() != 2 || w[0] != x.back() || b != Shape{w[1]} || w[0] < 1 || w[1] < 1)
      return invalid(api, kName, "expected input ...xW, weights WxN and bias N, W and N at least 1; "
                                 "got " + text(x) + ", " + text(w) + ", " + text(b));
    call.width = w[0];
    call.columns = w[1];
    call.rows = 1;
    for (size_t i = 0; i + 1 < x.size(); ++i) call.rows *= x[i];
    call.activation = static_cast<Activation>(activation);
    x.back() = call.columns;
    RETURN_IF_FAILED(make_output(api, context, x, call.output));
    if (call.rows == 0) return nullptr;
    void* stream = nullptr;
    RETURN_IF_FAILED(api.stream(context, &stream));
    return failed(products->enqueue(call, stream));
  }

 private:
  Status* failed(const std::string& why) const {
    return why.empty() ? nullptr : api.create_status(ort::kFailed, (kName + (": " + why)).c_str());
  }
};

// No exception may pass into ONNX Runtime.
template <class Function>
Status* guarded(const ort::Api& api, const char* name, const Function& function) {
  try {
    return function();
  } catch (...) {
    return no_memory(api, name);
  }
}

constexpr int kRequired = 0;
constexpr const char* kCpu = "CPUExecutionProvider";
// Of HalfLinear; tests, which stand in for cuBLASLt on the CPU, ask for kCpu.
const char* half_provider = "CUDAExecutionProvider";

template <class Kernel>
constexpr bool kOnGpu = std::is_same_v<Kernel, HalfLinear>;

// `Kernel` has a name, is made from the interface, and has `create` and `compute`.
template <class Kernel>
ort::Operator describe() {
  ort::Operator op{};
  op.version = ort::kVersion;
  op.name = [](const ort::Operator*) { return Kernel::kName; };
  op.provider = [](const ort::Operator*) { return kOnGpu<Kernel> ? half_provider : kCpu; };
  op.input_type = [](const ort::Operator*, size_t) {
    return kOnGpu<Kernel> ? ort::kHalf : ort::kFloat;
  };
  op.inputs = [](const ort::Operator*) { return Kernel::kInputs; };
  op.output_type = [](const ort::Operator*, size_t) {
    return kOnGpu<Kernel> ? ort::kHalf : ort::kFloat;
  };
  op.outputs = [](const ort::Operator*) { return size_t{1}; };
  op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.input_kind = [](const ort::Operator*, size_t) { return kRequired; };
  op.output_kind = [](const ort::Operator*, size_t) { return kRequired; };
  op.input_memory = [](const ort::Operator*, size_t) { return ort::kDefaultMemory; };
  op.variadic_inputs = [](const ort::Operator*) { return 1; };
  op.variadic_inputs_alike = [](const ort::Operator*) { return 1; };
  op.variadic_outputs = [](const ort::Operator*) { return 1; };
  op.variadic_outputs_alike = [](const ort::Operator*) { return 1; };
  op.create = [](const ort::Operator*, const void* table, const ort::KernelInfo* info,
                 void** made) {
    const ort::Api api(table);
    return guarded(api, Kernel::kName, [&]() -> Status* {
      auto kernel = std::make_unique<Kernel>(api);
      RETURN_IF_FAILED(kernel->create(info));
      *made = kernel.release();
      return nullptr;
    });
  };
  op.compute = [](void* made, ort::KernelContext* context) {
    const auto& kernel = *static_cast<const Kernel*>(made);
    return guarded(kernel.api, Kernel::kName, [&] { return kernel.compute(context); });
  };
  op.first_version = [](const ort::Operator*) { return 1; };
  op.last_version = [](const ort::Operator*) { return std::numeric_limits<int>::max(); };
  return op;
}

// One for the life of the process: every session that was told of it may still use it.
struct Registered {
  ort::Operator all[5] = {describe<Attention>(), describe<QuantizedAttention>(),
                          describe<Linear>(), describe<Refine>(), describe<HalfLinear>()};
  ort::Domain* domain = nullptr;
  Status* failure;

  explicit Registered(const ort::Api& api) : failure(api.create_domain("recallseg", &domain)) {
    for (const ort::Operator& op : all)
      if (failure == nullptr) failure = api.add_operator(domain, &op);
  }
};

}  // namespace
}  // namespace operators

#define EXPORTED extern "C" __attribute__((visibility("default")))

// Called by ONNX Runtime when a session is told of this library.
EXPORTED ort::Status* RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base) {
  const void* table = base->table(ort::kVersion);
  if (table == nullptr) {
    const ort::Api oldest(base->table(1));
    return oldest.create_status(ort::kFailed,
                                "recallseg's operators need ONNX Runtime 1.17 or later");
  }
  const ort::Api api(table);
  static const operators::Registered registered(api);
  if (registered.failure != nullptr)
    return api.create_status(ort::kFailed, "recallseg's operators could not be registered");
  return api.add_domain(options, registered.domain);
}

// The chosen level of vector units, for reports.
EXPORTED const char* recallseg_operators_level() { return operators::level().name; }

// For tests: HalfLinear on the CPU provider, by what a file has in the place of cuBLASLt; before the
// first session is told of this library.
EXPORTED void recallseg_operators_stand_in(const char* cublaslt) {
  operators::half_provider = operators::kCpu;
  operators::use_cublaslt(cublaslt);
}

// For tests: how many levels run here, and the choice of one, best first.
EXPORTED int recallseg_operators_levels() { return operators::levels().count; }
EXPORTED void recallseg_operators_choose(int index) {
  operators::choose(operators::levels().first[index]);
}
