// The part of ONNX Runtime's C interface that an operator library needs, declared from its public
// documentation: its wheels come without headers. The interface only grows: a function keeps its
// place in the table for ever, so places are all that is written here.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace ort {

// From version 17 (ONNX Runtime 1.17) on an operator can use the session's own threads.
constexpr uint32_t kVersion = 17;

struct Status;
struct Value;
struct ShapeInfo;
struct KernelInfo;
struct KernelContext;
struct SessionOptions;
struct Domain;
struct Allocator;
struct MemoryInfo;

constexpr int kFloat = 1;           // element types
constexpr int kHalf = 10;
constexpr int kFailed = 1;          // error codes
constexpr int kInvalidArgument = 2;
constexpr int kArena = 1;           // kind of allocator
constexpr int kDefaultMemory = 0;   // kind of memory

using Parallel = void (*)(void* state, size_t index);

// The table of functions. Each is read from its place, in pointers from the beginning.
class Api {
 public:
  explicit Api(const void* table) : table_(static_cast<const void* const*>(table)) {}
  const void* table() const { return table_; }

  Status* create_status(int code, const char* message) const {
    return at<Status*(int, const char*)>(0)(code, message);
  }
  Status* create_domain(const char* name, Domain** made) const {
    return at<Status*(const char*, Domain**)>(26)(name, made);
  }
  Status* add_operator(Domain* domain, const void* op) const {
    return at<Status*(Domain*, const void*)>(27)(domain, op);
  }
  Status* add_domain(SessionOptions* options, Domain* domain) const {
    return at<Status*(SessionOptions*, Domain*)>(28)(options, domain);
  }
  Status* mutable_data(Value* value, void** data) const {
    return at<Status*(Value*, void**)>(51)(value, data);
  }
  Status* axes(const ShapeInfo* shape, size_t* count) const {
    return at<Status*(const ShapeInfo*, size_t*)>(61)(shape, count);
  }
  Status* dimensions(const ShapeInfo* shape, int64_t* values, size_t count) const {
    return at<Status*(const ShapeInfo*, int64_t*, size_t)>(62)(shape, values, count);
  }
  Status* shape(const Value* value, ShapeInfo** made) const {
    return at<Status*(const Value*, ShapeInfo**)>(65)(value, made);
  }
  Status* cpu_memory(int allocator, int kind, MemoryInfo** made) const {
    return at<Status*(int, int, MemoryInfo**)>(69)(allocator, kind, made);
  }
  Status* allocate(Allocator* allocator, size_t bytes, void** place) const {
    return at<Status*(Allocator*, size_t, void**)>(75)(allocator, bytes, place);
  }
  Status* free(Allocator* allocator, void* place) const {
    return at<Status*(Allocator*, void*)>(76)(allocator, place);
  }
  Status* attribute(const KernelInfo* info, const char* name, float* value) const {
    return at<Status*(const KernelInfo*, const char*, float*)>(85)(info, name, value);
  }
  Status* attribute(const KernelInfo* info, const char* name, int64_t* value) const {
    return at<Status*(const KernelInfo*, const char*, int64_t*)>(86)(info, name, value);
  }
  Status* input(const KernelContext* context, size_t index, const Value** value) const {
    return at<Status*(const KernelContext*, size_t, const Value**)>(90)(context, index, value);
  }
  Status* output(KernelContext* context, size_t index, const int64_t* dimensions, size_t axes,
                 Value** value) const {
    return at<Status*(KernelContext*, size_t, const int64_t*, size_t, Value**)>(91)(
        context, index, dimensions, axes, value);
  }
  void release(Status* status) const { at<void(Status*)>(93)(status); }
  void release(MemoryInfo* memory) const { at<void(MemoryInfo*)>(94)(memory); }
  void release(ShapeInfo* shape) const { at<void(ShapeInfo*)>(99)(shape); }
  void release(Allocator* allocator) const { at<void(Allocator*)>(132)(allocator); }
  // The stream of CUDA's provider; null on the CPU.
  Status* stream(const KernelContext* context, void** found) const {
    return at<Status*(const KernelContext*, void**)>(193)(context, found);
  }
  Status* allocator(const KernelContext* context, const MemoryInfo* memory,
                    Allocator** found) const {
    return at<Status*(const KernelContext*, const MemoryInfo*, Allocator**)>(253)(context, memory,
                                                                                  found);
  }
  Status* parallel(const KernelContext* context, Parallel task, size_t count, size_t batches,
                   void* state) const {
    return at<Status*(const KernelContext*, Parallel, size_t, size_t, void*)>(274)(
        context, task, count, batches, state);
  }

 private:
  template <class Function>
  Function* at(int place) const {
    return reinterpret_cast<Function*>(const_cast<void*>(table_[place]));
  }

  const void* const* table_;
};

// What a library is given: the table for a version, or null if this ONNX Runtime is older than that.
struct ApiBase {
  const void* (*table)(uint32_t version);
  const char* (*version)();
};

// An operator as ONNX Runtime wants to be told of it. Version 17 reads all of this and no more.
struct Operator {
  uint32_t version;
  void* (*create_old)(const Operator*, const void* api, const KernelInfo*);
  const char* (*name)(const Operator*);
  const char* (*provider)(const Operator*);
  int (*input_type)(const Operator*, size_t);
  size_t (*inputs)(const Operator*);
  int (*output_type)(const Operator*, size_t);
  size_t (*outputs)(const Operator*);
  void (*compute_old)(void* kernel, KernelContext*);
  void (*destroy)(void* kernel);
  int (*input_kind)(const Operator*, size_t);
  int (*output_kind)(const Operator*, size_t);
  int (*input_memory)(const Operator*, size_t);
  int (*variadic_inputs)(const Operator*);
  int (*variadic_inputs_alike)(const Operator*);
  int (*variadic_outputs)(const Operator*);
  int (*variadic_outputs_alike)(const Operator*);
  Status* (*create)(const Operator*, const void* api, const KernelInfo*, void** kernel);
  Status* (*compute)(void* kernel, KernelContext*);
  Status* (*infer_shapes)(const Operator*, void* context);
  int (*first_version)(const Operator*);
  int (*last_version)(const Operator*);
};

}  // namespace ort
