// Separable Gaussians.
#pragma once

#include "workspace.h"

namespace voxtrast {

// Of the voxels from gaussian_radius(sigma) before the middle to as far behind it.
// Throws std::invalid_argument for a sigma that is negative, not finite or wider than the volume can mean.
std::vector<float> gaussian_weights(float sigma);

// Smooths a volume in place along the axes whose sigma (voxels) is positive. Takes buffers.volume and buffers.row.
// Throws as above.
void smooth(float* volume, const Index3& size, const std::array<float, 3>& sigma, ViewWorkspace::Buffers& buffers);

}  // namespace voxtrast
