// The same operator on a GPU: plans are decoded on the host, which packs what the kernels need into one block.
#include "../view_operator.h"

#include "../../view/cuda/gpu_views.h"

namespace voxtrast {
namespace {

class GpuVoxtrastView : public ViewOperator<dali::GPUBackend> {
 public:
  using ViewOperator<dali::GPUBackend>::ViewOperator;

 protected:
  void RunImpl(dali::Workspace& workspace) override {
    std::vector<ViewSlot> slots;
    for (int slot = 0; slot < workspace.GetInputBatchSize(0); ++slot)
      slots.push_back({region_of(slot, workspace), &view_of(slot), key_of(slot), interpolation(),
                       output_of(slot, workspace)});
    if (!slots.empty()) views_.make(slots, workspace.stream());
  }

 private:
  GpuViews views_;
};

}  // namespace
}  // namespace voxtrast

namespace dali {  // where the macros expect to be

DALI_REGISTER_OPERATOR(VoxtrastView, ::voxtrast::GpuVoxtrastView, GPU);

}  // namespace dali
