#include "smoothing.h"

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

namespace voxtrast {
namespace {

struct Taps {
  int64_t radius;
  std::vector<float> weights;
  std::vector<const float*> rows;

  int64_t count() const { return 2 * radius + 1; }
};

Taps gaussian(float sigma) {
  Taps taps{0, gaussian_weights(sigma), {}};
  taps.radius = static_cast<int64_t>(taps.weights.size() / 2);
  taps.rows.resize(taps.weights.size());
  return taps;
}

// The stretches at `from` + index * stride for all indices around `index`, the last one repeated beyond the end.
const float* const* around(Taps& taps, const float* from, int64_t index, int64_t size, int64_t stride) {
  for (int64_t t = 0; t < taps.count(); ++t)
    taps.rows[t] = from + std::clamp<int64_t>(index + t - taps.radius, 0, size - 1) * stride;
  return taps.rows.data();
}

void smooth_planes(const float* from, float* to, const Index3& size, Taps& height, Taps& width, std::vector<float>& row) {
  const int64_t length = size[2], radius = width.radius;
  float* padded = at_least(row, length + 2 * radius);
  for (int64_t plane = 0; plane < size[0]; ++plane)
    for (int64_t h = 0; h < size[1]; ++h) {
      const float* const* rows = around(height, from + plane * size[1] * length, h, size[1], length);
      row_path().weighted_sum(rows, height.weights.data(), height.count(), length, padded + radius);
      std::fill_n(padded, radius, padded[radius]);
      std::fill_n(padded + radius + length, radius, padded[radius + length - 1]);
      for (int64_t t = 0; t < width.count(); ++t) width.rows[t] = padded + t;
      float* out = to + (plane * size[1] + h) * length;
      row_path().weighted_sum(width.rows.data(), width.weights.data(), width.count(), length, out);
    }
}

}  // namespace

std::vector<float> gaussian_weights(float sigma) {
  if (!(sigma >= 0.0f && sigma <= 1000.0f))
    throw std::invalid_argument("sigma of a Gaussian must lie between 0 and 1000 voxels, got " + std::to_string(sigma));
  const int64_t radius = gaussian_radius(sigma);
  std::vector<double> weights;
  double sum = 0.0;
  for (int64_t t = -radius; t <= radius; ++t) {
    const double place = sigma > 0 ? static_cast<double>(t) / sigma : 0.0;
    weights.push_back(std::exp(-0.5 * place * place));
    sum += weights.back();
  }
  std::vector<float> rounded;
  for (const double weight : weights) rounded.push_back(static_cast<float>(weight / sum));
  return rounded;
}

void smooth(float* volume, const Index3& size, const std::array<float, 3>& sigma, ViewWorkspace::Buffers& buffers) {
  Taps depth = gaussian(sigma[0]), height = gaussian(sigma[1]), width = gaussian(sigma[2]);
  if (depth.radius + height.radius + width.radius == 0) return;
  const int64_t plane = size[1] * size[2];
  float* copy = at_least(buffers.volume, voxels(size));
  smooth_planes(volume, copy, size, height, width, buffers.row);
  if (depth.radius == 0) {
    std::memcpy(volume, copy, sizeof(float) * voxels(size));
    return;
  }
  for_each_strip(size, [&](const Strip& strip) {
    const float* const* rows = around(depth, copy + strip.row * size[2], strip.plane, size[0], plane);
    row_path().weighted_sum(rows, depth.weights.data(), depth.count(), strip.count, volume + strip.first);
  });
}

}  // namespace voxtrast
