// local_correlation for any radius and any number of channels: a thread a voxel, all maps read through the caches.
#pragma once

#include "local_correlation_backward.cuh"
#include "local_correlation_forward.cuh"

namespace voxtrast::correlation {

constexpr int kStrip = 8;  // offsets along x whose dot products are computed together

struct Voxel {
  int64_t problem, at;
  int x, y, z;

  __device__ Voxel(const Problem& p, int64_t number) {
    problem = number / p.points;
    at = number % p.points;
    x = static_cast<int>(at % p.width);
    y = static_cast<int>(at / p.width % p.height);
    z = static_cast<int>(at / p.width / p.height);
  }
};

// The dot products of the vector at `own` of one map with the strip that begins at `other` of the other map. The query
// is scaled, so that backward repeats the logits of forward to the last bit.
template <bool kOfKey, class T>
__device__ inline void dot_strip(const Problem& p, const T* own, const T* other, int valid,
                                 float (&products)[kStrip]) {
#pragma unroll
  for (int n = 0; n < kStrip; ++n) products[n] = 0.0f;
  for (int c = 0; c < p.channels; ++c) {
    float value = static_cast<float>(own[c * p.points]);
    if (!kOfKey) value = times(value, p.scale_2, p.scale_2_low);
#pragma unroll
    for (int n = 0; n < kStrip; ++n) {
      if (n >= valid) continue;
      float neighbour = static_cast<float>(other[c * p.points + n]);
      if (kOfKey) neighbour = times(neighbour, p.scale_2, p.scale_2_low);
      products[n] = fmaf(value, neighbour, products[n]);
    }
  }
}

// Calls strip(dz, dy, dx, valid) for the parts of rows of the window that lie inside the volume.
template <class Strip>
__device__ inline void for_window(const Problem& p, const Voxel& voxel, Strip strip) {
  const int radius_y = p.components == 3 ? p.radius : 0;
  const int first_x = max(-p.radius, -voxel.x), last_x = min(p.radius, p.width - 1 - voxel.x);
  for (int dz = max(-p.radius, -voxel.z); dz <= min(p.radius, p.depth - 1 - voxel.z); ++dz)
    for (int dy = max(-radius_y, -voxel.y); dy <= min(radius_y, p.height - 1 - voxel.y); ++dy)
      for (int dx = first_x; dx <= last_x; dx += kStrip) strip(dz, dy, dx, min(kStrip, last_x - dx + 1));
}

__device__ inline int64_t offset_of(const Problem& p, int dz, int dy, int dx) {
  return (int64_t(dz) * p.height + dy) * p.width + dx;
}

__global__ void __launch_bounds__(kThreads, 2)
    correlate_general(Problem p, const void* __restrict__ query, const void* __restrict__ key, float* __restrict__ mean,
                      float* __restrict__ log_sum_exp) {
  const int64_t threads = int64_t(gridDim.x) * kThreads;
  for (int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x; item < p.count * p.points; item += threads) {
    const Voxel voxel(p, item);
    const int64_t first = voxel.problem * p.channels * p.points + voxel.at;
    float largest = -INFINITY, total = 0.0f, x = 0.0f, y = 0.0f, z = 0.0f;
    with_element(p.element, [&](auto type) {
      using T = decltype(type);
      const T* own = static_cast<const T*>(query) + first;
      const T* others = static_cast<const T*>(key) + first;
      for_window(p, voxel, [&](int dz, int dy, int dx, int valid) {
        float products[kStrip], strip_largest = largest;
        dot_strip<false>(p, own, others + offset_of(p, dz, dy, dx), valid, products);
#pragma unroll
        for (int n = 0; n < kStrip; ++n)
          if (n < valid) strip_largest = fmaxf(strip_largest, products[n]);
        const float factor = strip_largest > largest ? exp2_fast(largest - strip_largest) : 1.0f;
        largest = strip_largest;
        float strip_total = 0.0f, strip_x = 0.0f;
#pragma unroll
        for (int n = 0; n < kStrip; ++n) {
          const float weight = n < valid ? exp2_fast(products[n] - largest) : 0.0f;
          strip_total += weight;
          strip_x = fmaf(static_cast<float>(dx + n), weight, strip_x);
        }
        total = fmaf(total, factor, strip_total);
        x = fmaf(x, factor, strip_x);
        y = fmaf(y, factor, static_cast<float>(dy) * strip_total);
        z = fmaf(z, factor, static_cast<float>(dz) * strip_total);
      });
    });
    float* target = mean + voxel.problem * p.components * p.points + voxel.at;
    target[0] = z / total;
    if (p.components == 3) target[p.points] = y / total;
    target[(p.components - 1) * p.points] = x / total;
    log_sum_exp[item] = natural(largest, total);
  }
}

// The gradient of 8 channels of one voxel. kOfKey: the voxel is a key, and the window is that of the queries seeing it.
template <bool kOfKey, bool kVolume>
__global__ void __launch_bounds__(kThreads)
    differentiate_general(Problem p, Gradients given, const void* __restrict__ query, const void* __restrict__ key,
                          void* __restrict__ gradient) {
  const int64_t threads = int64_t(gridDim.x) * kThreads, groups = (p.channels + kChannels - 1) / kChannels;
  const int64_t items = groups * p.count * p.points;
  for (int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x; item < items; item += threads) {
    const Voxel voxel(p, item / p.points / groups * p.points + item % p.points);
    const int first_channel = static_cast<int>(item / p.points % groups) * kChannels;
    const int64_t first = voxel.problem * p.channels * p.points + voxel.at;
    float sum[kChannels] = {};
    with_element(p.element, [&](auto type) {
      using T = decltype(type);
      const T* own = static_cast<const T*>(kOfKey ? key : query) + first;
      const T* others = static_cast<const T*>(kOfKey ? query : key) + first;
      Pull pull{};
      if (!kOfKey) pull = load_pull<kVolume>(p, given, voxel.problem, voxel.at);
      for_window(p, voxel, [&](int dz, int dy, int dx, int valid) {
        const int64_t offset = offset_of(p, dz, dy, dx);
        float products[kStrip];
        dot_strip<kOfKey>(p, own, others + offset, valid, products);
        for (int n = 0; n < valid; ++n) {
          if (kOfKey) pull = load_pull<kVolume>(p, given, voxel.problem, voxel.at + offset + n);
          const float sign = kOfKey ? -1.0f : 1.0f;
          float along = fmaf(static_cast<float>(dz), pull.z, static_cast<float>(dx + n) * pull.x);
          along = fmaf(static_cast<float>(dy), pull.y, along);
          const float factor = exp2_fast(products[n] + pull.start) * fmaf(sign, along, -pull.centre);
#pragma unroll
          for (int c = 0; c < kChannels; ++c)
            if (first_channel + c < p.channels)
              sum[c] = fmaf(factor, static_cast<float>(others[(first_channel + c) * p.points + offset + n]), sum[c]);
        }
      });
      T* target = static_cast<T*>(gradient) + first;
#pragma unroll
      for (int c = 0; c < kChannels; ++c)
        if (first_channel + c < p.channels)
          target[(first_channel + c) * p.points] = static_cast<T>(p.scale * sum[c]);
    });
  }
}

}  // namespace voxtrast::correlation
