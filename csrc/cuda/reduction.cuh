// Weighted sums over the voxels of a batch in a fixed order: blocks of a fixed number of threads sum in float64, and
// one last block adds what they found. The number of blocks depends on the sizes alone.
#pragma once

#include "warp.cuh"

namespace voxtrast {

constexpr int64_t kMostPartials = 1024;

// Sum and sum of weights.
struct Partial {
  double sum, weight;
};

inline int64_t partials_of(int64_t batch, int64_t points) {
  return std::min(batch * divide_up(points, kThreads), kMostPartials);
}

// The sums of all threads of a block, for its first thread.
__device__ inline Partial sum_of_block(Partial mine) {
  Partial* all = shared_memory<Partial>();
  all[threadIdx.x] = mine;
  __syncthreads();
  for (unsigned half = kThreads / 2; half > 0; half /= 2) {
    if (threadIdx.x < half) {
      all[threadIdx.x].sum += all[threadIdx.x + half].sum;
      all[threadIdx.x].weight += all[threadIdx.x + half].weight;
    }
    __syncthreads();
  }
  return all[0];
}

// partials (one a block): work(item, point, partial) adds one point.
template <typename Work>
__device__ void reduce_points(int64_t batch, int64_t points, Partial* partials, const Work& work) {
  const uint32_t tiles = static_cast<uint32_t>((points + kThreads - 1) / kThreads);
  const uint32_t all = static_cast<uint32_t>(batch) * tiles;  // 2^32 of them would take terabytes
  Partial mine = {0.0, 0.0};
  for (uint32_t tile = blockIdx.x; tile < all; tile += gridDim.x) {
    const uint32_t item = tile / tiles;
    const int64_t point = int64_t(tile - item * tiles) * kThreads + threadIdx.x;
    if (point < points) work(int64_t(item), point, mine);
  }
  const Partial sum = sum_of_block(mine);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// loss: sum / weight, or 1 minus that where Complement; 0 where there is no weight. One block.
template <bool Complement>
__global__ void __launch_bounds__(kThreads)
    finish_loss(const Partial* partials, int32_t count, float* loss, float* mask_sum) {
  Partial mine = {0.0, 0.0};
  for (int32_t n = threadIdx.x; n < count; n += kThreads) {
    mine.sum += partials[n].sum;
    mine.weight += partials[n].weight;
  }
  const auto [sum, weight] = sum_of_block(mine);
  if (threadIdx.x != 0) return;
  const double mean = weight == 0.0 ? 0.0 : sum / weight;
  *loss = static_cast<float>(Complement && weight != 0.0 ? 1.0 - mean : mean);
  *mask_sum = static_cast<float>(weight);
}

template <bool Complement, typename Launch>
void run_finish_loss(const Partial* partials, int64_t count, float* loss, float* mask_sum, const Launch& launch) {
  launch(&finish_loss<Complement>, dim3(1), dim3(kThreads), kThreads * sizeof(Partial), partials, int32_t(count), loss,
         mask_sum);
}

}  // namespace voxtrast
