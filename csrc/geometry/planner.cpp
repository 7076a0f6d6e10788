#include "planner.h"

#include <cmath>
#include <map>
#include <stdexcept>

#include "affine.h"
#include "boxes.h"
#include "region.h"

namespace voxtrast {

namespace {

std::string of(const View& view, const char* purpose) { return view.name + "/" + purpose; }

Affine draw_affine(const AffineSpec& spec, const Index3& size, bool flat, Draws draws) {
  AffineNumbers numbers;
  if (!draws.happens(spec.probability)) return affine(kIdentity3, {});
  for (int axis = 0; axis < (flat ? 1 : 3); ++axis)
    numbers.rotation_degrees[axis] = draws.symmetric(spec.rotation_degrees);
  for (int axis = flat; axis < 3; ++axis) numbers.scale[axis] = draws.log_uniform(spec.scale.low, spec.scale.high);
  for (int pair = flat ? 2 : 0; pair < 3; ++pair) numbers.shear_degrees[pair] = draws.symmetric(spec.shear_degrees);
  for (int axis = flat; axis < 3; ++axis) numbers.translation[axis] = draws.symmetric(spec.translation);
  return affine_about_centre(size, numbers);
}

// The depth of a slice does not move: its control points are the same all along the depth, and 0 in that direction.
Elastic draw_elastic(const ElasticSpec& spec, const Index3& size, const Box& box, bool flat, Draws draws) {
  Elastic elastic;
  if (!draws.happens(spec.probability)) return elastic;
  const double limit = draws.uniform(spec.magnitude.low, spec.magnitude.high);
  if (limit == 0.0) return elastic;
  int64_t all = 1;
  for (size_t axis = 0; axis < 3; ++axis) {
    elastic.spacing[axis] = spec.spacing;
    elastic.points[axis] = static_cast<int64_t>(static_cast<double>(size[axis] - 1) / spec.spacing) + 4;
    all *= elastic.points[axis];
  }
  elastic.shift.resize(static_cast<size_t>(3 * all));
  const int64_t plane = all / elastic.points[0];
  for (int64_t axis = flat; axis < 3; ++axis) {
    float* shift = elastic.shift.data() + axis * all;
    const size_t a = static_cast<size_t>(axis);
    const double voxels = limit * static_cast<double>(box.upper[a] - box.lower[a]) / static_cast<double>(size[a]);
    for (int64_t point = 0; point < all; ++point)
      shift[point] = flat && point >= plane ? shift[point - plane] : static_cast<float>(draws.symmetric(voxels));
  }
  return elastic;
}

void draw_flips_and_turns(const View& view, Draws draws, ViewPlan& plan) {
  for (size_t axis = 0; axis < 3; ++axis) plan.flips[axis] = draws.happens(view.flips[axis]);
  if (view.quarter_turns) plan.quarter_turns = static_cast<int32_t>(draws.integer(0, 3));
}

}  // namespace

Planner::Planner(ViewSpec spec, std::vector<CaseRow> cases, PlannerOptions options)
    : spec_(std::move(spec)), cases_(std::move(cases)), options_(std::move(options)), order_(box_order(spec_)),
      dealing_(
          [this] {
            std::vector<int32_t> groups;
            for (const CaseRow& row : cases_) groups.push_back(row.group);
            return groups;
          }(),
          options_.weights, options_.seed, options_.crops_per_visit) {
  if (cases_.empty()) throw std::invalid_argument("planner: no case");
  for (const CaseRow& row : cases_)
    if (options_.foreground > 0.0 && row.foreground.empty()) throw std::invalid_argument("planner: a case without places");
  for (const char* split : {"train", "validation"}) check_streams(split);
}

// Two purposes of one hash would draw the same numbers.
void Planner::check_streams(const std::string& split) const {
  const std::lock_guard lock(mutex_);
  if (checked_.count(split)) return;
  std::vector<std::string> names = Dealing::streams(options_.weights.size());
  std::set<std::string> shared;
  names.push_back("crop");
  for (const View& view : spec_.views) {
    for (const char* purpose : {"box", "affine", "elastic", "flips"}) names.push_back(of(view, purpose));
    for (const OrderEntry& entry : view.order) {
      if (!view.same_choice || shared.insert(entry.name).second) names.push_back(choice_stream(view, entry));
      for (const StepSpec& step : entry.alternatives) {
        names.push_back(step_stream(view, step));
        names.push_back(voxel_stream(view, step));
      }
    }
  }
  std::map<uint32_t, std::string> seen;
  for (const std::string& name : names) {
    const auto [place, is_new] = seen.emplace(name_hash("/" + name, name_hash(split)), name);
    if (!is_new)
      throw std::invalid_argument("split '" + split + "': '" + place->second + "' and '" + name +
                                  "' would draw the same random numbers; rename one of these views");
  }
  checked_.insert(split);
}

Plan Planner::plan(uint32_t step, uint32_t slot, const std::string& split) const {
  const uint64_t position = uint64_t{step} * static_cast<uint64_t>(options_.global_batch) + slot;
  return plan_of(dealing_.case_of(position, name_hash(split)), step, slot, split);
}

Plan Planner::plan_of(int64_t case_index, uint32_t step, uint32_t slot, const std::string& split) const {
  check_streams(split);
  const Slot place{options_.seed, step, slot, name_hash(split)};
  Plan plan;
  plan.seed = options_.seed;
  plan.step = step;
  plan.slot = slot;
  plan.split = split;
  plan.case_index = case_index;
  const CaseRow& row = cases_.at(static_cast<size_t>(case_index));
  const Foreground foreground{row.foreground, options_.foreground};
  plan.volume = row.shape;
  plan.background = static_cast<float>(row.intensity.background);
  Draws crop = place.draws("crop");
  plan.crop = draw_crop(row.shape, spec_.crop, foreground, crop);
  if (spec_.flat && row.shape[0] > 1)
    plan.position = static_cast<double>(plan.crop.lower[0]) / static_cast<double>(row.shape[0] - 1);
  std::vector<Box> boxes(spec_.views.size());
  for (const int view : order_) {
    Draws draws = place.draws(of(spec_.views[static_cast<size_t>(view)], "box"));
    boxes[static_cast<size_t>(view)] = draw_box(spec_, view, row.shape, plan.crop, boxes, foreground, draws);
  }
  for (size_t view = 0; view < spec_.views.size(); ++view)
    plan.views.push_back(plan_view(spec_.views[view], boxes[view], row, place));
  for (size_t view = 0; view < spec_.views.size(); ++view) {
    const View& declared = spec_.views[view];
    if (!declared.displacement) continue;
    const bool to_view = declared.displacement_to >= 0;
    const ViewPlan* partner = to_view ? &plan.views[static_cast<size_t>(declared.displacement_to)] : nullptr;
    plan.views[view].partner_size = to_view ? partner->size : spec_.crop;
    plan.views[view].from_volume = inverse(to_view ? partner->to_volume : resizing(plan.crop, spec_.crop));
  }
  plan.region = region_of(plan);
  return plan;
}

ViewPlan Planner::plan_view(const View& view, const Box& box, const CaseRow& row, const Slot& slot) const {
  ViewPlan plan;
  plan.name = view.name;
  plan.size = view.size;
  plan.box = box;
  plan.clean = view.clean;
  plan.displacement = view.displacement;
  draw_flips_and_turns(view, slot.draws(of(view, "flips")), plan);
  plan.to_volume = resizing(box, view.size);
  if (view.affine)
    plan.to_volume = compose(
        plan.to_volume, draw_affine(*view.affine, view.size, spec_.flat, slot.draws(of(view, "affine"))));
  plan.to_volume = compose(plan.to_volume, flips_and_turns(view.size, plan.flips, plan.quarter_turns));
  if (view.elastic)
    plan.elastic = draw_elastic(*view.elastic, view.size, box, spec_.flat, slot.draws(of(view, "elastic")));
  plan.antialias = antialias_of(plan.to_volume);
  plan.steps = draw_steps(
      view, row.intensity, [&](const std::string& purpose) { return slot.draws(purpose); },
      [&](const std::string& purpose) { return slot.stream(purpose); });
  return plan;
}

}  // namespace voxtrast
