// Sum, least and greatest value of a view in two stages and a fixed order: the same bits every time.
#pragma once

#include "quad.cuh"

namespace voxtrast {

__device__ inline ViewStatistics no_statistics() { return {0.0, __int_as_float(0x7f800000), __int_as_float(0xff800000)}; }

// NaN takes no part in the range, as on the CPU.
__device__ inline void join(ViewStatistics& mine, const ViewStatistics& other) {
  mine.sum += other.sum;
  if (other.low < mine.low) mine.low = other.low;
  if (other.high > mine.high) mine.high = other.high;
}

__device__ inline ViewStatistics over_warp(ViewStatistics mine) {
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    ViewStatistics other;
    other.sum = __shfl_down_sync(0xffffffffu, mine.sum, lanes);
    other.low = __shfl_down_sync(0xffffffffu, mine.low, lanes);
    other.high = __shfl_down_sync(0xffffffffu, mine.high, lanes);
    join(mine, other);
  }
  return mine;
}

// Of all threads of a block, for its first one. Takes a record a warp of shared memory, which nobody uses any more.
__device__ inline ViewStatistics over_block(ViewStatistics mine) {
  ViewStatistics* const warps = shared_memory<ViewStatistics>();
  mine = over_warp(mine);
  __syncthreads();
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int warp = 1; warp < kViewThreads / 32; ++warp) join(mine, warps[warp]);
  return mine;
}

__device__ inline void gather_statistics(const Run& run, const Quad& quad, const float (&values)[kQuad]) {
  ViewStatistics mine = no_statistics();
#pragma unroll
  for (int k = 0; k < kQuad; ++k)
    if (k < quad.count) join(mine, {static_cast<double>(values[k]), values[k], values[k]});
  const ViewStatistics all = over_block(mine);
  if (threadIdx.x == 0) run.gathered[blockIdx.x] = all;
}

// One block a slot.
__global__ void __launch_bounds__(kViewThreads) finish_statistics(const uint8_t* block, Offset jobs) {
  const FinishJob& job = table<FinishJob>(block, jobs)[blockIdx.y];
  ViewStatistics mine = no_statistics();
  for (int64_t tile = threadIdx.x; tile < job.count; tile += kViewThreads) join(mine, job.gathered[tile]);
  const ViewStatistics all = over_block(mine);
  if (threadIdx.x == 0) *job.known = all;
}

}  // namespace voxtrast
