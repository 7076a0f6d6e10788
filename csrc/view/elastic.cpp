#include "elastic.h"

#include <cmath>
#include <stdexcept>
#include <string>

namespace voxtrast {

void check_elastic(const Elastic& elastic, const Index3& size) {
  int64_t count = 3;
  for (int axis = 0; axis < 3; ++axis) {
    const double spacing = elastic.spacing[axis];
    if (!(spacing > 0) || !std::isfinite(spacing)) throw std::invalid_argument("spacing of control points must be positive");
    const auto needed = static_cast<int64_t>(std::floor(static_cast<double>(size[axis] - 1) / spacing)) + 4;
    if (elastic.points[axis] < needed)
      throw std::invalid_argument("an elastic deformation has " + std::to_string(elastic.points[axis]) +
                                  " control points along an axis that needs " + std::to_string(needed));
    count *= elastic.points[axis];
  }
  if (static_cast<int64_t>(elastic.shift.size()) != count)
    throw std::invalid_argument("an elastic deformation holds " + std::to_string(elastic.shift.size()) +
                                " numbers, its control points need " + std::to_string(count));
  for (const float shift : elastic.shift)
    if (!(std::fabs(shift) < 1e6f)) throw std::invalid_argument("a control point is displaced by 1e6 voxels or more");
}

// Index i lies between the second and the third of the four control points that reach it.
SplineCell spline_cell(const Elastic& elastic, int axis, int64_t index) {
  const double place = static_cast<double>(index) / elastic.spacing[axis];
  const int64_t first = std::min(static_cast<int64_t>(place), elastic.points[axis] - 4);
  const double t = place - static_cast<double>(first), s = 1.0 - t;
  return {static_cast<int32_t>(first),
          {static_cast<float>(s * s * s / 6.0), static_cast<float>((3.0 * t * t * t - 6.0 * t * t + 4.0) / 6.0),
           static_cast<float>((3.0 * s * s * s - 6.0 * s * s + 4.0) / 6.0), static_cast<float>(t * t * t / 6.0)}};
}

ElasticRows::ElasticRows(const Elastic& elastic, const Index3& size, ViewWorkspace::Buffers& buffers)
    : elastic_(elastic), size_(size), any_(elastic.points[0] > 0), length_(size[2] + kRowSlack) {
  shift_ = at_least(buffers.shifts, 3 * length_);
  std::fill_n(shift_, 3 * length_, 0.0f);
  if (!any_) return;
  check_elastic(elastic, size);
  const Index3& points = elastic.points;
  rows_ = at_least(buffers.control_rows, 3 * points[0] * points[1] * length_);
  plane_ = at_least(buffers.control_plane, 3 * points[1] * length_);
  for (int64_t row = 0; row < 3 * points[0] * points[1]; ++row) {
    const float* control = elastic.shift.data() + row * points[2];
    float* to = rows_ + row * length_;
    std::fill(to + size[2], to + length_, 0.0f);
    for (int64_t w = 0; w < size[2]; ++w) {
      const SplineCell at = spline_cell(elastic, 2, w);
      to[w] = 0.0f;
      for (int k = 0; k < 4; ++k) to[w] += at.weight[k] * control[at.first + k];
    }
  }
}

void ElasticRows::set_plane(int64_t plane) {
  if (!any_) return;
  const Index3& points = elastic_.points;
  const SplineCell at = spline_cell(elastic_, 0, plane);
  const int64_t count = points[1] * length_;  // of a plane of one component
  for (int component = 0; component < 3; ++component) {
    const float* rows[4];
    for (int k = 0; k < 4; ++k) rows[k] = rows_ + (component * points[0] + at.first + k) * count;
    row_path().weighted_sum(rows, at.weight, 4, count, plane_ + component * count);
  }
}

void ElasticRows::row(int64_t height, const float* (&shift)[3]) {
  for (int component = 0; component < 3; ++component) {
    float* to = shift_ + component * length_;
    shift[component] = to;
    if (!any_) continue;
    const SplineCell at = spline_cell(elastic_, 1, height);
    const float* rows[4];
    for (int k = 0; k < 4; ++k) rows[k] = plane_ + (component * elastic_.points[1] + at.first + k) * length_;
    row_path().weighted_sum(rows, at.weight, 4, length_, to);
  }
}

}  // namespace voxtrast
