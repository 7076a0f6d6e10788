// The masked mean of the L1 distance and its gradient. What is computed: kernels/vector_regression_loss.py.
#pragma once

#include "reduction.cuh"

namespace voxtrast {

struct Fields {
  int64_t batch, components, points;
  const float* prediction;  // (B, D, points)
  const float* target;      // (B, D, points)
  const float* mask;        // (B, points)
};

static __global__ void __launch_bounds__(kThreads) sum_distances(Fields in, Partial* partials) {
  reduce_points(in.batch, in.points, partials, [&](int64_t item, int64_t point, Partial& partial) {
    const float weight = in.mask[item * in.points + point];
    partial.weight += weight;
    // A voxel without weight is not looked at: it may hold a NaN.
    if (weight == 0.0f) return;
    const int64_t first = item * in.components * in.points + point;
    for (int64_t c = 0; c < in.components; ++c) {
      const int64_t n = first + c * in.points;
      partial.sum += weight * fabsf(in.prediction[n] - in.target[n]);
    }
  });
}

template <typename Launch>
void run_vector_regression_loss(const Fields& in, Partial* partials, float* loss, float* mask_sum,
                                const Launch& launch) {
  const int64_t count = partials_of(in.batch, in.points);
  launch(&sum_distances, dim3(static_cast<unsigned>(count)), dim3(kThreads), kThreads * sizeof(Partial), in, partials);
  run_finish_loss<false>(partials, count, loss, mask_sum, launch);
}

// gradient (B, D, points), of the prediction; that of the target is its negative
static __global__ void __launch_bounds__(kThreads)
    differentiate_distances(Fields in, Tiles tiles, const float* grad_loss, const float* mask_sum, float* gradient) {
  const auto place = tiles.place(blockIdx.x);
  const int64_t point = int64_t(place.tile) * kThreads + threadIdx.x;
  if (point >= in.points) return;
  const float total = *mask_sum;
  const float weight = in.mask[place.item * in.points + point];
  const float factor = total == 0.0f ? 0.0f : *grad_loss / total * weight;
  const int64_t first = place.item * in.components * in.points + point;
  for (int64_t c = 0; c < in.components; ++c) {
    const int64_t n = first + c * in.points;
    float slope = 0.0f;
    if (weight != 0.0f) {
      const float difference = in.prediction[n] - in.target[n];
      slope = factor * (difference > 0.0f ? 1.0f : difference < 0.0f ? -1.0f : difference);  // NaN stays NaN
    }
    gradient[n] = slope;
  }
}

template <typename Launch>
void run_vector_regression_loss_backward(const Fields& in, const float* grad_loss, const float* mask_sum,
                                         float* gradient, const Launch& launch) {
  const Tiles grid = tiles_of(in.points, 1);
  launch(&differentiate_distances, blocks_of(grid, in.batch), dim3(kThreads), 0, in, grid, grad_loss, mask_sum,
         gradient);
}

}  // namespace voxtrast
