// DALI operator: one view of each slot, from its region and its plan; what it does stands in csrc/view/view.h. On a GPU: cuda/.
#include "view_operator.h"

namespace voxtrast {
namespace {

class VoxtrastView : public ViewOperator<dali::CPUBackend> {
 public:
  explicit VoxtrastView(const dali::OpSpec& spec)
      : ViewOperator<dali::CPUBackend>(spec), workspaces_(num_threads_) {}

  static int outputs(const dali::OpSpec& spec) {
    return 1 + spec.GetArgument<bool>("clean") + spec.GetArgument<bool>("displacement") +
           spec.GetArgument<bool>("mask");
  }

 protected:
  void RunImpl(dali::Workspace& workspace) override {
    for_each_slot(workspace, [&](int slot, int thread) {
      make_view(region_of(slot, workspace), view_of(slot), key_of(slot), interpolation(), output_of(slot, workspace),
                workspaces_[thread]);
    });
  }

 private:
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
    .InputDevice(1, InputDevice::CPU)
    .OutputFn(::voxtrast::VoxtrastView::outputs)
    .AddArg("view", "Which view of the plan.", DALI_INT32)
    .AddOptionalArg("dimensions", "3, or 2 for views of depth 1 given without it.", 3)
    .AddOptionalArg("clean", "Also the view before its steps.", false)
    .AddOptionalArg("displacement", "Also the field psi (3 or 2, ...), in voxels.", false)
    .AddOptionalArg("mask", "Also where psi is valid: 1 or 0.", false)
    .AddOptionalArg("labels", "The region holds labels: nearest neighbours, no steps, background 0.", false);

}  // namespace dali
