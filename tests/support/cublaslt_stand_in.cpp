// The part of cuBLASLt that HalfLinear asks for, on the CPU: column by column, sums in fp32.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <map>

namespace {

struct Description {
  uint32_t epilogue = 1;
  const _Float16* bias = nullptr;
};
struct Layout {
  uint64_t rows, columns;
  int64_t stride;
};
int handles = 0;

}  // namespace

extern "C" {

int cublasLtCreate(void** handle) {
  ++handles;
  *handle = new int(0);
  return 0;
}
int cublasLtDestroy(void* handle) {
  --handles;
  delete static_cast<int*>(handle);
  return 0;
}
int stand_in_handles() { return handles; }

int cublasLtMatmulDescCreate(void** made, int compute, int scale) {
  if (compute != 68 || scale != 0) return 7;
  *made = new Description;
  return 0;
}
int cublasLtMatmulDescDestroy(void* held) {
  delete static_cast<Description*>(held);
  return 0;
}
int cublasLtMatmulDescSetAttribute(void* held, int attribute, const void* value, size_t bytes) {
  auto& description = *static_cast<Description*>(held);
  if (attribute == 7 && bytes == 4) {
    description.epilogue = *static_cast<const uint32_t*>(value);
    return 0;
  }
  if (attribute == 8 && bytes == sizeof(void*)) {
    description.bias = *static_cast<const _Float16* const*>(value);
    return 0;
  }
  return 7;
}

int cublasLtMatrixLayoutCreate(void** made, int type, uint64_t rows, uint64_t columns,
                               int64_t stride) {
  if (type != 2 || stride < static_cast<int64_t>(rows)) return 7;
  *made = new Layout{rows, columns, stride};
  return 0;
}
int cublasLtMatrixLayoutDestroy(void* held) {
  delete static_cast<Layout*>(held);
  return 0;
}

int cublasLtMatmulPreferenceCreate(void** made) {
  *made = new int(0);
  return 0;
}
int cublasLtMatmulPreferenceDestroy(void* held) {
  delete static_cast<int*>(held);
  return 0;
}
int cublasLtMatmulPreferenceSetAttribute(void*, int attribute, const void* value, size_t bytes) {
  return attribute == 1 && bytes == sizeof(size_t) && *static_cast<const size_t*>(value) == 0 ? 0 : 7;
}

// Refuses 13 columns, so that a refusal can be seen.
int cublasLtMatmulAlgoGetHeuristic(void*, void*, void* a, void*, void*, void*, void*, int, void*,
                                   int* found) {
  *found = static_cast<Layout*>(a)->rows == 13 ? 0 : 1;
  return 0;
}

int cublasLtMatmul(void*, void* description, const void* alpha, const void* a, void* a_layout,
                   const void* b, void* b_layout, const void* beta, const void*, void*, void* d,
                   void* d_layout, const void*, void* workspace, size_t bytes, void*) {
  const auto& what = *static_cast<Description*>(description);
  const auto &left = *static_cast<Layout*>(a_layout), &right = *static_cast<Layout*>(b_layout),
             &out = *static_cast<Layout*>(d_layout);
  if (*static_cast<const float*>(alpha) != 1.0f || *static_cast<const float*>(beta) != 0.0f ||
      workspace != nullptr || bytes != 0 || left.columns != right.rows || left.rows != out.rows ||
      right.columns != out.columns || what.bias == nullptr)
    return 7;
  for (uint64_t j = 0; j < out.columns; ++j)
    for (uint64_t i = 0; i < out.rows; ++i) {
      float sum = 0.0f;
      for (uint64_t k = 0; k < left.columns; ++k)
        sum += static_cast<float>(static_cast<const _Float16*>(a)[k * left.stride + i]) *
               static_cast<float>(static_cast<const _Float16*>(b)[j * right.stride + k]);
      sum += static_cast<float>(what.bias[i]);
      if (what.epilogue == 6) sum = sum > 0 ? sum : 0;
      if (what.epilogue == 36)
        sum = 0.5f * sum * (1 + std::tanh(0.7978845608f * (sum + 0.044715f * sum * sum * sum)));
      static_cast<_Float16*>(d)[j * out.stride + i] = static_cast<_Float16>(sum);
    }
  return 0;
}
}
