#include "step_rules.h"

#include <cmath>
#include <stdexcept>
#include <string>

namespace voxtrast {
namespace {

struct Needs {
  const char* name;
  size_t numbers;
  bool boxes;
};

Needs needs(StepKind kind) {
  switch (kind) {
    case StepKind::noise: return {"noise", 1, false};
    case StepKind::blur: return {"blur", 1, false};
    case StepKind::contrast: return {"contrast", 1, false};
    case StepKind::brightness: return {"brightness", 1, false};
    case StepKind::gamma: return {"gamma", 2, false};
    case StepKind::bias_field: return {"bias_field", 1 + kBiasTerms, false};
    case StepKind::low_resolution: return {"low_resolution", 1, false};
    case StepKind::bezier: return {"bezier", kBezierTable, false};
    case StepKind::pixel_shuffle: return {"pixel_shuffle", 0, true};
    case StepKind::patch_swap: return {"patch_swap", 0, true};
    case StepKind::in_paint: return {"in_paint", 2, true};
    case StepKind::out_paint: return {"out_paint", 2, true};
    case StepKind::cut_out: return {"cut_out", 1, true};
    case StepKind::cut_out_outside: return {"cut_out_outside", 1, true};
  }
  throw std::invalid_argument("there is no step of kind " + std::to_string(static_cast<int32_t>(kind)));
}

}  // namespace

void check_step(const Step& step, const Index3& size) {
  const Needs expected = needs(step.kind);
  const auto refuse = [&](const std::string& what) {
    throw std::invalid_argument("step " + std::string(expected.name) + " " + what);
  };
  if (step.numbers.size() != expected.numbers)
    refuse("takes " + std::to_string(expected.numbers) + " numbers, got " + std::to_string(step.numbers.size()));
  for (const float number : step.numbers)
    if (!std::isfinite(number)) refuse("holds a number that is not finite");
  if (step.boxes.size() % 6 != 0 || (!expected.boxes && !step.boxes.empty()))
    refuse("holds " + std::to_string(step.boxes.size()) + " numbers of boxes");
  for (size_t box = 0; box < step.boxes.size(); box += 6)
    for (int axis = 0; axis < 3; ++axis) {
      const int64_t lower = step.boxes[box + axis], side = step.boxes[box + 3 + axis];
      if (lower < 0 || side < 1 || lower + side > size[axis]) refuse("has a box that is empty or leaves the view");
    }
  if (step.kind == StepKind::gamma && step.numbers[0] <= 0) refuse("takes an exponent above 0");
  if (step.kind == StepKind::low_resolution && step.numbers[0] < 1) refuse("takes a factor of at least 1");
  if (step.kind == StepKind::patch_swap) {
    if (step.boxes.size() % 12 != 0) refuse("takes boxes in pairs");
    for (size_t pair = 0; pair < step.boxes.size(); pair += 12)
      for (int axis = 3; axis < 6; ++axis)
        if (step.boxes[pair + axis] != step.boxes[pair + 6 + axis]) refuse("has a pair of boxes of different sizes");
  }
}

bool voxel_by_voxel(StepKind kind) {
  return kind == StepKind::noise || kind == StepKind::contrast || kind == StepKind::brightness ||
         kind == StepKind::gamma || kind == StepKind::bias_field || kind == StepKind::bezier;
}

bool Knowledge::suffices(const Step& step) const {
  if (step.kind == StepKind::contrast) return mean;
  return (step.kind != StepKind::gamma && step.kind != StepKind::bezier) || range;
}

void Knowledge::note(const Step& step) {
  const bool in_order = step.kind == StepKind::brightness || step.kind == StepKind::gamma ||
                        (step.kind == StepKind::contrast && step.numbers[0] >= 0);
  mean = mean && (step.kind == StepKind::brightness || step.kind == StepKind::contrast);
  range = range && in_order;
}

}  // namespace voxtrast
