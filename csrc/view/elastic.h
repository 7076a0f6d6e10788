// The displacements of a cubic B-spline, row by row. The spline is separable: along W it is evaluated once for all rows
// of control points, along D once for each plane; a row costs four products and sums a voxel and component.
#pragma once

#include "workspace.h"

namespace voxtrast {

// Throws std::invalid_argument where the control points do not reach over a view of that size.
void check_elastic(const Elastic& elastic, const Index3& size);

// Four control points of an axis, and how much of each an index of the view gets.
struct SplineCell {
  int32_t first;
  float weight[4];
};
SplineCell spline_cell(const Elastic& elastic, int axis, int64_t index);

class ElasticRows {
 public:
  // Throws as check_elastic.
  ElasticRows(const Elastic& elastic, const Index3& size, ViewWorkspace::Buffers& buffers);

  void set_plane(int64_t plane);
  // Displacements (voxels of the volume) along D, H, W of the voxels of a row: zeros without control points.
  void row(int64_t height, const float* (&shift)[3]);

 private:
  const Elastic& elastic_;
  const Index3 size_;
  const bool any_;
  int64_t length_;  // of a row and what may be read behind it
  float *rows_, *plane_, *shift_;
};

}  // namespace voxtrast
