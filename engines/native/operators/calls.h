// What an operator is asked to do, and who does it.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace operators {

constexpr int kRows = 6;      // rows of a product in registers at a time
constexpr int kStripe = 16;   // columns of a weight matrix that lie together

constexpr int64_t rounded_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// One head of one batch; rows are `stride` floats apart.
struct Rows {
  const float* first;
  int64_t stride;
};

// Sizes of a head. `width` and `values` are channels of a key and of a value.
struct Sizes {
  int64_t queries;
  int64_t keys;
  int64_t width;
  int64_t values;
  float scale;
};

// BxSx(heads*width) queries, BxLx(heads*width) keys, BxLx(heads*values) values, all contiguous.
struct AttentionCall {
  int64_t batch;
  int64_t heads;
  Sizes sizes;  // of one head
  const float* query;
  const float* key;
  const float* value;
  float* output;  // BxSx(heads*values)
};

inline __attribute__((always_inline)) Rows rows_of(const float* tensor, const AttentionCall& call,
                                                   int64_t tokens, int64_t channels, int64_t head) {
  const int64_t stride = call.heads * channels;
  return {tensor + (head / call.heads) * tokens * stride + (head % call.heads) * channels, stride};
}

// What is applied to a sum; the numbers are those of the operator's attribute.
enum class Activation : int64_t { kNone, kGelu, kRelu };

// activation(input * weights + bias)
struct LinearCall {
  int64_t rows;
  int64_t width;
  int64_t columns;
  Activation activation;
  const float* input;    // [rows][width]
  const float* weights;  // [stripe][width][kStripe]; the last stripe is filled up with 0
  const float* bias;     // [stripe][kStripe]
  float* output;         // [rows][columns]
};

// Calls task(state, i) for each i below `count`, on whatever threads there are, and waits.
using Task = void (*)(void* state, size_t index);
using Pool = void (*)(void* pool, Task task, size_t count, void* state);

}  // namespace operators
