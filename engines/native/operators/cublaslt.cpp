#include "cublaslt.h"

#include <dlfcn.h>
#include <stddef.h>

#include <algorithm>
#include <iterator>

namespace operators {
namespace {

// The part of cuBLASLt that is needed, declared from its documentation: it is opened by name, so
// that one build serves CUDA 12 and 13 and needs neither.
using Handle = void*;
using Description = void*;
using Layout = void*;
using Preference = void*;

struct Choice {
  uint64_t algorithm[8];
  size_t workspace;
  int status;
  float waves;
  int reserved[4];
};

constexpr int kFp32 = 0, kFp16 = 2;  // cudaDataType
constexpr int kComputeFp32 = 68;     // cublasComputeType
constexpr int kEpilogue = 7, kBiasPointer = 8;
constexpr int kWorkspaceBytes = 1;
constexpr int kNotSupported = 15;
constexpr uint32_t kEpilogues[] = {4, 36, 6};  // bias; with GELU, with ReLU: as Activation counts

struct Library {
  int (*create)(Handle*) = nullptr;
  int (*destroy)(Handle) = nullptr;
  int (*describe)(Description*, int compute, int scale) = nullptr;
  int (*set)(Description, int attribute, const void* value, size_t bytes) = nullptr;
  int (*forget)(Description) = nullptr;
  int (*lay_out)(Layout*, int type, uint64_t rows, uint64_t columns, int64_t stride) = nullptr;
  int (*forget_layout)(Layout) = nullptr;
  int (*prefer)(Preference*) = nullptr;
  int (*set_preference)(Preference, int attribute, const void* value, size_t bytes) = nullptr;
  int (*forget_preference)(Preference) = nullptr;
  int (*choose)(Handle, Description, Layout a, Layout b, Layout c, Layout d, Preference, int wanted,
                Choice*, int* found) = nullptr;
  int (*multiply)(Handle, Description, const void* alpha, const void* a, Layout, const void* b,
                  Layout, const void* beta, const void* c, Layout, void* d, Layout,
                  const uint64_t* algorithm, void* workspace, size_t bytes, void* stream) = nullptr;
  std::string failure;
};

std::string& stand_in() {
  static std::string file;
  return file;
}

template <class Function>
bool find(void* opened, const char* name, Function*& function) {
  function = reinterpret_cast<Function*>(dlsym(opened, name));
  return function != nullptr;
}

Library open_library() {
  Library made;
  const char* names[] = {"libcublasLt.so.13", "libcublasLt.so.12"};
  void* opened = nullptr;
  if (!stand_in().empty()) {
    opened = dlopen(stand_in().c_str(), RTLD_NOW | RTLD_LOCAL);
  } else {
    // The one that ONNX Runtime has loaded, whatever else lies on the disk; else the newest.
    for (const char* name : names)
      if (opened == nullptr) opened = dlopen(name, RTLD_NOW | RTLD_LOCAL | RTLD_NOLOAD);
    for (const char* name : names)
      if (opened == nullptr) opened = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  }
  if (opened == nullptr) {
    made.failure = "neither libcublasLt.so.13 nor libcublasLt.so.12 can be opened";
    return made;
  }
  const bool whole =
      find(opened, "cublasLtCreate", made.create) &&
      find(opened, "cublasLtDestroy", made.destroy) &&
      find(opened, "cublasLtMatmulDescCreate", made.describe) &&
      find(opened, "cublasLtMatmulDescSetAttribute", made.set) &&
      find(opened, "cublasLtMatmulDescDestroy", made.forget) &&
      find(opened, "cublasLtMatrixLayoutCreate", made.lay_out) &&
      find(opened, "cublasLtMatrixLayoutDestroy", made.forget_layout) &&
      find(opened, "cublasLtMatmulPreferenceCreate", made.prefer) &&
      find(opened, "cublasLtMatmulPreferenceSetAttribute", made.set_preference) &&
      find(opened, "cublasLtMatmulPreferenceDestroy", made.forget_preference) &&
      find(opened, "cublasLtMatmulAlgoGetHeuristic", made.choose) &&
      find(opened, "cublasLtMatmul", made.multiply);
  if (!whole) made.failure = "cuBLASLt lacks a function that every version has";
  return made;
}

// One for the life of the process.
const Library& library() {
  static const Library opened = open_library();
  return opened;
}

}  // namespace

void use_cublaslt(const char* file) { stand_in() = file; }

HalfProducts::~HalfProducts() {
  for (const auto& [rows, plan] : plans_) forget(plan);
  if (handle_ != nullptr) library().destroy(handle_);
}

std::string HalfProducts::open() {
  if (!library().failure.empty()) return library().failure;
  const int status = library().create(&handle_);
  return status == 0 ? "" : "cuBLASLt cannot start: status " + std::to_string(status);
}

void HalfProducts::forget(const Plan& plan) {
  for (void* layout : {plan.output, plan.input, plan.weights})
    if (layout != nullptr) library().forget_layout(layout);
  if (plan.description != nullptr) library().forget(plan.description);
}

std::string HalfProducts::plan_for(const HalfCall& call, Plan& plan) const {
  const Library& lt = library();
  const auto rows = static_cast<uint64_t>(call.rows);
  const auto width = static_cast<uint64_t>(call.width);
  const auto columns = static_cast<uint64_t>(call.columns);
  const uint32_t epilogue = kEpilogues[static_cast<int64_t>(call.activation)];
  // Row by row here is column by column there: output' = weights' * input'.
  int status = lt.describe(&plan.description, kComputeFp32, kFp32);
  if (status == 0) status = lt.set(plan.description, kEpilogue, &epilogue, sizeof epilogue);
  if (status == 0) status = lt.set(plan.description, kBiasPointer, &call.bias, sizeof call.bias);
  if (status == 0) status = lt.lay_out(&plan.weights, kFp16, columns, width, call.columns);
  if (status == 0) status = lt.lay_out(&plan.input, kFp16, width, rows, call.width);
  if (status == 0) status = lt.lay_out(&plan.output, kFp16, columns, rows, call.columns);
  Preference preference = nullptr;
  if (status == 0) status = lt.prefer(&preference);
  const size_t none = 0;
  if (status == 0) status = lt.set_preference(preference, kWorkspaceBytes, &none, sizeof none);
  Choice best{};
  int count = 0;
  if (status == 0)
    status = lt.choose(handle_, plan.description, plan.weights, plan.input, plan.output,
                       plan.output, preference, 1, &best, &count);
  if (preference != nullptr) lt.forget_preference(preference);
  if (status == 0 && (count < 1 || best.status != 0)) status = kNotSupported;
  if (status == 0) {
    std::copy(std::begin(best.algorithm), std::end(best.algorithm), plan.algorithm);
    return {};
  }
  return "cuBLASLt has no product of " + std::to_string(rows) + "x" + std::to_string(width) +
         " and " + std::to_string(width) + "x" + std::to_string(columns) +
         " with a bias: status " + std::to_string(status);
}

std::string HalfProducts::enqueue(const HalfCall& call, void* stream) {
  const std::lock_guard<std::mutex> alone(mutex_);
  auto known = plans_.find(call.rows);
  if (known == plans_.end()) {
    Plan made;
    if (std::string why = plan_for(call, made); !why.empty()) {
      forget(made);
      return why;
    }
    known = plans_.emplace(call.rows, made).first;
  }
  const Plan& plan = known->second;
  const Library& lt = library();
  const float one = 1.0f, zero = 0.0f;
  int status = lt.set(plan.description, kBiasPointer, &call.bias, sizeof call.bias);
  if (status == 0)
    status = lt.multiply(handle_, plan.description, &one, call.weights, plan.weights, call.input,
                         plan.input, &zero, call.output, plan.output, call.output, plan.output,
                         plan.algorithm, nullptr, 0, stream);
  return status == 0 ? "" : "cuBLASLt failed with status " + std::to_string(status);
}

}  // namespace operators
