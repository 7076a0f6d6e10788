#include <cstdio>
#include <sstream>

#include "planner.h"

namespace voxtrast {

namespace {

constexpr const char* kStepNames[] = {"noise",      "blur",      "contrast", "brightness",     "gamma",
                                      "bias_field", "low_resolution", "bezier", "pixel_shuffle", "patch_swap",
                                      "in_paint",   "out_paint", "cut_out",  "cut_out_outside"};

template <typename T>
std::string times(const T& numbers) {
  std::ostringstream text;
  for (size_t i = 0; i < numbers.size(); ++i) text << (i ? "x" : "") << numbers[i];
  return text.str();
}

std::string span(const Box& box) {
  std::ostringstream text;
  for (size_t axis = 0; axis < 3; ++axis)
    text << (axis ? ", " : "[") << box.lower[axis] << ":" << box.upper[axis];
  return text.str() + "]";
}

std::string rows(const Affine& map) {
  std::string text;
  char buffer[128];
  for (size_t row = 0; row < 3; ++row) {
    const double* entry = map.data() + 4 * row;
    std::snprintf(buffer, sizeof buffer, "\n    %10.5f %10.5f %10.5f  %+12.5f", entry[0], entry[1], entry[2], entry[3]);
    text += buffer;
  }
  return text;
}

void describe_step(std::ostringstream& text, const Step& step) {
  constexpr size_t kShown = 4;
  text << "\n  " << kStepNames[static_cast<size_t>(step.kind)];
  for (size_t i = 0; i < step.numbers.size() && i < kShown; ++i) text << " " << step.numbers[i];
  if (step.numbers.size() > kShown) text << " ... (" << step.numbers.size() << " numbers)";
  if (!step.boxes.empty()) text << ", " << step.boxes.size() / 6 << " boxes:";
  for (size_t i = 0; i + 5 < step.boxes.size() && i < 6 * kShown; i += 6) {
    const int32_t* box = step.boxes.data() + i;
    text << " [" << box[0] << ":" << box[0] + box[3] << ", " << box[1] << ":" << box[1] + box[4] << ", " << box[2]
         << ":" << box[2] + box[5] << "]";
  }
  if (step.boxes.size() > 6 * kShown) text << " ...";
}

void describe_view(std::ostringstream& text, const ViewPlan& view) {
  text << "\nview " << view.name << ": " << times(view.size) << " voxels of the box " << span(view.box);
  text << "\n  flips " << times(view.flips) << ", quarter turns " << view.quarter_turns;
  text << "\n  to the volume:" << rows(view.to_volume);
  if (!view.elastic.shift.empty())
    text << "\n  deformation of " << times(view.elastic.points) << " control points, " << view.elastic.spacing[0]
         << " voxels apart";
  if (view.antialias != std::array<float, 3>{}) text << "\n  antialias sigma " << times(view.antialias);
  if (view.displacement) text << "\n  displacement from the volume:" << rows(view.from_volume);
  if (view.clean) text << "\n  also clean";
  for (const Step& step : view.steps) describe_step(text, step);
}

}  // namespace

const char* step_name(StepKind kind) { return kStepNames[static_cast<size_t>(kind)]; }

std::string describe(const Plan& plan) {
  std::ostringstream text;
  text << "seed " << plan.seed << ", split " << plan.split << ", step " << plan.step << ", slot " << plan.slot
       << "\ncase " << plan.case_index << " of " << times(plan.volume) << " voxels, background " << plan.background
       << "\ncrop " << span(plan.crop) << ", position " << plan.position << "\nregion " << span(plan.region);
  for (const ViewPlan& view : plan.views) describe_view(text, view);
  return text.str();
}

}  // namespace voxtrast
