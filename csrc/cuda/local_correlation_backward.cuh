// The backward kernels of local_correlation for units of at most 8 channels: one gathers the gradient of the query, the
// other that of the key, and each computes the softmax again.
//
//     a(p, delta) = softmax(p, delta) <g(p), delta - mean(p)>                         g = grad_displacement / units
//     grad_query(p) = scale sum_delta a(p, delta) key(p + delta)
//     grad_key(p) = scale sum_delta a(p - delta, delta) query(p - delta)
#pragma once

#include "local_correlation_tile.cuh"
#include "shared_memory.cuh"

namespace voxtrast::correlation {

struct Gradients {
  const float* displacement;  // (batch, components, points)
  const float* log_sum_exp;   // (count, points)
  const float* mean;          // (count, components, points)
};

// g, its product with the mean, and the start of a sum that becomes the exponent of a softmax
struct Pull {
  float start, x, y, z, centre;
};

template <bool kVolume>
__device__ inline Pull load_pull(const Problem& p, const Gradients& given, int64_t problem, int64_t at) {
  const float log_sum_exp = given.log_sum_exp[problem * p.points + at];
  const float* gradient = given.displacement + problem / p.units * p.components * p.points + at;
  const float* mean = given.mean + problem * p.components * p.points + at;
  const int64_t last = (kVolume ? 2 : 1) * p.points;
  Pull pull;
  pull.start = -kLog2E * log_sum_exp;
  // What the start is too large by makes the gradient smaller.
  const float residue = fmaf(-kLog2E, log_sum_exp, -pull.start) - kLog2ELow * log_sum_exp;
  const float share = fmaf(kLn2, residue, 1.0f) / static_cast<float>(p.units);
  pull.z = share * gradient[0];
  pull.y = kVolume ? share * gradient[p.points] : 0.0f;
  pull.x = share * gradient[last];
  pull.centre = fmaf(pull.x, mean[last], pull.z * mean[0]);
  if (kVolume) pull.centre = fmaf(pull.y, mean[p.points], pull.centre);
  return pull;
}

// query, key, grad_query (count, channels, points)
template <int R, bool kVolume>
__global__ void __launch_bounds__(kFewThreads, backward_blocks(R))
    differentiate_query(Problem p, Gradients given, const void* __restrict__ query, const void* __restrict__ key,
                        void* __restrict__ grad_query) {
  constexpr int kHaloY = kVolume ? R : 0, kSlots = 2 * R + 1, kLast = 2 * R;
  float4* planes[2] = {shared_memory<float4>(), shared_memory<float4>() + 2 * p.plane_points};
  // What each thread alone needs of its slots once a row, (x, y, z, -centre): a ring, written twice so that the slots lie
  // at constant distances behind the newest.
  float4* const pulls = shared_memory<float4>() + 4 * p.plane_points + threadIdx.x;
  for (int64_t number = blockIdx.x; number < p.blocks; number += gridDim.x) {
    const Tile tile(p, number);
    const Column column(p, tile, kHaloY);
    const int64_t stride = int64_t(p.height) * p.width, first = tile.problem * p.channels * p.points;
    float vector[kSlots][kChannels] = {}, sum[kSlots][kChannels] = {};
    float start[kSlots] = {};
    int head = 0;
#pragma unroll 1
    for (int i = 0; i < 2 * kSlots; ++i) pulls[i * blockDim.x] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    load_plane<kHaloY>(p, tile, key, tile.begin - R, planes[0]);
    __syncthreads();
#pragma unroll 1
    for (int plane = tile.begin - R; plane < tile.end + R; ++plane) {
#pragma unroll
      for (int i = kSlots - 1; i > 0; --i) {
#pragma unroll
        for (int c = 0; c < kChannels; ++c) vector[i][c] = vector[i - 1][c], sum[i][c] = sum[i - 1][c];
        start[i] = start[i - 1];
      }
      const bool met = column.inside && plane + R < tile.end;
      const int64_t newest = (plane + R) * stride + column.offset;
      load_vector<true>(p, query, first + newest, met, vector[0]);
      const Pull pull = met ? load_pull<kVolume>(p, given, tile.problem, newest) : Pull{};
      start[0] = pull.start;
      head = head + 1 < kSlots ? head + 1 : 0;
      const float4* const newest_pull = pulls + (head + kSlots) * blockDim.x;
      pulls[head * blockDim.x] = pulls[(head + kSlots) * blockDim.x] =
          make_float4(pull.x, pull.y, pull.z, -pull.centre);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) sum[0][c] = 0.0f;
      if (plane + 1 < tile.end + R) load_plane<kHaloY>(p, tile, key, plane + 1, planes[1]);
      if (plane >= 0 && plane < p.depth) {
#pragma unroll 1
        for (int dy = -kHaloY; dy <= kHaloY; ++dy) {
          if (column.y + dy < 0 || column.y + dy >= p.height) continue;
          float x[kSlots], level[kSlots];  // level: <g, (z, y, 0) - mean>
#pragma unroll
          for (int i = 0; i < kSlots; ++i) {
            const float4 own = newest_pull[-i * static_cast<int>(blockDim.x)];
            x[i] = own.x;
            level[i] = fmaf(static_cast<float>(i - R), own.z, own.w);
            if (kVolume) level[i] = fmaf(static_cast<float>(dy), own.y, level[i]);
          }
#pragma unroll(R <= 2 ? kSlots : 1)
          for (int dx = -R; dx <= R; ++dx) {
            float other[kChannels];
            read_vector(p, planes[0], column.centre + dy * p.pitch + dx, other);
            const bool inside = column.x + dx >= 0 && column.x + dx < p.width;
#pragma unroll
            for (int i = 0; i < kSlots; ++i) {
              const float share = exp2_fast(dot(vector[i], other) + start[i]);
              const float factor = inside ? share * fmaf(static_cast<float>(dx), x[i], level[i]) : 0.0f;
#pragma unroll
              for (int c = 0; c < kChannels; ++c) sum[i][c] = fmaf(factor, other[c], sum[i][c]);
            }
          }
        }
      }
      if (column.inside && plane - R >= tile.begin)
        store_vector(p, grad_query, first + (plane - R) * stride + column.offset, p.scale, sum[kLast]);
      __syncthreads();
      float4* const read = planes[0];
      planes[0] = planes[1];
      planes[1] = read;
    }
  }
}

// A plane of queries, scaled: their vectors, then (start, -centre, -x, -y), then z. Those outside have no share.
template <int kHaloY, bool kVolume>
__device__ inline void load_queries(const Problem& p, const Gradients& given, const Tile& tile, const void* query, int z,
                                    float4* plane) {
  if (z < 0 || z >= p.depth) return;
  const int64_t first = tile.problem * p.channels * p.points;
  for_plane<kHaloY>(p, tile, z, [&](int position, int64_t offset, bool inside) {
    float values[kChannels];
    load_vector<true>(p, query, first + offset, inside, values);
    Pull pull{-INFINITY, 0.0f, 0.0f, 0.0f, 0.0f};
    if (inside) pull = load_pull<kVolume>(p, given, tile.problem, offset);
    plane[position] = make_float4(values[0], values[1], values[2], values[3]);
    plane[p.plane_points + position] = make_float4(values[4], values[5], values[6], values[7]);
    plane[2 * p.plane_points + position] = make_float4(pull.start, -pull.centre, -pull.x, -pull.y);
    reinterpret_cast<float*>(plane + 3 * p.plane_points)[position] = pull.z;
  });
}

constexpr int kQueryFloats = 13;  // of a voxel in such a plane

// The same with the roles exchanged: the slots hold keys, and queries pass by.
template <int R, bool kVolume>
__global__ void __launch_bounds__(kFewThreads, backward_blocks(R))
    differentiate_key(Problem p, Gradients given, const void* __restrict__ query, const void* __restrict__ key,
                      void* __restrict__ grad_key) {
  constexpr int kHaloY = kVolume ? R : 0, kSlots = 2 * R + 1, kLast = 2 * R;
  // A multiple of 16 bytes
  const int plane_words = (p.plane_points * kQueryFloats + 3) / 4;
  float4* planes[2] = {shared_memory<float4>(), shared_memory<float4>() + plane_words};
  for (int64_t number = blockIdx.x; number < p.blocks; number += gridDim.x) {
    const Tile tile(p, number);
    const Column column(p, tile, kHaloY);
    const int64_t stride = int64_t(p.height) * p.width, first = tile.problem * p.channels * p.points;
    float vector[kSlots][kChannels] = {}, sum[kSlots][kChannels] = {};
    load_queries<kHaloY, kVolume>(p, given, tile, query, tile.begin - R, planes[0]);
    __syncthreads();
#pragma unroll 1
    for (int plane = tile.begin - R; plane < tile.end + R; ++plane) {
#pragma unroll
      for (int i = kSlots - 1; i > 0; --i)
#pragma unroll
        for (int c = 0; c < kChannels; ++c) vector[i][c] = vector[i - 1][c], sum[i][c] = sum[i - 1][c];
      const bool met = column.inside && plane + R < tile.end;
      load_vector<false>(p, key, first + (plane + R) * stride + column.offset, met, vector[0]);
#pragma unroll
      for (int c = 0; c < kChannels; ++c) sum[0][c] = 0.0f;
      if (plane + 1 < tile.end + R) load_queries<kHaloY, kVolume>(p, given, tile, query, plane + 1, planes[1]);
      if (plane >= 0 && plane < p.depth) {
#pragma unroll 1
        for (int dy = -kHaloY; dy <= kHaloY; ++dy) {
          if (column.y + dy < 0 || column.y + dy >= p.height) continue;
#pragma unroll(R <= 2 ? kSlots : 1)
          for (int dx = -R; dx <= R; ++dx) {
            const int position = column.centre + dy * p.pitch + dx;
            float other[kChannels];
            read_vector(p, planes[0], position, other);
            const float4 pull = planes[0][2 * p.plane_points + position];
            const float pull_z = reinterpret_cast<const float*>(planes[0] + 3 * p.plane_points)[position];
            float level = fmaf(static_cast<float>(dx), pull.z, pull.y);
            if (kVolume) level = fmaf(static_cast<float>(dy), pull.w, level);
#pragma unroll
            for (int i = 0; i < kSlots; ++i) {
              // The offset from the query to slot i is (R - i, -dy, -dx).
              const float share = exp2_fast(dot(vector[i], other) + pull.x);
              const float factor = share * fmaf(static_cast<float>(R - i), pull_z, level);
#pragma unroll
              for (int c = 0; c < kChannels; ++c) sum[i][c] = fmaf(factor, other[c], sum[i][c]);
            }
          }
        }
      }
      if (column.inside && plane - R >= tile.begin)
        store_vector(p, grad_key, first + (plane - R) * stride + column.offset, kLn2, sum[kLast]);
      __syncthreads();
      float4* const read = planes[0];
      planes[0] = planes[1];
      planes[1] = read;
    }
  }
}

}  // namespace voxtrast::correlation
