// What steps ask for and what they leave: the same on every device.
#pragma once

#include "../geometry/plan.h"

namespace voxtrast {

// Throws std::invalid_argument for a step that cannot be carried out on a view of that size, saying why.
void check_step(const Step& step, const Index3& size);

// Whether a step changes voxels one by one, by their values and places, and by statistics of the view.
bool voxel_by_voxel(StepKind kind);

// Which statistics of a view are known between two of its steps.
struct Knowledge {
  bool mean = false, range = false;

  bool suffices(const Step& step) const;
  // Steps that preserve order move the ends of the range like any other voxel; the mean is followed through sums.
  void note(const Step& step);
};

}  // namespace voxtrast
