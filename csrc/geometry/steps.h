// What is done to the intensities of one view, drawn from its declaration.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "draws.h"
#include "view_spec.h"

namespace voxtrast {

// Intensities of a case: the ends of its own range, and what its background is.
struct Intensity {
  double low = 0.0, high = 1.0, background = 0.0;
};

using DrawsOf = std::function<Draws(const std::string& purpose)>;
using StreamOf = std::function<uint32_t(const std::string& purpose)>;

// The names of the streams that the steps of a view use.
std::string choice_stream(const View& view, const OrderEntry& entry);
std::string step_stream(const View& view, const StepSpec& step);   // of the numbers in the plan
std::string voxel_stream(const View& view, const StepSpec& step);  // of those drawn voxel by voxel

std::vector<Step> draw_steps(const View& view, const Intensity& intensity, const DrawsOf& draws, const StreamOf& stream);

// A cubic Bezier curve from (0, 0) over two points to (1, 1) as values over [0, 1]; reversed, it falls from 1 to 0.
std::vector<float> bezier_table(const std::array<double, 4>& points, bool reversed);

}  // namespace voxtrast
