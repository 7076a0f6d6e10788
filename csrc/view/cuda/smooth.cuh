// A Gaussian along one axis, in place: a block reads whole lines to shared memory and writes them back smoothed.
#pragma once

#include <cuda_fp16.h>

#include "quad.cuh"

namespace voxtrast {

// grid (parts of groups, slots). Shared memory: `together` lines.
__global__ void __launch_bounds__(kViewThreads) smooth_lines(const uint8_t* block, Offset jobs) {
  const SmoothJob& job = table<SmoothJob>(block, jobs)[blockIdx.y];
  const int32_t together = job.together, parts = (job.lines + together - 1) / together;
  const int32_t group = int32_t(blockIdx.x) / parts, first = (int32_t(blockIdx.x) - group * parts) * together;
  if (group >= job.groups) return;
  const int64_t begin = group * job.group_stride + int64_t(first) * job.across;
  const int32_t lines = job.lines - first < together ? job.lines - first : together;
  float* const all = shared_memory<float>();
  // Threads side by side touch voxels side by side: along a line, or from one line to the next.
  const bool by_line = job.along == 1;
  const int32_t to_next = by_line ? 1 : together, to_line = by_line ? job.length : 1;
  const auto for_each = [&](const auto& work) {
    for (int32_t n = int32_t(threadIdx.x); n < job.length * together; n += kViewThreads) {
      const int32_t quotient = n / (by_line ? job.length : together);
      const int32_t rest = n - quotient * (by_line ? job.length : together);
      const int32_t line = by_line ? quotient : rest, index = by_line ? rest : quotient;
      if (line < lines) work(n, line, index, begin + int64_t(line) * job.across + int64_t(index) * job.along);
    }
  };
  for_each([&](int32_t n, int32_t, int32_t, int64_t voxel) {
    all[n] = job.half ? __half2float(static_cast<const __half*>(job.from)[voxel])
                      : static_cast<const float*>(job.from)[voxel];
  });
  __syncthreads();
  const float* weights = table<float>(block, job.weights);
  for_each([&](int32_t, int32_t line, int32_t index, int64_t voxel) {
    float sum = 0.0f;
    for (int32_t t = 0; t <= 2 * job.radius; ++t) {
      int32_t from = index + t - job.radius;  // the last voxel is repeated beyond the end
      from = from < 0 ? 0 : from < job.length ? from : job.length - 1;
      sum += weights[t] * all[line * to_line + from * to_next];
    }
    job.to[voxel] = sum;
  });
}

}  // namespace voxtrast
