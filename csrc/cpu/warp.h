// The two loops of the warp family: reading an image at displaced points, and the transpose of that.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <vector>

#include "interpolation.h"

namespace voxtrast {

// output(b, c, p) = W(image, displacement)(p), plus displacement(b, c, p) where AddDisplacement (c is then an axis).
template <typename T, int D, bool AddDisplacement>
void sample(const torch::stable::Tensor& image, const torch::stable::Tensor& displacement, T* output) {
  const Grid<D> grid(image.sizes());
  const int64_t batch = image.size(0), channels = image.size(1), blocks = grid.blocks();
  const float* shift = float_data(displacement, batch * D * grid.points, "displacement");
  const T* values = image.const_data_ptr<T>();
  torch::stable::parallel_for(0, batch * blocks, grain(kBlock * channels), [&](int64_t begin, int64_t end) {
    Block<D> block;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / blocks;
      block.take(grid, item % blocks * kBlock, nullptr);
      block.locate(grid, shift + b * D * grid.points);
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t plane = (b * channels + c) * grid.points;
        T* target = output + plane + block.position[0];
        for (int64_t n = 0; n < block.count; ++n) {
          float value = block.interpolate(values + plane, n);
          if constexpr (AddDisplacement) value += shift[plane + block.position[n]];
          target[n] = static_cast<T>(value);
        }
      }
    }
  });
}

// grad_image (B, C, *S), zero on entry, += transpose of the interpolation of gradients at the displaced points.
// fill(block, b, c, gradient) writes the gradients of one channel at the points of a block.
// Each plane is summed by one thread in the order of its points: the result does not depend on the number of threads.
template <typename T, int D, typename Fill>
void scatter(const Grid<D>& grid, int64_t batch, int64_t channels, const float* displacement, const float* mask,
             T* grad_image, const Fill& fill) {
  // Channels of a group share the neighbours; more of them would push each other's planes out of the cache.
  constexpr int64_t kGroup = 8;
  torch::stable::parallel_for(0, batch * channels, grain(grid.points), [&](int64_t begin, int64_t end) {
    Block<D> block;
    float gradient[kBlock];
    std::vector<float> sums;  // float32 sums of low-precision planes
    if constexpr (!std::is_same_v<T, float>) sums.resize(std::min(kGroup, end - begin) * grid.points);
    for (int64_t first = begin; first < end;) {
      const int64_t b = first / channels;
      const int64_t last = std::min({first + kGroup, end, (b + 1) * channels});
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (int64_t start = 0; start < grid.points; start += kBlock) {
        block.take(grid, start, mask == nullptr ? nullptr : mask + b * grid.points);
        block.locate(grid, displacement + b * D * grid.points);
        for (int64_t plane = first; plane < last; ++plane) {
          fill(block, b, plane - b * channels, gradient);
          float* target;
          if constexpr (std::is_same_v<T, float>) {
            target = grad_image + plane * grid.points;
          } else {
            target = sums.data() + (plane - first) * grid.points;
          }
          for (int64_t n = 0; n < block.count; ++n) block.spread(target, n, gradient[n]);
        }
      }
      if constexpr (!std::is_same_v<T, float>) {
        T* target = grad_image + first * grid.points;
        const int64_t count = (last - first) * grid.points;
        for (int64_t n = 0; n < count; ++n) target[n] = static_cast<T>(sums[n]);
      }
      first = last;
    }
  });
}

}  // namespace voxtrast
