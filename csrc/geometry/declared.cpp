#include "declared.h"

#include <pybind11/stl.h>

#include <sstream>
#include <stdexcept>

#include "boxes.h"
#include "planner.h"

namespace py = pybind11;

namespace voxtrast {

namespace {

Range range_of(const py::object& pair) {
  const auto ends = pair.cast<std::vector<double>>();
  if (ends.size() != 2) throw std::invalid_argument("a range has a low and a high end");
  return {ends[0], ends[1]};
}

std::optional<Range> maybe_range(const py::object& pair) {
  if (pair.is_none()) return std::nullopt;
  return range_of(pair);
}

// Two axes get a depth of one voxel.
template <typename T>
std::array<T, 3> three_axes(const py::object& numbers, T depth) {
  auto axes = numbers.cast<std::vector<T>>();
  if (axes.size() == 2) axes.insert(axes.begin(), depth);
  if (axes.size() != 3) throw std::invalid_argument("expected one number an axis");
  return {axes[0], axes[1], axes[2]};
}

struct Names {
  std::vector<std::string> all;

  int index(const std::string& name) const {
    for (size_t i = 0; i < all.size(); ++i)
      if (all[i] == name) return static_cast<int>(i);
    throw std::invalid_argument("view '" + name + "' is not declared");
  }
  int index(const py::object& name) const { return name.is_none() ? -1 : index(name.cast<std::string>()); }
};

BoxSpec box_of(const py::object& declared, const Names& names) {
  BoxSpec box;
  for (const py::handle sides : declared.attr("sides"))
    box.sides.push_back(three_axes<int64_t>(py::reinterpret_borrow<py::object>(sides), 1));
  box.scale = maybe_range(declared.attr("scale"));
  box.aspect = maybe_range(declared.attr("aspect"));
  box.iou_with = names.index(py::object(declared.attr("iou_with")));
  box.iou = range_of(declared.attr("iou"));
  for (const auto& name : declared.attr("near").cast<std::vector<std::string>>()) box.near.push_back(names.index(name));
  box.margin = declared.attr("margin_voxels").cast<int64_t>();
  box.inside = names.index(py::object(declared.attr("inside")));
  return box;
}

BoxesSpec boxes_of(const py::object& declared) {
  BoxesSpec boxes;
  boxes.count = declared.attr("count").cast<int64_t>();
  boxes.least = declared.attr("least").cast<int64_t>();
  boxes.go_on = declared.attr("go_on").cast<double>();
  boxes.side = range_of(declared.attr("side"));
  for (const py::handle pair : declared.attr("side_voxels"))
    boxes.side_voxels.push_back(range_of(py::reinterpret_borrow<py::object>(pair)));
  if (boxes.side_voxels.size() == 2) boxes.side_voxels.insert(boxes.side_voxels.begin(), Range{1.0, 1.0});
  return boxes;
}

StepKind kind_of(const std::string& name) {
  for (int kind = 0; kind <= static_cast<int>(StepKind::cut_out_outside); ++kind)
    if (name == step_name(static_cast<StepKind>(kind))) return static_cast<StepKind>(kind);
  throw std::invalid_argument("step '" + name + "' is unknown");
}

StepSpec step_of(const std::string& name, const py::object& declared) {
  StepSpec step;
  step.kind = kind_of(name);
  step.name = name;
  step.probability = declared.attr("probability").cast<double>();
  for (const char* field : {"sigma_voxels", "factor", "shift", "exponent"})
    if (py::hasattr(declared, field)) step.range = range_of(declared.attr(field));
  if (step.kind == StepKind::noise) step.range = range_of(declared.attr("std"));
  if (step.kind == StepKind::brightness) step.std = declared.attr("std").cast<double>();
  if (step.kind == StepKind::bias_field) step.range.high = declared.attr("coefficient").cast<double>();
  if (py::hasattr(declared, "invert")) step.invert = declared.attr("invert").cast<double>();
  if (py::hasattr(declared, "value")) step.value = declared.attr("value").cast<double>();
  if (py::hasattr(declared, "side")) step.boxes = boxes_of(declared);
  return step;
}

std::vector<OrderEntry> order_of(const py::object& appearance) {
  std::vector<OrderEntry> order;
  for (const auto& entry : appearance.attr("order").cast<std::vector<std::string>>()) {
    OrderEntry alternatives{entry, {}};
    std::istringstream names(entry);
    for (std::string name; std::getline(names, name, '|');)
      alternatives.alternatives.push_back(step_of(name, appearance.attr(name.c_str())));
    order.push_back(alternatives);
  }
  return order;
}

View view_of(const std::string& name, const py::object& declared, const Index3& crop, const Names& names) {
  View view;
  view.name = name;
  view.size = declared.attr("size").is_none() ? crop : three_axes<int64_t>(declared.attr("size"), 1);
  if (const py::object box = declared.attr("box"); !box.is_none()) view.box = box_of(box, names);
  if (const py::object affine = declared.attr("affine"); !affine.is_none())
    view.affine = AffineSpec{affine.attr("rotation_degrees").cast<double>(), range_of(affine.attr("scale")),
                             affine.attr("shear_degrees").cast<double>(),
                             affine.attr("translation_voxels").cast<double>(),
                             affine.attr("probability").cast<double>()};
  if (const py::object elastic = declared.attr("elastic"); !elastic.is_none())
    view.elastic = ElasticSpec{elastic.attr("spacing_voxels").cast<double>(),
                               range_of(elastic.attr("magnitude_voxels")),
                               elastic.attr("probability").cast<double>()};
  if (py::len(declared.attr("flips"))) view.flips = three_axes<double>(declared.attr("flips"), 0.0);
  view.quarter_turns = declared.attr("quarter_turns").cast<bool>();
  if (const py::object appearance = declared.attr("appearance"); !appearance.is_none()) {
    view.order = order_of(appearance);
    view.same_choice = appearance.attr("same_choice").cast<bool>();
  }
  view.clean = declared.attr("clean").cast<bool>();
  view.displacement = declared.attr("displacement").cast<bool>();
  view.displacement_to = names.index(py::object(declared.attr("displacement_to")));
  return view;
}

}  // namespace

ViewSpec declared_spec(const py::object& declared) {
  ViewSpec spec;
  spec.flat = py::len(declared.attr("crop")) == 2;
  spec.crop = three_axes<int64_t>(py::list(declared.attr("crop")), 1);
  const py::dict views = declared.attr("views");
  Names names;
  for (const auto& [name, view] : views) names.all.push_back(name.cast<std::string>());
  for (const auto& [name, view] : views)
    spec.views.push_back(
        view_of(name.cast<std::string>(), py::reinterpret_borrow<py::object>(view), spec.crop, names));
  box_order(spec);
  return spec;
}

}  // namespace voxtrast
