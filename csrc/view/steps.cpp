#include "steps.h"

#include <cmath>
#include <limits>
#include <stdexcept>
#include <string>

namespace voxtrast {
namespace {

constexpr ViewStatistics kNothing = {0.0, std::numeric_limits<float>::infinity(),
                                     -std::numeric_limits<float>::infinity()};

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

void check(const Step& step, const Index3& size) {
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

// Along an axis the coordinates of a bias field run from -1 to 1.
double bias_coordinate(int64_t index, int64_t size) {
  return size > 1 ? 2.0 * static_cast<double>(index) / static_cast<double>(size - 1) - 1.0 : 0.0;
}

// The field's exponent along a row, as a cubic of w.
void bias_cubic(const float* coefficients, double d, double h, float (&cubic)[4]) {
  const double depth[4] = {1.0, d, d * d, d * d * d}, height[4] = {1.0, h, h * h, h * h * h};
  double sum[4] = {};
  int term = 0;
  for (int i = 0; i <= 3; ++i)
    for (int j = 0; i + j <= 3; ++j)
      for (int k = 0; i + j + k <= 3; ++k) sum[k] += coefficients[term++] * depth[i] * height[j];
  for (int k = 0; k < 4; ++k) cubic[k] = static_cast<float>(sum[k]);
}

}  // namespace

StepRunner::StepRunner(const ViewPlan& plan, const DrawKey& key, float* view, ViewWorkspace::Buffers& buffers)
    : plan_(plan), key_(key), view_(view), buffers_(buffers) {
  for (const Step& step : plan.steps) check(step, plan.size);
  collect_run();
}

bool StepRunner::lacks_statistics(const Step& step) const {
  if (step.kind == StepKind::contrast) return !known_.mean;
  return (step.kind == StepKind::gamma || step.kind == StepKind::bezier) && !known_.range;
}

// The steps from `next_` on that one pass can carry out, and whether it gathers statistics for the step that follows.
void StepRunner::collect_run() {
  run_.clear();
  const std::vector<Step>& steps = plan_.steps;
  for (; next_ < steps.size() && voxel_by_voxel(steps[next_].kind) && !lacks_statistics(steps[next_]); ++next_) {
    const auto mean = static_cast<float>(known_.of.sum / static_cast<double>(voxels(plan_.size)));
    run_.push_back({&steps[next_], mean, known_.of.low, known_.of.high});
    note(run_.back());
  }
  gathers_ = next_ < steps.size() && voxel_by_voxel(steps[next_].kind);
  gathered_ = kNothing;
}

// What a step leaves of the statistics. Steps that preserve order move the ends of the range like any other voxel.
void StepRunner::note(const Operation& operation) {
  const StepKind kind = operation.step->kind;
  const bool in_order = kind == StepKind::brightness || kind == StepKind::gamma ||
                        (kind == StepKind::contrast && operation.step->numbers[0] >= 0);
  if (kind == StepKind::brightness) known_.of.sum += double(operation.step->numbers[0]) * voxels(plan_.size);
  known_.mean = known_.mean && (kind == StepKind::brightness || kind == StepKind::contrast);
  known_.range = known_.range && in_order;
  if (!known_.range) return;
  float ends[2] = {known_.of.low, known_.of.high};
  perform_one(operation, {0, 0, 1, 0, 2}, ends);
  known_.of.low = ends[0];
  known_.of.high = ends[1];
}

void StepRunner::perform(const Strip& strip) {
  for (const Operation& operation : run_) perform_one(operation, strip, view_ + strip.first);
  if (gathers_) row_path().gather_statistics(view_ + strip.first, strip.count, gathered_);
}

void StepRunner::perform_one(const Operation& operation, const Strip& strip, float* values) const {
  const Step& step = *operation.step;
  const float* numbers = step.numbers.data();
  const bool flat = !(operation.high > operation.low);
  switch (step.kind) {
    case StepKind::noise:
      return row_path().noise(values, strip.count, stream(step), strip.first, numbers[0]);
    case StepKind::contrast:
      return row_path().contrast(values, strip.count, operation.mean, numbers[0]);
    case StepKind::brightness:
      return row_path().add(values, strip.count, numbers[0]);
    case StepKind::gamma:
      if (flat) return;
      return row_path().gamma(values, strip.count, operation.low, operation.high, numbers[0], numbers[1] != 0.0f);
    case StepKind::bezier:
      if (flat) return;
      return row_path().bezier(values, strip.count, operation.low, operation.high, numbers);
    default:
      return bias_rows(step, strip, values);
  }
}

void StepRunner::bias_rows(const Step& step, const Strip& strip, float* values) const {
  const Index3& size = plan_.size;
  const double along = size[2] > 1 ? 2.0 / static_cast<double>(size[2] - 1) : 0.0;
  for (int64_t row = 0; row < strip.rows; ++row) {
    float cubic[4];
    bias_cubic(step.numbers.data() + 1, bias_coordinate(strip.plane, size[0]),
               bias_coordinate(strip.row + row, size[1]), cubic);
    row_path().bias(values + row * size[2], size[2], step.numbers[0], cubic,
                    static_cast<float>(bias_coordinate(0, size[2])), static_cast<float>(along));
  }
}

void StepRunner::learn() {
  known_ = {gathers_, gathers_, gathers_ ? gathered_ : ViewStatistics{}};
}

void StepRunner::perform_others() {
  const std::vector<Step>& steps = plan_.steps;
  const auto every_strip = [&] { for_each_strip(plan_.size, [&](const Strip& strip) { perform(strip); }); };
  learn();
  while (next_ < steps.size()) {
    if (!voxel_by_voxel(steps[next_].kind)) {
      perform_whole(steps[next_++]);
      known_ = {};
    }
    collect_run();
    if (run_.empty() && !gathers_) continue;
    every_strip();
    if (gathers_) learn();
  }
}

}  // namespace voxtrast
