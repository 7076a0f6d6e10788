// Steps that read voxels elsewhere in the view: each writes another copy of it. grid (tiles, slots) but for mark_windows.
#pragma once

#include "../permutation.h"
#include "voxelwise.cuh"

namespace voxtrast {

__global__ void __launch_bounds__(kViewThreads) lower_resolution(const uint8_t* block, Offset jobs) {
  const LowResolutionJob& job = table<LowResolutionJob>(block, jobs)[blockIdx.y];
  const Quad quad = quad_of(job);
  if (quad.count == 0) return;
  float values[kQuad] = {};
#pragma unroll
  for (int k = 0; k < kQuad; ++k) {
    if (k >= quad.count) break;
    const CoarseCell d = table<CoarseCell>(block, job.cells[0])[quad.d[k]];
    const CoarseCell h = table<CoarseCell>(block, job.cells[1])[quad.h[k]];
    const CoarseCell w = table<CoarseCell>(block, job.cells[2])[quad.w[k]];
    const auto along_width = [&](int32_t plane, int32_t row) {
      const float* from = job.from + flat_index(job.size, plane, row, 0);
      return between(from[w.low], from[w.high], w.fraction);
    };
    values[k] = (1 - d.fraction) * (1 - h.fraction) * along_width(d.low, h.low) +
                (1 - d.fraction) * h.fraction * along_width(d.low, h.high) +
                d.fraction * (1 - h.fraction) * along_width(d.high, h.low) +
                d.fraction * h.fraction * along_width(d.high, h.high);
  }
  store_quad(job.to, quad, values);
}

__global__ void __launch_bounds__(kViewThreads) clear_windows(const uint8_t* block, Offset jobs) {
  const BoxesJob& job = table<BoxesJob>(block, jobs)[blockIdx.y];
  const Quad quad = quad_of(job);
  const float nothing[kQuad] = {};  // the bits of the whole number 0
  if (quad.count > 0) store_quad(job.to, quad, nothing);
}

// grid (windows, slots): the last window over a voxel has the greatest number, whoever writes first.
__global__ void __launch_bounds__(kViewThreads) mark_windows(const uint8_t* block, Offset jobs) {
  const BoxesJob& job = table<BoxesJob>(block, jobs)[blockIdx.y];
  if (blockIdx.x >= uint32_t(job.box_count)) return;
  const int32_t* box = table<int32_t>(block, job.boxes) + 6 * blockIdx.x;
  const uint32_t voxels = uint32_t(box[3]) * uint32_t(box[4]) * uint32_t(box[5]);
  for (uint32_t n = threadIdx.x; n < voxels; n += kViewThreads) {
    const uint32_t row = n / uint32_t(box[5]), plane = row / uint32_t(box[4]);
    const int32_t w = int32_t(n - row * uint32_t(box[5])), h = int32_t(row - plane * uint32_t(box[4]));
    const int32_t place = flat_index(job.size, box[0] + int32_t(plane), box[1] + h, box[2] + w);
    atomicMax(reinterpret_cast<uint32_t*>(job.to) + place, blockIdx.x + 1);
  }
}

__global__ void __launch_bounds__(kViewThreads) shuffle_pixels(const uint8_t* block, Offset jobs) {
  const BoxesJob& job = table<BoxesJob>(block, jobs)[blockIdx.y];
  const Quad quad = quad_of(job);
  if (quad.count == 0) return;
  float windows[kQuad], values[kQuad];
  load_quad(job.to, quad, windows);
  load_quad(job.from, quad, values);
#pragma unroll
  for (int k = 0; k < kQuad; ++k) {
    const uint32_t number = uint32_t(__float_as_int(windows[k]));
    if (k >= quad.count || number == 0) continue;
    const int32_t* box = table<int32_t>(block, job.boxes) + 6 * (number - 1);
    const uint32_t height = uint32_t(box[4]), width = uint32_t(box[5]), size = uint32_t(box[3]) * height * width;
    const Random4 key = philox(job.seed, number - 1, job.stream, job.slot, job.step);
    const uint32_t index = (uint32_t(quad.d[k] - box[0]) * height + uint32_t(quad.h[k] - box[1])) * width +
                           uint32_t(quad.w[k] - box[2]);
    const uint32_t source = permuted(index, size, half_bits(size), key.word), row = source / width;
    values[k] = job.from[flat_index(job.size, box[0] + int32_t(row / height), box[1] + int32_t(row % height),
                                    box[2] + int32_t(source - row * width))];
  }
  store_quad(job.to, quad, values);
}

// Each voxel asks where it came from, from the last pair back to the first.
__global__ void __launch_bounds__(kViewThreads) swap_patches(const uint8_t* block, Offset jobs) {
  const BoxesJob& job = table<BoxesJob>(block, jobs)[blockIdx.y];
  Quad quad = quad_of(job);
  if (quad.count == 0) return;
  for (int32_t pair = job.box_count / 2 - 1; pair >= 0; --pair) {
    const int32_t* first = table<int32_t>(block, job.boxes) + 12 * pair;
    const int32_t* second = first + 6;
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      // What the second box gets is written last.
      const bool in_second = in_box(second, quad.d[k], quad.h[k], quad.w[k]);
      if (!in_second && !in_box(first, quad.d[k], quad.h[k], quad.w[k])) continue;
      const int32_t* to = in_second ? second : first;
      const int32_t* from = in_second ? first : second;
      quad.d[k] += from[0] - to[0];
      quad.h[k] += from[1] - to[1];
      quad.w[k] += from[2] - to[2];
    }
  }
  float values[kQuad] = {};
#pragma unroll
  for (int k = 0; k < kQuad; ++k)
    if (k < quad.count) values[k] = job.from[flat_index(job.size, quad.d[k], quad.h[k], quad.w[k])];
  store_quad(job.to, quad, values);
}

}  // namespace voxtrast
