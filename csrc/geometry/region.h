// Which voxels of a volume the views of a slot read.
#pragma once

#include "plan.h"

namespace voxtrast {

// A view that shrinks the volume by s > 1 along an axis sees it through a Gaussian of sigma (s - 1) / 2 voxels; up to
// this there is none, as such a kernel leaves all but a thousandth in its middle.
constexpr double kLeastAntialias = 0.25;

std::array<float, 3> antialias_of(const Affine& to_volume);

// The union of the boxes that the views read: the interpolation's neighbours, the largest displacement of the control
// points (a spline stays within their hull) and the radius of the antialias filter included.
Box region_of(const Plan& plan);

}  // namespace voxtrast
