// What DALI's operator of views is on every device: its arguments, and the shapes of its outputs.
#pragma once

#include <dali/pipeline/operator/operator.h>

#include <vector>

#include "../view/view.h"
#include "operators.h"

namespace voxtrast {

// Inputs: regions on the operator's device, plans on the host.
template <typename Backend>
class ViewOperator : public dali::Operator<Backend> {
 public:
  explicit ViewOperator(const dali::OpSpec& spec)
      : dali::Operator<Backend>(spec), view_(spec.GetArgument<int>("view")),
        dimensions_(spec.GetArgument<int>("dimensions")), clean_(spec.GetArgument<bool>("clean")),
        displacement_(spec.GetArgument<bool>("displacement")), mask_(spec.GetArgument<bool>("mask")),
        labels_(spec.GetArgument<bool>("labels")) {
    DALI_ENFORCE(dimensions_ == 2 || dimensions_ == 3, "voxtrast_view: dimensions must be 2 or 3");
  }

 protected:
  bool SetupImpl(std::vector<dali::OutputDesc>& output, const dali::Workspace& workspace) override {
    const auto& regions = workspace.Input<Backend>(0);
    DALI_ENFORCE(regions.type() == DALI_FLOAT || regions.type() == DALI_FLOAT16,
                 "voxtrast_view: a region is float32 or float16");
    plans_ = decode_plans(workspace.Input<dali::CPUBackend>(1));
    const int slots = regions.num_samples();
    dali::TensorListShape<> image(slots, dimensions_), field(slots, dimensions_ + 1);
    for (int slot = 0; slot < slots; ++slot) {
      const ViewPlan& view = checked_view(slot, regions);
      field.tensor_shape_span(slot)[0] = view.size[0] == 1 ? 2 : 3;
      for (int axis = 0; axis < dimensions_; ++axis) {
        const int64_t side = view.size[3 - dimensions_ + axis];
        image.tensor_shape_span(slot)[axis] = side;
        field.tensor_shape_span(slot)[axis + 1] = side;
      }
    }
    output.clear();
    output.push_back({image, DALI_FLOAT});
    if (clean_) output.push_back({image, DALI_FLOAT});
    if (displacement_) output.push_back({field, DALI_FLOAT});
    if (mask_) output.push_back({image, DALI_FLOAT});
    return true;
  }

  const ViewPlan& view_of(int slot) const { return plans_[slot].views[view_]; }

  Region region_of(int slot, const dali::Workspace& workspace) const {
    const auto& regions = workspace.Input<Backend>(0);
    const Plan& plan = plans_[slot];
    const VoxelType type = regions.type() == DALI_FLOAT ? VoxelType::float32 : VoxelType::float16;
    return {regions.raw_tensor(slot), type, plan.region, plan.volume, labels_ ? 0.0f : plan.background};
  }

  DrawKey key_of(int slot) const { return {plans_[slot].seed, plans_[slot].slot, plans_[slot].step}; }

  ViewOutput output_of(int slot, dali::Workspace& workspace) const {
    int next = 0;
    const auto take = [&](bool wanted) {
      return wanted ? workspace.Output<Backend>(next++).template mutable_tensor<float>(slot) : nullptr;
    };
    ViewOutput output;
    output.view = take(true);
    output.clean = take(clean_);
    output.displacement = take(displacement_);
    output.mask = take(mask_);
    return output;
  }

  Interpolation interpolation() const { return labels_ ? Interpolation::nearest : Interpolation::linear; }

 private:
  // Of the plan of a slot, which must fit the region. Labels go through the geometry alone.
  const ViewPlan& checked_view(int slot, const dali::TensorList<Backend>& regions) {
    Plan& plan = plans_[slot];
    DALI_ENFORCE(view_ >= 0 && view_ < static_cast<int>(plan.views.size()),
                 dali::make_string("voxtrast_view: there is no view ", view_, " in a plan of ", plan.views.size()));
    ViewPlan& view = plan.views[view_];
    DALI_ENFORCE(dimensions_ == 3 || view.size[0] == 1,
                 dali::make_string("voxtrast_view: view ", view.name, " has depth ", view.size[0], ", not 2 dimensions"));
    const auto shape = regions.shape().tensor_shape_span(slot);
    for (int axis = 0; axis < 3; ++axis)
      DALI_ENFORCE(regions.sample_dim() == 3 && shape[axis] == plan.region.upper[axis] - plan.region.lower[axis],
                   "voxtrast_view: a region has another shape than its plan says");
    if (labels_) {
      view.steps.clear();
      view.antialias = {};
    }
    return view;
  }

  const int view_, dimensions_;
  const bool clean_, displacement_, mask_, labels_;
  std::vector<Plan> plans_;
};

}  // namespace voxtrast
