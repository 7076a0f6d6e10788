#include "steps.h"

#include <algorithm>
#include <cmath>

namespace voxtrast {

namespace {

constexpr int kSwapTries = 8;

using Box6 = std::array<int32_t, 6>;

void append(std::vector<int32_t>& boxes, const Box6& box) { boxes.insert(boxes.end(), box.begin(), box.end()); }

void draw_sides(const BoxesSpec& spec, const Index3& size, Draws& draws, Box6& box) {
  for (size_t axis = 0; axis < 3; ++axis) {
    int64_t side = 1;
    if (size[axis] > 1) {  // the one voxel of a slice's depth is not drawn
      if (spec.side_voxels.empty())
        side = std::llrint(draws.uniform(spec.side.low, spec.side.high) * static_cast<double>(size[axis]));
      else
        side = draws.integer(static_cast<int64_t>(spec.side_voxels[axis].low),
                             static_cast<int64_t>(spec.side_voxels[axis].high));
    }
    box[axis + 3] = static_cast<int32_t>(std::clamp<int64_t>(side, 1, size[axis]));
  }
}

void draw_place(const Index3& size, Draws& draws, Box6& box) {
  for (size_t axis = 0; axis < 3; ++axis)
    box[axis] = static_cast<int32_t>(size[axis] == box[axis + 3] ? 0 : draws.integer(0, size[axis] - box[axis + 3]));
}

bool apart(const Box6& first, const Box6& second) {
  for (size_t axis = 0; axis < 3; ++axis)
    if (first[axis] + first[axis + 3] <= second[axis] || second[axis] + second[axis + 3] <= first[axis]) return true;
  return false;
}

bool one_more(const BoxesSpec& spec, int64_t made, Draws& draws) {
  return made < spec.least || spec.go_on >= 1.0 || draws.happens(spec.go_on);
}

std::vector<int32_t> draw_boxes(const BoxesSpec& spec, const Index3& size, Draws& draws) {
  std::vector<int32_t> boxes;
  for (int64_t made = 0; made < spec.count && one_more(spec, made, draws); ++made) {
    Box6 box{};
    draw_sides(spec, size, draws, box);
    draw_place(size, draws, box);
    append(boxes, box);
  }
  return boxes;
}

std::vector<int32_t> draw_pairs(const BoxesSpec& spec, const Index3& size, Draws& draws) {
  std::vector<int32_t> boxes;
  for (int64_t made = 0; made < spec.count && one_more(spec, made, draws); ++made) {
    Box6 first{}, second{};
    draw_sides(spec, size, draws, first);
    second = first;
    for (int tried = 0; tried < kSwapTries; ++tried) {
      draw_place(size, draws, first);
      draw_place(size, draws, second);
      if (!apart(first, second)) continue;
      append(boxes, first);
      append(boxes, second);
      break;
    }
  }
  return boxes;
}

std::vector<float> draw_bias(const Index3& size, double limit, double background, Draws& draws) {
  std::vector<float> numbers = {static_cast<float>(background)};
  for (int d = 0; d <= 3; ++d)
    for (int h = 0; d + h <= 3; ++h)
      for (int w = 0; d + h + w <= 3; ++w) {
        // No factor common to all voxels, and nothing along an axis of one voxel.
        const bool flat = (d && size[0] == 1) || (h && size[1] == 1) || (w && size[2] == 1);
        numbers.push_back(flat || d + h + w == 0 ? 0.0f : static_cast<float>(draws.symmetric(limit)));
      }
  return numbers;
}

// A step that would change nothing is left out of the plan.
bool changes_something(const Step& step) {
  switch (step.kind) {
    case StepKind::noise:
    case StepKind::blur:
    case StepKind::brightness: return step.numbers[0] != 0.0f;
    case StepKind::contrast:
    case StepKind::gamma:
    case StepKind::low_resolution: return step.numbers[0] != 1.0f;
    case StepKind::bias_field:
      return std::any_of(step.numbers.begin() + 1, step.numbers.end(), [](float number) { return number != 0.0f; });
    case StepKind::pixel_shuffle:
    case StepKind::patch_swap:
    case StepKind::in_paint:
    case StepKind::cut_out: return !step.boxes.empty();
    default: return true;
  }
}

Step draw_step(const View& view, const StepSpec& spec, const Intensity& intensity, Draws draws, uint32_t stream) {
  const double span = intensity.high - intensity.low;
  Step step{spec.kind, stream, {}, {}};
  const auto number = [&](double value) { step.numbers.push_back(static_cast<float>(value)); };
  switch (spec.kind) {
    case StepKind::noise: number(span * draws.uniform(spec.range.low, spec.range.high)); break;
    case StepKind::blur:
    case StepKind::contrast:
    case StepKind::low_resolution: number(draws.uniform(spec.range.low, spec.range.high)); break;
    case StepKind::brightness:
      number(span * (spec.std * draws.normal() + draws.uniform(spec.range.low, spec.range.high)));
      break;
    case StepKind::gamma:
      number(draws.log_uniform(spec.range.low, spec.range.high));
      number(draws.happens(spec.invert) ? 1.0 : 0.0);
      break;
    case StepKind::bias_field:
      step.numbers = draw_bias(view.size, spec.range.high, intensity.background, draws);
      break;
    case StepKind::bezier: {
      std::array<double, 4> points{};
      for (double& point : points) point = draws.uniform();
      step.numbers = bezier_table(points, draws.happens(spec.invert));
      break;
    }
    case StepKind::patch_swap: step.boxes = draw_pairs(spec.boxes, view.size, draws); break;
    case StepKind::pixel_shuffle: step.boxes = draw_boxes(spec.boxes, view.size, draws); break;
    case StepKind::in_paint:
    case StepKind::out_paint:
      number(intensity.low);
      number(intensity.high);
      step.boxes = draw_boxes(spec.boxes, view.size, draws);
      break;
    case StepKind::cut_out:
    case StepKind::cut_out_outside:
      number(intensity.low + span * spec.value);
      step.boxes = draw_boxes(spec.boxes, view.size, draws);
      break;
  }
  return step;
}

}  // namespace

std::string choice_stream(const View& view, const OrderEntry& entry) {
  return (view.same_choice ? "" : view.name + "/") + "choice/" + entry.name;
}

std::string step_stream(const View& view, const StepSpec& step) { return view.name + "/" + step.name; }

std::string voxel_stream(const View& view, const StepSpec& step) { return step_stream(view, step) + "/voxels"; }

std::vector<Step> draw_steps(const View& view, const Intensity& intensity, const DrawsOf& draws,
                             const StreamOf& stream) {
  std::vector<Step> steps;
  for (const OrderEntry& entry : view.order) {
    double left = draws(choice_stream(view, entry)).uniform();
    for (const StepSpec& spec : entry.alternatives) {
      if (left < spec.probability) {
        Step step = draw_step(view, spec, intensity, draws(step_stream(view, spec)), stream(voxel_stream(view, spec)));
        if (changes_something(step)) steps.push_back(std::move(step));
        break;
      }
      left -= spec.probability;
    }
  }
  return steps;
}

std::vector<float> bezier_table(const std::array<double, 4>& points, bool reversed) {
  constexpr int kPieces = 512;  // straight pieces of the curve; both coordinates grow along it
  const auto along = [](double t, double first, double second) {
    const double u = 1.0 - t;
    return 3.0 * u * u * t * first + 3.0 * u * t * t * second + t * t * t;
  };
  std::vector<float> table(kBezierTable);
  double x0 = 0.0, y0 = 0.0;
  int next = 0;
  for (int piece = 1; piece <= kPieces; ++piece) {
    const double t = static_cast<double>(piece) / kPieces;
    const double x1 = along(t, points[0], points[2]), y1 = along(t, points[1], points[3]);
    for (; next < kBezierTable; ++next) {
      const double x = static_cast<double>(next) / (kBezierTable - 1);
      if (x > x1 && piece < kPieces) break;
      const double share = x1 > x0 ? std::min((x - x0) / (x1 - x0), 1.0) : 1.0;
      table[static_cast<size_t>(next)] = static_cast<float>(y0 + share * (y1 - y0));
    }
    x0 = x1;
    y0 = y1;
  }
  if (reversed) std::reverse(table.begin(), table.end());
  return table;
}

}  // namespace voxtrast
