#include "boxes.h"

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "overlap.h"

namespace voxtrast {

namespace {

std::string text(const Index3& sides) {
  return std::to_string(sides[0]) + "x" + std::to_string(sides[1]) + "x" + std::to_string(sides[2]);
}

std::string text(const Range& range) {
  char buffer[64];
  std::snprintf(buffer, sizeof buffer, "%.3g to %.3g", range.low, range.high);
  return buffer;
}

Box box_at(const Index3& lower, const Index3& sides) {
  return {lower, {lower[0] + sides[0], lower[1] + sides[1], lower[2] + sides[2]}};
}

Index3 sides_of(const Box& box) {
  return {box.upper[0] - box.lower[0], box.upper[1] - box.lower[1], box.upper[2] - box.lower[2]};
}

// A volume that covers less than half of a box on some axis would be mostly padding.
bool covers_half(const Index3& volume, const Index3& sides) {
  return 2 * volume[0] >= sides[0] && 2 * volume[1] >= sides[1] && 2 * volume[2] >= sides[2];
}

bool fits(const Index3& sides, const Index3& whole) {
  return sides[0] <= whole[0] && sides[1] <= whole[1] && sides[2] <= whole[2];
}

// The sides that a view's box may have in this volume; the slot's crop for a view without a box.
std::vector<Index3> choices(const ViewSpec& spec, int view, const Index3& volume) {
  const auto& box = spec.views[static_cast<size_t>(view)].box;
  if (!box) return {spec.crop};
  std::vector<Index3> usable;
  for (const Index3& sides : box->sides)
    if (covers_half(volume, sides)) usable.push_back(sides);
  return usable;
}

std::vector<int> parents(const View& view) {
  if (!view.box) return {};
  std::vector<int> all = view.box->near;
  if (view.box->iou_with >= 0) all.push_back(view.box->iou_with);
  if (view.box->inside >= 0) all.push_back(view.box->inside);
  return all;
}

void visit(const ViewSpec& spec, int view, std::vector<int>& state, std::vector<int>& order) {
  int& mine = state[static_cast<size_t>(view)];
  const View& declared = spec.views[static_cast<size_t>(view)];
  if (mine == 1) throw std::invalid_argument("view '" + declared.name + "': its box refers to itself in a circle");
  if (mine == 2) return;
  mine = 1;
  for (const int parent : parents(declared)) visit(spec, parent, state, order);
  state[static_cast<size_t>(view)] = 2;
  order.push_back(view);
}

// Fraction `scale` of the whole: in proportion, or in 2-D with H / W of its own.
Index3 scaled_sides(const BoxSpec& box, const Index3& whole, Draws& draws) {
  if (!box.aspect) {
    // The share of the volume is uniform; along each of the axes that a box may differ on, its root.
    const int axes = whole[0] > 1 ? 3 : 2;
    const double factor = std::pow(draws.uniform(box.scale->low, box.scale->high), 1.0 / axes);
    Index3 sides{};
    for (int axis = 0; axis < 3; ++axis)
      sides[axis] = std::clamp<int64_t>(std::llrint(factor * static_cast<double>(whole[axis])), 1, whole[axis]);
    return sides;
  }
  const double height = static_cast<double>(whole[1]), width = static_cast<double>(whole[2]);
  // The largest area that a box of some allowed aspect has inside the whole; the aspects that are left for an area.
  const double largest =
      std::min({height * width, box.aspect->high * width * width, height * height / box.aspect->low});
  const double area = draws.uniform(std::min(box.scale->low * height * width, largest),
                                    std::min(box.scale->high * height * width, largest));
  const double least = std::max(box.aspect->low, area / (width * width));
  const double most = std::max(least, std::min(box.aspect->high, height * height / area));
  const double aspect = draws.log_uniform(least, most);
  return {1, std::clamp<int64_t>(std::llrint(std::sqrt(area * aspect)), 1, whole[1]),
          std::clamp<int64_t>(std::llrint(std::sqrt(area / aspect)), 1, whole[2])};
}

Box bounding_box(const std::vector<int>& views, const std::vector<Box>& boxes) {
  Box all = boxes[static_cast<size_t>(views.front())];
  for (const int view : views)
    for (int axis = 0; axis < 3; ++axis) {
      all.lower[axis] = std::min(all.lower[axis], boxes[static_cast<size_t>(view)].lower[axis]);
      all.upper[axis] = std::max(all.upper[axis], boxes[static_cast<size_t>(view)].upper[axis]);
    }
  return all;
}

// Where the box may begin: inside the volume, and as its relation says.
Starts allowed_starts(const BoxSpec& box, int axis, int64_t volume, int64_t side, const std::vector<Box>& boxes) {
  if (box.inside >= 0) {
    const Box& outer = boxes[static_cast<size_t>(box.inside)];
    return {outer.lower[axis], outer.upper[axis] - side};
  }
  const Starts range = starts(volume, side);
  if (box.near.empty()) return range;
  const Box around = bounding_box(box.near, boxes);
  return {std::clamp(around.lower[axis] - box.margin, range.low, range.high),
          std::clamp(around.upper[axis] - 1 + box.margin, range.low, range.high)};
}

// One of the places, or null where the box is not to be drawn around any. Nobody draws for a probability of 0.
const Index3* drawn_place(const Foreground& foreground, Draws& draws) {
  if (foreground.probability <= 0.0 || !draws.happens(foreground.probability)) return nullptr;
  return &foreground.places[static_cast<size_t>(draws.integer(0, static_cast<int64_t>(foreground.places.size()) - 1))];
}

Starts around(int64_t place, const Starts& range, int64_t side) {
  return {std::clamp(place - 3 * side / 4, range.low, range.high), std::clamp(place - side / 4, range.low, range.high)};
}

Box draw_with_iou(const ViewSpec& spec, int view, const Index3& volume, const Box& other, Draws& draws) {
  const BoxSpec& box = *spec.views[static_cast<size_t>(view)].box;
  std::vector<Index3> left = choices(spec, view, volume);
  while (!left.empty()) {
    const auto chosen = left.begin() + draws.integer(0, static_cast<int64_t>(left.size()) - 1);
    if (const auto drawn = draw_overlapping(volume, *chosen, other, box.iou, draws)) return *drawn;
    left.erase(chosen);
  }
  throw std::logic_error("view '" + spec.views[static_cast<size_t>(view)].name + "': no place for its box");
}

std::string unusable_overlap(const ViewSpec& spec, int view, const Index3& volume) {
  const View& declared = spec.views[static_cast<size_t>(view)];
  const int partner = declared.box->iou_with;
  const std::string& name = spec.views[static_cast<size_t>(partner)].name;
  for (const Index3& other : choices(spec, partner, volume)) {
    Range reach{1.0, 0.0};
    bool found = false;
    for (const Index3& sides : choices(spec, view, volume))
      found |= always_overlaps(volume, sides, other, declared.box->iou, reach);
    if (found) continue;
    return "view '" + declared.name + "': box.iou " + text(declared.box->iou) + " with a box of " + text(other) +
           " voxels of view '" + name + "' in a volume of " + text(volume) + ": its sides reach " + text(reach) +
           " wherever that box lies, in steps of a voxel";
  }
  return {};
}

}  // namespace

Box draw_crop(const Index3& volume, const Index3& sides, const Foreground& foreground, Draws& draws) {
  const Index3* place = drawn_place(foreground, draws);
  Index3 lower{};
  for (int axis = 0; axis < 3; ++axis) {
    Starts range = starts(volume[axis], sides[axis]);
    if (place) range = around((*place)[axis], range, sides[axis]);
    lower[axis] = draws.integer(range.low, range.high);
  }
  return box_at(lower, sides);
}

std::vector<int> box_order(const ViewSpec& spec) {
  std::vector<int> state(spec.views.size()), order;
  for (int view = 0; view < static_cast<int>(spec.views.size()); ++view) visit(spec, view, state, order);
  return order;
}

std::string unusable(const ViewSpec& spec, const Index3& full) {
  const Index3 volume = {spec.flat ? 1 : full[0], full[1], full[2]};
  for (int view = 0; view < static_cast<int>(spec.views.size()); ++view) {
    const View& declared = spec.views[static_cast<size_t>(view)];
    if (!declared.box || declared.box->scale) continue;
    const std::vector<Index3> sides = choices(spec, view, volume);
    if (sides.empty())
      return "view '" + declared.name + "': a volume of " + text(volume) +
             " covers less than half of every box that box.sides names";
    if (declared.box->iou_with >= 0)
      if (std::string reason = unusable_overlap(spec, view, volume); !reason.empty()) return reason;
    if (declared.box->inside < 0) continue;
    for (const Index3& outer : choices(spec, declared.box->inside, volume))
      if (std::none_of(sides.begin(), sides.end(), [&](const Index3& each) { return fits(each, outer); }))
        return "view '" + declared.name + "': no box of box.sides fits into " + text(outer) + " voxels of view '" +
               spec.views[static_cast<size_t>(declared.box->inside)].name + "'";
  }
  return {};
}

Box draw_box(const ViewSpec& spec, int view, const Index3& full, const Box& crop, const std::vector<Box>& boxes,
             const Foreground& foreground, Draws& draws) {
  const auto& box = spec.views[static_cast<size_t>(view)].box;
  if (!box) return crop;
  const Index3 volume = {spec.flat ? 1 : full[0], full[1], full[2]};
  Box drawn;
  if (box->iou_with >= 0) {
    Box other = boxes[static_cast<size_t>(box->iou_with)];
    if (spec.flat) other.lower[0] = 0, other.upper[0] = 1;
    drawn = draw_with_iou(spec, view, volume, other, draws);
  } else {
    const Index3 whole = box->inside < 0 ? volume : sides_of(boxes[static_cast<size_t>(box->inside)]);
    Index3 sides{};
    if (box->scale) {
      sides = scaled_sides(*box, whole, draws);
    } else {
      std::vector<Index3> usable = choices(spec, view, volume);
      if (box->inside >= 0) std::erase_if(usable, [&](const Index3& each) { return !fits(each, whole); });
      sides = usable[static_cast<size_t>(draws.integer(0, static_cast<int64_t>(usable.size()) - 1))];
    }
    const bool anywhere = box->inside < 0 && box->near.empty();
    const Index3* place = anywhere ? drawn_place(foreground, draws) : nullptr;
    Index3 lower{};
    for (int axis = 0; axis < 3; ++axis) {
      Starts range = allowed_starts(*box, axis, volume[axis], sides[axis], boxes);
      if (place) range = around((*place)[axis], range, sides[axis]);
      lower[axis] = draws.integer(range.low, range.high);
    }
    drawn = box_at(lower, sides);
  }
  if (spec.flat) drawn.lower[0] = crop.lower[0], drawn.upper[0] = crop.upper[0];
  return drawn;
}

}  // namespace voxtrast
