// Four voxels that follow one another in C order: what one thread works on.
#pragma once

#include "../../cuda/shared_memory.cuh"
#include "jobs.h"

namespace voxtrast {

struct Quad {
  uint32_t first;
  int32_t count;  // below 4 at the end of the view, 0 behind it
  int32_t d[kQuad], h[kQuad], w[kQuad];
};

template <typename Job>
__device__ inline Quad quad_of(const Job& job) {
  Quad quad;
  quad.first = blockIdx.x * uint32_t(kTile) + threadIdx.x * uint32_t(kQuad);
  const uint32_t left = quad.first < job.voxels ? job.voxels - quad.first : 0;
  quad.count = left < kQuad ? int32_t(left) : kQuad;
  const uint32_t width = uint32_t(job.size[2]), height = uint32_t(job.size[1]);
  const uint32_t row = quad.first / width, plane = row / height;
  int32_t w = int32_t(quad.first - row * width), h = int32_t(row - plane * height), d = int32_t(plane);
#pragma unroll
  for (int k = 0; k < kQuad; ++k) {
    quad.d[k] = d;
    quad.h[k] = h;
    quad.w[k] = w;
    if (++w < job.size[2]) continue;
    w = 0;
    if (++h < job.size[1]) continue;
    h = 0;
    ++d;
  }
  return quad;
}

template <typename T>
__device__ inline const T* table(const uint8_t* block, Offset at) {
  return reinterpret_cast<const T*>(block + at);
}

__device__ inline bool is_whole_vector(const float* address, const Quad& quad) {
  return quad.count == kQuad && (reinterpret_cast<uintptr_t>(address) & 15) == 0;
}

__device__ inline void load_quad(const float* from, const Quad& quad, float (&values)[kQuad]) {
  if (is_whole_vector(from, quad)) {
    const float4 all = *reinterpret_cast<const float4*>(from + quad.first);
    values[0] = all.x;
    values[1] = all.y;
    values[2] = all.z;
    values[3] = all.w;
    return;
  }
#pragma unroll
  for (int k = 0; k < kQuad; ++k) values[k] = k < quad.count ? from[quad.first + k] : 0.0f;
}

__device__ inline void store_quad(float* to, const Quad& quad, const float (&values)[kQuad]) {
  if (is_whole_vector(to, quad)) {
    *reinterpret_cast<float4*>(to + quad.first) = make_float4(values[0], values[1], values[2], values[3]);
    return;
  }
#pragma unroll
  for (int k = 0; k < kQuad; ++k)
    if (k < quad.count) to[quad.first + k] = values[k];
}

__device__ inline int32_t flat_index(const int32_t (&size)[3], int32_t d, int32_t h, int32_t w) {
  return (d * size[1] + h) * size[2] + w;
}

__device__ inline bool in_box(const int32_t* box, int32_t d, int32_t h, int32_t w) {
  // An index below the box becomes a large one.
  return uint32_t(d - box[0]) < uint32_t(box[3]) && uint32_t(h - box[1]) < uint32_t(box[4]) &&
         uint32_t(w - box[2]) < uint32_t(box[5]);
}

}  // namespace voxtrast
