// Memory is filled with zeros by a kernel of ours: the stream's, and the tests see it.
#pragma once

#include "warp.cuh"

namespace voxtrast {

static __global__ void __launch_bounds__(kThreads) write_zeros(uint32_t* words, int64_t count) {
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t n = int64_t(blockIdx.x) * kThreads + threadIdx.x; n < count; n += step) words[n] = 0;
}

template <typename Launch>
void run_write_zeros(uint32_t* words, int64_t count, const Launch& launch) {
  const int64_t blocks = std::min(divide_up(count, kThreads), 2 * kEnoughBlocks);
  launch(&write_zeros, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, words, count);
}

}  // namespace voxtrast
