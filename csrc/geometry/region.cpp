#include "region.h"

#include <algorithm>
#include <cmath>

namespace voxtrast {

namespace {

// Samplers compute positions in float32, some by adding up steps; they stay within this of the exact ones.
constexpr double kSlack = 0.05;

struct Reach {
  double low = 0.0, high = 0.0;
};

Reach deformation(const Elastic& elastic, int axis) {
  Reach reach;
  const size_t points = elastic.shift.size() / 3;
  const auto first = elastic.shift.begin() + static_cast<std::ptrdiff_t>(points) * axis;
  if (points == 0) return reach;
  const auto [least, most] = std::minmax_element(first, first + static_cast<std::ptrdiff_t>(points));
  return {*least, *most};
}

// Every index of the view falls on a voxel along this axis: nothing is interpolated.
bool on_voxels(const ViewPlan& view, int axis) {
  for (int j = 0; j < 4; ++j) {
    const double entry = view.to_volume[static_cast<size_t>(4 * axis + j)];
    if (entry != std::floor(entry)) return false;
  }
  return true;
}

Box box_of(const ViewPlan& view) {
  Box box;
  for (int axis = 0; axis < 3; ++axis) {
    const size_t row = static_cast<size_t>(4 * axis);
    double middle = view.to_volume[row + 3], reach = 0.0;
    for (size_t j = 0; j < 3; ++j) {
      const double half = static_cast<double>(view.size[j] - 1) / 2.0;
      middle += view.to_volume[row + j] * half;
      reach += std::abs(view.to_volume[row + j]) * half;
    }
    const Reach moved = deformation(view.elastic, axis);
    const double low = middle - reach + moved.low, high = middle + reach + moved.high;
    const size_t at = static_cast<size_t>(axis);
    if (on_voxels(view, axis) && moved.low == 0.0 && moved.high == 0.0) {
      box.lower[at] = std::llrint(low);
      box.upper[at] = std::llrint(high) + 1;
    } else {
      box.lower[at] = static_cast<int64_t>(std::floor(low - kSlack));
      box.upper[at] = static_cast<int64_t>(std::floor(high + kSlack)) + 2;
    }
    const int64_t halo = gaussian_radius(view.antialias[at]);
    box.lower[at] -= halo;
    box.upper[at] += halo;
  }
  return box;
}

}  // namespace

std::array<float, 3> antialias_of(const Affine& to_volume) {
  std::array<float, 3> sigma{};
  for (size_t axis = 0; axis < 3; ++axis) {
    const double shrinks = std::hypot(to_volume[4 * axis], to_volume[4 * axis + 1], to_volume[4 * axis + 2]);
    const double wanted = (shrinks - 1.0) / 2.0;
    sigma[axis] = wanted <= kLeastAntialias ? 0.0f : static_cast<float>(wanted);
  }
  return sigma;
}

Box region_of(const Plan& plan) {
  Box all;
  for (const ViewPlan& view : plan.views) {
    const Box box = box_of(view);
    for (size_t axis = 0; axis < 3; ++axis) {
      // Beyond the volume one shell of voxels is kept: filled with background and repeated outwards, it is all that a
      // sampler with clamped coordinates needs to see background everywhere outside.
      const int64_t lower = std::clamp<int64_t>(box.lower[axis], -1, plan.volume[axis]);
      const int64_t upper = std::clamp<int64_t>(box.upper[axis], 0, plan.volume[axis] + 1);
      const bool first = &view == &plan.views.front();
      all.lower[axis] = first ? lower : std::min(all.lower[axis], lower);
      all.upper[axis] = first ? upper : std::max(all.upper[axis], upper);
    }
  }
  return all;
}

}  // namespace voxtrast
