// DALI operator: one view of each slot, from its region and its plan; what it does stands in csrc/view/view.h.
#include <dali/pipeline/operator/operator.h>

#include "../view/view.h"
#include "operators.h"

namespace voxtrast {
namespace {

class VoxtrastView : public dali::Operator<dali::CPUBackend> {
 public:
  explicit VoxtrastView(const dali::OpSpec& spec)
      : dali::Operator<dali::CPUBackend>(spec), view_(spec.GetArgument<int>("view")),
        dimensions_(spec.GetArgument<int>("dimensions")), clean_(spec.GetArgument<bool>("clean")),
        displacement_(spec.GetArgument<bool>("displacement")), mask_(spec.GetArgument<bool>("mask")),
        labels_(spec.GetArgument<bool>("labels")), workspaces_(num_threads_) {
    DALI_ENFORCE(dimensions_ == 2 || dimensions_ == 3, "voxtrast_view: dimensions must be 2 or 3");
  }

  static int outputs(const dali::OpSpec& spec) {
    return 1 + spec.GetArgument<bool>("clean") + spec.GetArgument<bool>("displacement") +
           spec.GetArgument<bool>("mask");
  }

 protected:
  bool SetupImpl(std::vector<dali::OutputDesc>& output, const dali::Workspace& workspace) override {
    const auto& regions = workspace.Input<dali::CPUBackend>(0);
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

  void RunImpl(dali::Workspace& workspace) override {
    const auto& regions = workspace.Input<dali::CPUBackend>(0);
    for_each_slot(workspace, [&](int slot, int thread) {
      const Plan& plan = plans_[slot];
      int next = 0;
      const auto take = [&](bool wanted) {
        return wanted ? workspace.Output<dali::CPUBackend>(next++).mutable_tensor<float>(slot) : nullptr;
      };
      ViewOutput output;
      output.view = take(true);
      output.clean = take(clean_);
      output.displacement = take(displacement_);
      output.mask = take(mask_);
      const VoxelType type = regions.type() == DALI_FLOAT ? VoxelType::float32 : VoxelType::float16;
      const Region region = {regions.raw_tensor(slot), type, plan.region, plan.volume,
                             labels_ ? 0.0f : plan.background};
      make_view(region, plan.views[view_], {plan.seed, plan.slot, plan.step},
                labels_ ? Interpolation::nearest : Interpolation::linear, output, workspaces_[thread]);
    });
  }

 private:
  // Of the plan of a slot, which must fit the region. Labels go through the geometry alone.
  const ViewPlan& checked_view(int slot, const dali::TensorList<dali::CPUBackend>& regions) {
    Plan& plan = plans_[slot];
    DALI_ENFORCE(view_ >= 0 && view_ < static_cast<int>(plan.views.size()),
                 dali::make_string("voxtrast_view: there is no view ", view_, " in a plan of ", plan.views.size()));
    ViewPlan& view = plan.views[view_];
    DALI_ENFORCE(dimensions_ == 3 || view.size[0] == 1,
                 dali::make_string("voxtrast_view: view ", view.name, " has depth ", view.size[0], ", not 2 dimensions"));
    for (int axis = 0; axis < 3; ++axis)
      DALI_ENFORCE(regions[slot].shape().sample_dim() == 3 &&
                       regions[slot].shape()[axis] == plan.region.upper[axis] - plan.region.lower[axis],
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
  std::vector<ViewWorkspace> workspaces_;
};

}  // namespace
}  // namespace voxtrast

namespace dali {  // where the macros expect to be

DALI_REGISTER_OPERATOR(VoxtrastView, ::voxtrast::VoxtrastView, CPU);

DALI_SCHEMA(VoxtrastView)
    .DocStr("A view of a region by its plan: float32 (D, H, W), or (H, W). Inputs: the region and the plan. Outputs: "
            "the view, and in this order what else is asked for.")
    .NumInput(2)
    .OutputFn(::voxtrast::VoxtrastView::outputs)
    .AddArg("view", "Which view of the plan.", DALI_INT32)
    .AddOptionalArg("dimensions", "3, or 2 for views of depth 1 given without it.", 3)
    .AddOptionalArg("clean", "Also the view before its steps.", false)
    .AddOptionalArg("displacement", "Also the field psi (3 or 2, ...), in voxels.", false)
    .AddOptionalArg("mask", "Also where psi is valid: 1 or 0.", false)
    .AddOptionalArg("labels", "The region holds labels: nearest neighbours, no steps, background 0.", false);

}  // namespace dali
