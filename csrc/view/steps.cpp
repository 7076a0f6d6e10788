#include "steps.h"

#include <limits>

namespace voxtrast {
namespace {

static_assert(kBezierEntries == kBezierTable, "what the planner writes is what the rows read");

constexpr ViewStatistics kNothing = {0.0, std::numeric_limits<float>::infinity(),
                                     -std::numeric_limits<float>::infinity()};

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
  for (const Step& step : plan.steps) check_step(step, plan.size);
  collect_run();
}

// The steps from `next_` on that one pass can carry out, and whether it gathers statistics for the step that follows.
void StepRunner::collect_run() {
  run_.clear();
  const std::vector<Step>& steps = plan_.steps;
  for (; next_ < steps.size() && voxel_by_voxel(steps[next_].kind) && known_.suffices(steps[next_]); ++next_) {
    const auto mean = static_cast<float>(known_.of.sum / static_cast<double>(voxels(plan_.size)));
    run_.push_back({&steps[next_], mean, known_.of.low, known_.of.high});
    note(run_.back());
  }
  gathers_ = next_ < steps.size() && voxel_by_voxel(steps[next_].kind);
  gathered_ = kNothing;
}

void StepRunner::note(const Operation& operation) {
  const Step& step = *operation.step;
  if (step.kind == StepKind::brightness) known_.of.sum += double(step.numbers[0]) * voxels(plan_.size);
  known_.note(step);
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
  known_ = {{gathers_, gathers_}, gathers_ ? gathered_ : ViewStatistics{}};
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
