// The planner for Python: engine/data/planner.py is its face.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>

#include "affine.h"
#include "boxes.h"
#include "declared.h"
#include "planner.h"

namespace py = pybind11;
using namespace py::literals;

namespace voxtrast {

namespace {

template <typename T>
using Table = py::array_t<T, py::array::c_style | py::array::forcecast>;

template <typename T, typename Numbers>
py::array_t<T> array(const Numbers& numbers, std::vector<py::ssize_t> shape) {
  py::array_t<T> result(std::move(shape));
  std::copy(numbers.begin(), numbers.end(), result.mutable_data());
  return result;
}

py::tuple box_tuple(const Box& box) { return py::make_tuple(py::tuple(py::cast(box.lower)), py::tuple(py::cast(box.upper))); }

Index3 shape_at(const Table<int64_t>& shapes, py::ssize_t row) {
  return {shapes.at(row, 0), shapes.at(row, 1), shapes.at(row, 2)};
}

std::vector<std::string> unusable_shapes(const ViewSpec& spec, const Table<int64_t>& shapes) {
  std::vector<std::string> reasons;
  for (py::ssize_t row = 0; row < shapes.shape(0); ++row) reasons.push_back(unusable(spec, shape_at(shapes, row)));
  return reasons;
}

std::unique_ptr<Planner> make_planner(const ViewSpec& spec, const Table<int64_t>& shapes,
                                      const Table<double>& intensities, const std::vector<int32_t>& groups,
                                      const std::vector<double>& weights, uint64_t seed, int64_t global_batch,
                                      int64_t crops_per_visit, double foreground,
                                      const std::vector<std::vector<Index3>>& places) {
  if (shapes.ndim() != 2 || shapes.shape(1) != 3 || intensities.ndim() != 2 || intensities.shape(1) != 3 ||
      intensities.shape(0) != shapes.shape(0) || static_cast<py::ssize_t>(groups.size()) != shapes.shape(0) ||
      static_cast<py::ssize_t>(places.size()) != shapes.shape(0))
    throw std::invalid_argument(
        "cases: expected (n, 3) shapes, (n, 3) intensities (low, high, background), n groups, n lists of places");
  std::vector<CaseRow> cases;
  for (py::ssize_t row = 0; row < shapes.shape(0); ++row)
    cases.push_back({shape_at(shapes, row),
                     {intensities.at(row, 0), intensities.at(row, 1), intensities.at(row, 2)},
                     groups[static_cast<size_t>(row)],
                     places[static_cast<size_t>(row)]});
  return std::make_unique<Planner>(spec, std::move(cases),
                                   PlannerOptions{seed, global_batch, crops_per_visit, weights, foreground});
}

py::bytes plan_bytes(const Plan& plan) {
  const std::vector<uint8_t> bytes = encode(plan);
  return py::bytes(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

Plan plan_of_bytes(const py::bytes& bytes) {
  const std::string_view view = bytes;
  return decode(reinterpret_cast<const uint8_t*>(view.data()), view.size());
}

py::array_t<float> control_points(const Elastic& elastic) {
  const Index3& points = elastic.points;
  return array<float>(elastic.shift, {3, points[0], points[1], points[2]});
}

void bind_plan(py::module_& module) {
  py::class_<Step>(module, "Step")
      .def_property_readonly("kind", [](const Step& step) { return step_name(step.kind); })
      .def_readonly("stream", &Step::stream)
      .def_property_readonly("numbers", [](const Step& step) {
        return array<float>(step.numbers, {static_cast<py::ssize_t>(step.numbers.size())});
      })
      .def_property_readonly("boxes", [](const Step& step) {
        return array<int32_t>(step.boxes, {static_cast<py::ssize_t>(step.boxes.size() / 6), 6});
      });
  py::class_<ViewPlan>(module, "ViewPlan")
      .def_readonly("name", &ViewPlan::name)
      .def_property_readonly("size", [](const ViewPlan& view) { return py::tuple(py::cast(view.size)); })
      .def_property_readonly("box", [](const ViewPlan& view) { return box_tuple(view.box); })
      .def_property_readonly("flips", [](const ViewPlan& view) { return py::tuple(py::cast(view.flips)); })
      .def_readonly("quarter_turns", &ViewPlan::quarter_turns)
      .def_readonly("clean", &ViewPlan::clean)
      .def_readonly("displacement", &ViewPlan::displacement)
      .def_property_readonly("to_volume", [](const ViewPlan& view) { return array<double>(view.to_volume, {3, 4}); })
      .def_property_readonly("from_volume",
                             [](const ViewPlan& view) { return array<double>(view.from_volume, {3, 4}); })
      .def_property_readonly("partner_size",
                             [](const ViewPlan& view) { return py::tuple(py::cast(view.partner_size)); })
      .def_property_readonly("spacing",
                             [](const ViewPlan& view) { return py::tuple(py::cast(view.elastic.spacing)); })
      .def_property_readonly("control_points", [](const ViewPlan& view) { return control_points(view.elastic); })
      .def_property_readonly("antialias", [](const ViewPlan& view) { return py::tuple(py::cast(view.antialias)); })
      .def_readonly("steps", &ViewPlan::steps);
  py::class_<Plan>(module, "Plan")
      .def_readonly("seed", &Plan::seed)
      .def_readonly("step", &Plan::step)
      .def_readonly("slot", &Plan::slot)
      .def_readonly("split", &Plan::split)
      .def_readonly("case_index", &Plan::case_index)
      .def_property_readonly("volume", [](const Plan& plan) { return py::tuple(py::cast(plan.volume)); })
      .def_readonly("background", &Plan::background)
      .def_property_readonly("crop", [](const Plan& plan) { return box_tuple(plan.crop); })
      .def_readonly("position", &Plan::position)
      .def_property_readonly("region", [](const Plan& plan) { return box_tuple(plan.region); })
      .def_readonly("views", &Plan::views)
      .def("to_bytes", &plan_bytes)
      .def_static("from_bytes", &plan_of_bytes)
      .def("describe", [](const Plan& plan) { return describe(plan); });
}

// The numbers themselves, for tests of their distributions.
void bind_draws(py::module_& module) {
  module.def("philox", [](uint64_t seed, uint32_t block, uint32_t stream, uint32_t slot, uint32_t step) {
    const Random4 random = philox(seed, block, stream, slot, step);
    return std::vector<uint32_t>(random.word, random.word + 4);
  }, "seed"_a, "block"_a, "stream"_a, "slot"_a, "step"_a);
  module.def("name_hash", [](const std::string& name) { return name_hash(name); });
  const auto drawn = [](py::ssize_t count, auto draw) {
    py::array_t<double> numbers(count);
    for (py::ssize_t i = 0; i < count; ++i) numbers.mutable_at(i) = static_cast<double>(draw());
    return numbers;
  };
  py::class_<Draws>(module, "Draws")
      .def(py::init<uint64_t, uint32_t, uint32_t, uint32_t>(), "seed"_a, "stream"_a, "slot"_a, "step"_a)
      .def("uniform", [drawn](Draws& draws, py::ssize_t n) { return drawn(n, [&] { return draws.uniform(); }); })
      .def("normal", [drawn](Draws& draws, py::ssize_t n) { return drawn(n, [&] { return draws.normal(); }); })
      .def("integer", [drawn](Draws& draws, int64_t low, int64_t high, py::ssize_t n) {
        py::array_t<int64_t> numbers(n);
        for (py::ssize_t i = 0; i < n; ++i) numbers.mutable_at(i) = draws.integer(low, high);
        return numbers;
      });
}

}  // namespace

PYBIND11_MODULE(voxtrast_geometry, module) {
  bind_plan(module);
  bind_draws(module);
  py::class_<ViewSpec>(module, "ViewSpec").def(py::init(&declared_spec));
  module.def("unusable", &unusable_shapes, "spec"_a, "shapes"_a);
  py::class_<Planner>(module, "Planner")
      .def(py::init(&make_planner), "spec"_a, "shapes"_a, "intensities"_a, "groups"_a, "weights"_a, "seed"_a,
           "global_batch"_a, "crops_per_visit"_a, "foreground"_a, "places"_a)
      .def("plan", &Planner::plan, "step"_a, "slot"_a, "split"_a, py::call_guard<py::gil_scoped_release>())
      .def("plan_of", &Planner::plan_of, "case_index"_a, "step"_a, "slot"_a, "split"_a,
           py::call_guard<py::gil_scoped_release>())
      .def_property_readonly("visits_in_a_block", &Planner::visits_in_a_block);
  module.def("affine_about_centre", [](const Index3& size, const Vector3& rotation_degrees, const Vector3& scale,
                                       const Vector3& shear_degrees, const Vector3& translation) {
    return array<double>(affine_about_centre(size, {rotation_degrees, scale, shear_degrees, translation}), {3, 4});
  }, "size"_a, py::kw_only(), "rotation_degrees"_a, "scale"_a, "shear_degrees"_a, "translation"_a);
  module.def("bezier_table", &bezier_table, "points"_a, "reversed"_a);
}

}  // namespace voxtrast
