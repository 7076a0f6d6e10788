// voxtrast::compose_displacement on CUDA: warp and sum in one pass. Its gradients are those of warp.
#include "tensors.cuh"
#include "warp.cuh"

namespace voxtrast {
namespace {

Tensor compose_displacement(const Tensor& outer_given, const Tensor& inner_given) {
  const torch::stable::accelerator::DeviceGuard guard(outer_given.get_device_index());
  const Tensor outer = torch::stable::contiguous(outer_given);
  const Tensor inner = torch::stable::contiguous(inner_given);
  Tensor output = torch::stable::new_empty(outer, outer.sizes());
  with_dimensions(outer, "outer", [&](auto dimensions) {
    constexpr int D = decltype(dimensions)::value;
    STD_TORCH_CHECK(outer.size(1) == D, "voxtrast: outer must have ", D, " components, got ", outer.size(1));
    const Volume<D> volume = volume_of<D>(outer);
    const int64_t batch = outer.size(0);
    const float* fields = float_data(outer, batch * D * volume.points, outer, "outer");
    const float* shift = float_data(inner, outer.numel(), outer, "inner");
    run_sample<float, D, true>(volume, batch, D, fields, shift, mutable_data<float>(output), Launch(outer));
  });
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(voxtrast, CUDA, library) {
  library.impl("compose_displacement", TORCH_BOX(&compose_displacement));
}

}  // namespace voxtrast
