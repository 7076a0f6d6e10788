// DALI operator: the voxels that the views of a slot look at, read from the open file of its volume.
#include <dali/pipeline/operator/operator.h>

#include "operators.h"
#include "../view/read_region.h"

namespace voxtrast {
namespace {

class VoxtrastRead : public dali::Operator<dali::CPUBackend> {
 public:
  explicit VoxtrastRead(const dali::OpSpec& spec)
      : dali::Operator<dali::CPUBackend>(spec), half_(spec.GetArgument<bool>("half")),
        labels_(spec.GetArgument<bool>("labels")) {}

 protected:
  bool SetupImpl(std::vector<dali::OutputDesc>& output, const dali::Workspace& workspace) override {
    const auto& files = workspace.Input<dali::CPUBackend>(0);
    const auto& plans = workspace.Input<dali::CPUBackend>(1);
    const int slots = files.num_samples();
    plans_ = decode_plans(plans);
    volumes_.resize(slots);
    dali::TensorListShape<> shape(slots, 3);
    for (int slot = 0; slot < slots; ++slot) {
      DALI_ENFORCE(files.type() == DALI_INT64 && files[slot].shape().num_elements() == 3,
                   "voxtrast_read: a file is three int64: descriptor, offset of the first voxel, type");
      const auto* file = static_cast<const int64_t*>(files.raw_tensor(slot));
      const Plan& plan = plans_[slot];
      volumes_[slot] = {static_cast<int>(file[0]), file[1], static_cast<StoredType>(file[2]), plan.volume};
      for (int axis = 0; axis < 3; ++axis)
        shape.tensor_shape_span(slot)[axis] = plan.region.upper[axis] - plan.region.lower[axis];
    }
    output = {{shape, half_ ? DALI_FLOAT16 : DALI_FLOAT}};
    return true;
  }

  void RunImpl(dali::Workspace& workspace) override {
    auto& output = workspace.Output<dali::CPUBackend>(0);
    output.SetLayout("DHW");
    for_each_slot(workspace, [&](int slot, int) {
      const Plan& plan = plans_[slot];
      try {
        read_region(volumes_[slot], plan.region, labels_ ? 0.0f : plan.background,
                    half_ ? VoxelType::float16 : VoxelType::float32, output.raw_mutable_tensor(slot));
      } catch (const std::runtime_error& error) {  // whose fault it is, for engine/data/pipeline.py
        throw std::runtime_error("[case " + std::to_string(plan.case_index) + "] " + error.what());
      }
    });
  }

 private:
  const bool half_, labels_;
  std::vector<Plan> plans_;
  std::vector<StoredVolume> volumes_;
};

}  // namespace
}  // namespace voxtrast

namespace dali {  // where the macros expect to be

DALI_REGISTER_OPERATOR(VoxtrastRead, ::voxtrast::VoxtrastRead, CPU);

DALI_SCHEMA(VoxtrastRead)
    .DocStr("The region of a plan, (D, H, W), read from an open file; background outside the volume. Inputs: the file "
            "as int64 (descriptor, offset of the first voxel in bytes, type as in STORED_TYPES), and the plan.")
    .NumInput(2)
    .NumOutput(1)
    .AddOptionalArg("half", "The output is float16, of float16 volumes; otherwise it is float32.", false)
    .AddOptionalArg("labels", "Labels are read: their background is 0.", false);

}  // namespace dali
