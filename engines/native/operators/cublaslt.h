// Products of fp16 with bias and activation in one kernel, by NVIDIA's cuBLASLt.
#pragma once

#include <stdint.h>

#include <map>
#include <mutex>
#include <string>

#include "calls.h"

namespace operators {

// activation(input * weights + bias), row by row; all on the device, fp16, contiguous.
struct HalfCall {
  int64_t rows;
  int64_t width;
  int64_t columns;
  Activation activation;
  const uint16_t* input;    // [rows][width]
  const uint16_t* weights;  // [width][columns]
  const uint16_t* bias;     // [columns]
  uint16_t* output;         // [rows][columns]
};

// For tests: the file that stands in for cuBLASLt.
void use_cublaslt(const char* file);

// What one node of a graph asks for again and again. Errors are returned in words; none is empty.
class HalfProducts {
 public:
  HalfProducts() = default;
  HalfProducts(const HalfProducts&) = delete;
  HalfProducts& operator=(const HalfProducts&) = delete;
  ~HalfProducts();

  std::string open();
  // Chooses an algorithm for sizes that it meets for the first time; nothing on the device is
  // allocated or waited for, so that a stream may be recording.
  std::string enqueue(const HalfCall& call, void* stream);

 private:
  struct Plan {
    void *description = nullptr, *weights = nullptr, *input = nullptr, *output = nullptr;
    uint64_t algorithm[8] = {};
  };
  std::string plan_for(const HalfCall& call, Plan& plan) const;
  static void forget(const Plan& plan);

  void* handle_ = nullptr;  // of the device that was current in open()
  std::mutex mutex_;
  std::map<int64_t, Plan> plans_;  // by rows: a node's weights have one size
};

}  // namespace operators
