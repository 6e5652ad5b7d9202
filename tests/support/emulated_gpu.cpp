// The CUDA kernels, run on the CPU one thread after the other. They have no barriers.
#include <cstdint>
#include <cstring>
#include <utility>

#define __global__
struct Index {
  uint32_t x, y, z;
};
static Index blockIdx, blockDim, threadIdx;

static uint32_t atomicAdd(uint32_t* counter, uint32_t more) {
  const uint32_t before = *counter;
  *counter += more;
  return before;
}

static void __threadfence() {}

#include "kernels.cu"

template <class... Arguments, size_t... I>
void call(void (*kernel)(Arguments...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<Arguments*>(arguments[I])...);
}

template <class... Arguments>
bool run(void (*kernel)(Arguments...), int count, void** arguments) {
  if (count != sizeof...(Arguments)) return false;
  call(kernel, arguments, std::index_sequence_for<Arguments...>{});
  return true;
}

// As cuLaunchKernel has them; false for an unknown name or another number of arguments.
extern "C" bool emulate(const char* name, const uint32_t* grid, const uint32_t* block, int count,
                        void** arguments) {
  blockDim = {block[0], block[1], block[2]};
  for (blockIdx.y = 0; blockIdx.y < grid[1]; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < grid[0]; ++blockIdx.x)
      for (threadIdx.y = 0; threadIdx.y < block[1]; ++threadIdx.y)
        for (threadIdx.x = 0; threadIdx.x < block[0]; ++threadIdx.x) {
#define KERNEL(known) \
  if (!std::strcmp(name, #known)) { \
    if (!run(known, count, arguments)) return false; \
    continue; \
  }
          KERNEL(recallseg_spans)
          KERNEL(recallseg_clear)
          KERNEL(recallseg_histogram)
          KERNEL(recallseg_refine)
          KERNEL(recallseg_coarse)
          KERNEL(recallseg_rank)
          KERNEL(recallseg_rank_low)
          KERNEL(recallseg_prepare)
          KERNEL(recallseg_finish)
          KERNEL(recallseg_gather_half)
          KERNEL(recallseg_gather_int8)
          KERNEL(recallseg_gather_float)
          return false;
        }
  return true;
}
