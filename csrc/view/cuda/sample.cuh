// A view read from its region: affine, deformation, field and mask, and the first of its steps, in one pass.
//
// Coordinates begin in double at each thread's first voxel and are split into a whole number and a rest below 1; float32
// counts from there, as on the CPU.
#pragma once

#include <cuda_fp16.h>

#include "../elastic.h"
#include "../view.h"
#include "voxelwise.cuh"

namespace voxtrast {

struct RegionPlace {
  int32_t whole[3];   // the voxel below
  float fraction[3];  // from it to the next
};

__device__ inline double along_row(const double* affine, int axis, int32_t d, int32_t h, int32_t w) {
  return affine[4 * axis] * d + affine[4 * axis + 1] * h + affine[4 * axis + 2] * w + affine[4 * axis + 3];
}

__device__ inline float voxel_of(const float* voxels, int32_t place) { return __ldg(voxels + place); }
__device__ inline float voxel_of(const __half* voxels, int32_t place) { return __half2float(__ldg(voxels + place)); }

// The spline's control points of the rows of a tile, summed over D and H: (rows, 3, points[2]). All threads take part.
__device__ inline void collapse_control_points(const SampleJob& job, const uint8_t* block, uint32_t first_row,
                                               uint32_t rows, float* to) {
  const float* control = table<float>(block, job.shift);
  const SplineCell* depth = table<SplineCell>(block, job.cells[0]);
  const SplineCell* height = table<SplineCell>(block, job.cells[1]);
  const uint32_t length = uint32_t(job.points[2]), vectors = 3 * length;
  for (uint32_t n = threadIdx.x; n < rows * vectors; n += kViewThreads) {
    const uint32_t row = first_row + n / vectors, rest = n % vectors, component = rest / length;
    const SplineCell& d = depth[row / uint32_t(job.pass.size[1])];
    const SplineCell& h = height[row % uint32_t(job.pass.size[1])];
    float sum = 0.0f;
    for (int i = 0; i < 4; ++i) {
      const float* from = control + ((component * job.points[0] + d.first + i) * job.points[1] + h.first) * length +
                          rest - component * length;
      float plane = 0.0f;
#pragma unroll
      for (int j = 0; j < 4; ++j) plane += h.weight[j] * from[j * length];
      sum += d.weight[i] * plane;
    }
    to[n] = sum;
  }
}

__device__ inline void shift_of(const SampleJob& job, const uint8_t* block, const float* rows, const Quad& quad, int k,
                                float (&shift)[3]) {
  shift[0] = shift[1] = shift[2] = 0.0f;
  if (job.points[0] == 0) return;
  const uint32_t first_row = blockIdx.x * uint32_t(kTile) / uint32_t(job.pass.size[2]);
  const uint32_t row = uint32_t(quad.d[k] * job.pass.size[1] + quad.h[k]) - first_row;
  const SplineCell& cell = table<SplineCell>(block, job.cells[2])[quad.w[k]];
  const float* control = rows + row * 3 * uint32_t(job.points[2]) + cell.first;
#pragma unroll
  for (int component = 0; component < 3; ++component)
#pragma unroll
    for (int m = 0; m < 4; ++m) shift[component] += cell.weight[m] * control[component * job.points[2] + m];
}

template <typename T>
__device__ inline float nearest(const SampleJob& job, const RegionPlace& at) {
  bool inside = true;
#pragma unroll
  for (int axis = 0; axis < 3; ++axis) inside = inside && uint32_t(at.whole[axis]) < uint32_t(job.region_size[axis]);
  if (!inside) return job.background;
  return voxel_of(static_cast<const T*>(job.region), flat_index(job.region_size, at.whole[0], at.whole[1], at.whole[2]));
}

template <typename T>
__device__ inline float interpolate(const SampleJob& job, const RegionPlace& at) {
  bool reached = true;
#pragma unroll
  for (int axis = 0; axis < 3; ++axis)
    reached = reached && at.whole[axis] >= -1 && at.whole[axis] < job.region_size[axis];
  if (!reached) return job.background;
  bool inside[3][2];
#pragma unroll
  for (int axis = 0; axis < 3; ++axis) {
    inside[axis][0] = at.whole[axis] >= 0;
    inside[axis][1] = at.whole[axis] + 1 < job.region_size[axis];
  }
  // May lie outside where only other corners are read.
  const int32_t first = flat_index(job.region_size, at.whole[0], at.whole[1], at.whole[2]);
  const int32_t row = job.region_size[2], plane = row * job.region_size[1];
  const auto voxel = [&](int d, int h, int w) {
    if (!(inside[0][d] && inside[1][h] && inside[2][w])) return job.background;
    return voxel_of(static_cast<const T*>(job.region), first + d * plane + h * row + w);
  };
  float column[2];
#pragma unroll
  for (int w = 0; w < 2; ++w)
    column[w] = between(between(voxel(0, 0, w), voxel(0, 1, w), at.fraction[1]),
                        between(voxel(1, 0, w), voxel(1, 1, w), at.fraction[1]), at.fraction[0]);
  return between(column[0], column[1], at.fraction[2]);
}

// Where a thread's voxels are read, from the voxel `origin` of a row on.
struct Coordinates {
  int32_t whole[3], origin;
  float rest[3];
  bool straight;

  __device__ void begin(const SampleJob& job, const Quad& quad, int k) {
    origin = quad.w[k];
    straight = job.straight != 0;
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
      const double start = along_row(job.to_volume, axis, quad.d[k], quad.h[k], origin) - job.lower[axis] +
                           (job.nearest ? 0.5 : 0.0);
      const double below = floor(start);
      whole[axis] = static_cast<int32_t>(below);
      rest[axis] = static_cast<float>(start - below);
      straight = straight && below == start;
    }
  }

  __device__ RegionPlace at(const SampleJob& job, int32_t w, const float (&shift)[3]) const {
    RegionPlace place;
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
      const float moved = rest[axis] + static_cast<float>(w - origin) * job.step[axis] + shift[axis];
      const float below = floorf(moved);
      place.whole[axis] = whole[axis] + static_cast<int32_t>(below);
      place.fraction[axis] = moved - below;
    }
    return place;
  }
};

template <typename T>
__device__ inline void sample_quad(const SampleJob& job, const uint8_t* block, const float* control, const Quad& quad,
                                   float (&values)[kQuad]) {
  Coordinates coordinates;
#pragma unroll
  for (int k = 0; k < kQuad; ++k) {
    if (k >= quad.count) break;
    if (k == 0 || quad.w[k] == 0) coordinates.begin(job, quad, k);
    float shift[3];
    shift_of(job, block, control, quad, k, shift);
    const RegionPlace place = coordinates.at(job, quad.w[k], shift);
    // A voxel that is one of the region's is copied: no neighbour has a say, nor what is not a number there.
    values[k] = job.nearest || coordinates.straight ? nearest<T>(job, place) : interpolate<T>(job, place);
  }
  if (job.clean != nullptr) store_quad(job.clean, quad, values);
}

constexpr float kBorder32 = static_cast<float>(kBorder);

// psi from the voxel `origin` of a row on, and how far the deformation may go there without leaving the volume.
struct FieldStart {
  int32_t origin;
  float psi[3], volume_low[3], volume_high[3];

  __device__ void begin(const SampleJob& job, const Quad& quad, int k) {
    origin = quad.w[k];
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
      const double place = along_row(job.to_volume, axis, quad.d[k], quad.h[k], origin);
      psi[axis] = static_cast<float>(along_row(job.psi, axis, quad.d[k], quad.h[k], origin));
      volume_low[axis] = static_cast<float>(job.volume_low[axis] - place);
      volume_high[axis] = static_cast<float>(job.volume_high[axis] - place);
    }
  }
};

__device__ inline void make_field(const SampleJob& job, const uint8_t* block, const float* control, const Quad& quad) {
  FieldStart start;
  float psi[3][kQuad], mask[kQuad];
#pragma unroll
  for (int k = 0; k < kQuad; ++k) {
    if (k >= quad.count) break;
    if (k == 0 || quad.w[k] == 0) start.begin(job, quad, k);
    float shift[3];
    shift_of(job, block, control, quad, k, shift);
    const float along = static_cast<float>(quad.w[k] - start.origin);
    const int32_t index[3] = {quad.d[k], quad.h[k], quad.w[k]};
    bool valid = true;
#pragma unroll
    for (int axis = 0; axis < 3; ++axis) {
      float here = along * job.psi_step[axis];
#pragma unroll
      for (int other = 0; other < 3; ++other) here += job.linear[3 * axis + other] * shift[other];
      here += start.psi[axis];
      psi[axis][k] = here;
      // Limits move along instead of the point, as whole numbers up to the border.
      const float position = along * job.step[axis] + shift[axis], at = static_cast<float>(index[axis]);
      valid = valid && here >= (job.partner_low[axis] - at) - kBorder32 &&
              here <= (job.partner_high[axis] - at) + kBorder32 &&
              position >= start.volume_low[axis] && position <= start.volume_high[axis];
    }
    mask[k] = valid ? 1.0f : 0.0f;
  }
#pragma unroll
  for (int axis = 0; axis < 3; ++axis)
    if (job.displacement[axis] != nullptr) store_quad(job.displacement[axis], quad, psi[axis]);
  if (job.mask != nullptr) store_quad(job.mask, quad, mask);
}

// grid (tiles, slots). Shared memory: facts of the steps; control points of the rows of a tile.
template <typename T>
__global__ void __launch_bounds__(kViewThreads) sample_views(const uint8_t* block, Offset jobs) {
  const SampleJob& job = table<SampleJob>(block, jobs)[blockIdx.y];
  const uint32_t first = blockIdx.x * uint32_t(kTile);
  if (first >= job.pass.voxels) return;
  StepFacts* const facts = shared_memory<StepFacts>();
  float* const control = shared_memory<float>() + (job.pass.run.step_count * 3 + 3) / 4 * 4;
  follow_statistics(job.pass.run, block, job.pass.voxels, facts);
  if (job.points[0] > 0) {
    const uint32_t width = uint32_t(job.pass.size[2]), first_row = first / width;
    const uint32_t last = (job.pass.voxels - first < kTile ? job.pass.voxels : first + kTile) - 1;
    collapse_control_points(job, block, first_row, last / width - first_row + 1, control);
  }
  __syncthreads();
  const Quad quad = quad_of(job.pass);
  float values[kQuad] = {};
  if (quad.count > 0 && job.with_field) make_field(job, block, control, quad);
  if (quad.count > 0) sample_quad<T>(job, block, control, quad, values);
  finish_pass(job.pass, block, facts, quad, values);
}

}  // namespace voxtrast
