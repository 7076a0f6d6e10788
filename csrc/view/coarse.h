#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace voxtrast {

// One axis read from a coarser grid: for each voxel the lower of two coarse ones and the weight of the upper.
struct Coarse {
  int64_t size;
  std::vector<int64_t> nearest, lower;
  std::vector<float> fraction;

  Coarse(int64_t fine, float factor) {
    size = std::max<int64_t>(1, static_cast<int64_t>(std::floor(static_cast<double>(fine) / factor + 0.5)));
    for (int64_t j = 0; j < size; ++j) nearest.push_back((2 * j + 1) * fine / (2 * size));
    const double scale = static_cast<double>(size) / static_cast<double>(fine);
    for (int64_t i = 0; i < fine; ++i) {
      const double at = std::clamp((static_cast<double>(i) + 0.5) * scale - 0.5, 0.0, static_cast<double>(size - 1));
      lower.push_back(std::min(static_cast<int64_t>(at), std::max<int64_t>(0, size - 2)));
      fraction.push_back(static_cast<float>(at - static_cast<double>(lower.back())));
    }
  }
  int64_t upper(int64_t i) const { return std::min(lower[i] + 1, size - 1); }
};

}  // namespace voxtrast
