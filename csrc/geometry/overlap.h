// Boxes whose intersection over union with a given box lies in a range.
#pragma once

#include <optional>

#include "boxes.h"

namespace voxtrast {

// The voxels that two boxes of given volumes may share: intersection / (total - intersection) within the range.
struct SharedVoxels {
  int64_t low = 0, high = 0;
};

SharedVoxels shared_voxels(int64_t total, const Range& iou);

// A box of these sides, uniform over all places in the volume where it shares so many voxels with the other; nothing
// where there is no such place. The places are counted exactly, by their overlaps along the three axes.
std::optional<Box> draw_overlapping(const Index3& volume, const Index3& sides, const Box& other, const Range& iou,
                                    Draws& draws);

// Whether a box of these sides finds a place wherever the other one lies; `reach` grows to what the two can have.
bool always_overlaps(const Index3& volume, const Index3& sides, const Index3& other, const Range& iou, Range& reach);

}  // namespace voxtrast
