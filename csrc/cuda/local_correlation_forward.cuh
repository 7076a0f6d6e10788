// The forward kernel of local_correlation for units of at most 8 channels. What is computed: kernels/local_correlation.py.
#pragma once

#include "local_correlation_tile.cuh"
#include "shared_memory.cuh"

namespace voxtrast::correlation {

// The queries of a thread's column that see the plane at hand, and their sums over the window so far. Weights are
// 2^(logit - shift). Where the logit of offset 0 is small, the shift is 0; else it is that logit, as a whole number: the
// weights need no maximum, their sum is at least 2^-60, and the difference is exact for those that matter.
template <int R>
struct Queries {
  static constexpr int kSlots = 2 * R + 1;
  static constexpr float kUnshifted = 60.0f;
  static constexpr float kLimit = 7.9e28f;  // 2^96: sums beyond may overflow, and ask for another shift
  float vector[kSlots][kChannels] = {};
  float shift[kSlots] = {};
  float total[kSlots] = {}, x[kSlots] = {}, y[kSlots] = {}, z[kSlots] = {};

  __device__ void advance(const Problem& p, const void* query, const void* key, int64_t at, bool read) {
#pragma unroll
    for (int i = kSlots - 1; i > 0; --i) {
#pragma unroll
      for (int c = 0; c < kChannels; ++c) vector[i][c] = vector[i - 1][c];
      shift[i] = shift[i - 1], total[i] = total[i - 1], x[i] = x[i - 1], y[i] = y[i - 1], z[i] = z[i - 1];
    }
    float centre[kChannels];
    load_vector<true>(p, query, at, read, vector[0]);
    load_vector<false>(p, key, at, read, centre);
    const float logit = dot(vector[0], centre);
    shift[0] = fabsf(logit) <= kUnshifted ? 0.0f : rintf(logit);
    total[0] = x[0] = y[0] = z[0] = 0.0f;
  }

  // Calls row(dy, position) for the rows of the window that lie inside.
  template <int kHaloY, class Row>
  __device__ static void for_rows(const Problem& p, const Column& column, Row row) {
#pragma unroll 1
    for (int dy = -kHaloY; dy <= kHaloY; ++dy)
      if (column.y + dy >= 0 && column.y + dy < p.height) row(dy, column.centre + dy * p.pitch);
  }

  // The sums over one plane; false where they come close to overflow, or are not numbers. A warp without shifts saves
  // the subtraction.
  template <int kHaloY, bool kShifted>
  __device__ bool add(const Problem& p, const Column& column, const float4* plane, bool raised) {
    float plane_total[kSlots] = {}, plane_x[kSlots] = {}, plane_y[kSlots] = {};
    for_rows<kHaloY>(p, column, [&](int dy, int position) {
      float row_total[kSlots] = {};
#pragma unroll
      for (int dx = -R; dx <= R; ++dx) {
        float other[kChannels];
        read_vector(p, plane, position + dx, other);
        const bool inside = column.x + dx >= 0 && column.x + dx < p.width;
#pragma unroll
        for (int i = 0; i < kSlots; ++i) {
          const float logit = dot(vector[i], other);
          const float weight = exp2_fast(kShifted ? logit - shift[i] : logit);
          if (inside) row_total[i] += weight;
          if (inside && dx != 0) plane_x[i] = fmaf(static_cast<float>(dx), weight, plane_x[i]);
        }
      }
#pragma unroll
      for (int i = 0; i < kSlots; ++i) {
        plane_total[i] += row_total[i];
        if (kHaloY > 0) plane_y[i] = fmaf(static_cast<float>(dy), row_total[i], plane_y[i]);
      }
    });
    bool fits = true;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) fits = fits && plane_total[i] < kLimit;
    if (!fits && !raised) return false;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      total[i] += plane_total[i];
      x[i] += plane_x[i];
      if (kHaloY > 0) y[i] += plane_y[i];
      z[i] = fmaf(static_cast<float>(i - R), plane_total[i], z[i]);
    }
    return true;
  }

  // Raises the shifts to the largest logits of the plane, and what has been summed with them.
  template <int kHaloY>
  __device__ void raise(const Problem& p, const Column& column, const float4* plane) {
    float largest[kSlots];
#pragma unroll
    for (int i = 0; i < kSlots; ++i) largest[i] = shift[i];
    for_rows<kHaloY>(p, column, [&](int, int position) {
#pragma unroll 1
      for (int dx = -R; dx <= R; ++dx) {
        if (column.x + dx < 0 || column.x + dx >= p.width) continue;
        float other[kChannels];
        read_vector(p, plane, position + dx, other);
#pragma unroll
        for (int i = 0; i < kSlots; ++i) largest[i] = fmaxf(largest[i], dot(vector[i], other));
      }
    });
#pragma unroll
    for (int i = 0; i < kSlots; ++i) {
      const float factor = largest[i] > shift[i] ? exp2_fast(shift[i] - largest[i]) : 1.0f;
      total[i] *= factor, x[i] *= factor, y[i] *= factor, z[i] *= factor;
      shift[i] = largest[i];
    }
  }

  template <int kHaloY>
  __device__ void add_plane(const Problem& p, const Column& column, const float4* plane) {
    bool shifted = false;
#pragma unroll
    for (int i = 0; i < kSlots; ++i) shifted = shifted || shift[i] != 0.0f;
    shifted = __any_sync(0xffffffffu, shifted);
    bool raised = false;
    while (!(shifted ? add<kHaloY, true>(p, column, plane, raised) : add<kHaloY, false>(p, column, plane, false))) {
      raise<kHaloY>(p, column, plane);
      raised = shifted = true;
    }
  }
};

// log(2^shift total)
__device__ inline float natural(float shift, float total) {
  return fmaf(shift, kLn2, fmaf(shift, kLn2Low, logf(total)));
}

// query, key (count, channels, points); mean (count, components, points); log_sum_exp (count, points)
template <int R, bool kVolume>
__global__ void __launch_bounds__(forward_threads(R), kForwardBlocks)
    correlate(Problem p, const void* __restrict__ query, const void* __restrict__ key, float* __restrict__ mean,
              float* __restrict__ log_sum_exp) {
  constexpr int kHaloY = kVolume ? R : 0, kLast = 2 * R;
  float4* planes[2] = {shared_memory<float4>(), shared_memory<float4>() + 2 * p.plane_points};
  for (int64_t number = blockIdx.x; number < p.blocks; number += gridDim.x) {
    const Tile tile(p, number);
    const Column column(p, tile, kHaloY);
    const int64_t stride = int64_t(p.height) * p.width, first = tile.problem * p.channels * p.points + column.offset;
    Queries<R> queries;
    load_plane<kHaloY>(p, tile, key, tile.begin - R, planes[0]);
    __syncthreads();
#pragma unroll 1
    for (int z = tile.begin - R; z < tile.end + R; ++z) {
      queries.advance(p, query, key, first + (z + R) * stride, column.inside && z + R < tile.end);
      if (z + 1 < tile.end + R) load_plane<kHaloY>(p, tile, key, z + 1, planes[1]);
      if (z >= 0 && z < p.depth) queries.template add_plane<kHaloY>(p, column, planes[0]);
      if (column.inside && z - R >= tile.begin) {
        const int64_t at = (z - R) * stride + column.offset;
        const float total = queries.total[kLast];
        float* target = mean + tile.problem * p.components * p.points + at;
        target[0] = queries.z[kLast] / total;
        if (kVolume) target[p.points] = queries.y[kLast] / total;
        target[(kVolume ? 2 : 1) * p.points] = queries.x[kLast] / total;
        log_sum_exp[tile.problem * p.points + at] = natural(queries.shift[kLast], total);
      }
      __syncthreads();
      float4* const read = planes[0];
      planes[0] = planes[1];
      planes[1] = read;
    }
  }
}

// mean (batch, units, components * points) -> displacement (batch, components * points)
__global__ void __launch_bounds__(kThreads)
    average_units(const float* __restrict__ mean, float* __restrict__ displacement, int64_t batch, int units,
                  int64_t values) {
  const int64_t threads = int64_t(gridDim.x) * kThreads;
  for (int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x; item < batch * values; item += threads) {
    const float* source = mean + item / values * units * values + item % values;
    float sum = 0.0f;
    for (int unit = 0; unit < units; ++unit) sum += source[unit * values];
    displacement[item] = sum / static_cast<float>(units);
  }
}

}  // namespace voxtrast::correlation
