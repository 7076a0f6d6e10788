// voxtrast::warped_cosine_loss and its gradients on CUDA.
#include "warped_cosine_loss.cuh"

#include <tuple>

#include "tensors.cuh"

namespace voxtrast {
namespace {

// The tensors, contiguous.
struct Arguments {
  Tensor fixed, moving, displacement, mask;

  Arguments(const Tensor& fixed_given, const Tensor& moving_given, const Tensor& displacement_given,
            const Tensor& mask_given)
      : fixed(torch::stable::contiguous(fixed_given)),
        moving(torch::stable::contiguous(moving_given)),
        displacement(torch::stable::contiguous(displacement_given)),
        mask(torch::stable::contiguous(mask_given)) {
    check_alike(moving, "moving", fixed, "fixed");
  }

  template <typename T, int D>
  Maps<T, D> maps() const {
    const Volume<D> volume = volume_of<D>(fixed);
    const int64_t batch = fixed.size(0);
    return {volume, batch, static_cast<int32_t>(fixed.size(1)), data<T>(fixed), data<T>(moving),
            float_data(displacement, batch * D * volume.points, fixed, "displacement"),
            float_data(mask, batch * volume.points, fixed, "mask")};
  }

  // Calls work(maps) with the element type and the number of axes at hand.
  template <typename Work>
  void with_maps(const Work& work) const {
    with_dimensions(fixed, "fixed", [&](auto dimensions) {
      with_element_type(fixed, "fixed",
                        [&](auto element) { work(maps<decltype(element), decltype(dimensions)::value>()); });
    });
  }
};

std::tuple<Tensor, Tensor> warped_cosine_loss(const Tensor& fixed, const Tensor& moving, const Tensor& displacement,
                                              const Tensor& mask, bool) {
  const torch::stable::accelerator::DeviceGuard guard(fixed.get_device_index());
  const Arguments arguments(fixed, moving, displacement, mask);
  Tensor loss = torch::stable::new_empty(mask, {});
  Tensor mask_sum = torch::stable::new_empty(mask, {});
  arguments.with_maps([&](const auto& maps) {
    Tensor partials = scratch(mask, 2 * partials_of(maps.batch, maps.volume.points), ScalarType::Double);
    run_warped_cosine_loss(maps, mutable_data<Partial>(partials), mutable_data<float>(loss),
                           mutable_data<float>(mask_sum), Launch(fixed));
  });
  return {loss, mask_sum};
}

template <typename T, int D>
void differentiate_moving(const Maps<T, D>& maps, const float2* slopes, bool deterministic, Tensor& grad_moving) {
  const Launch launch(grad_moving);
  if (!deterministic) {
    const CosineSlopes<T> source{maps.fixed, maps.moving, slopes, {}};
    Tensor sums = scratch(grad_moving, elements_of_sums<T>(grad_moving.numel()), ScalarType::Float);
    return run_scatter(maps.volume, maps.batch, maps.channels, source, maps.displacement, maps.mask,
                       mutable_data<float>(sums), mutable_data<T>(grad_moving), launch);
  }
  Tensor words = scratch(grad_moving, words_of_lists(maps.volume, maps.batch), ScalarType::Int);
  Tensor stored = scratch(grad_moving, maps.batch * channels_at_once(maps.channels) * maps.volume.points,
                          ScalarType::Float);
  const CellLists<D> lists = lists_in(maps.volume, maps.batch, mutable_data<uint32_t>(words));
  run_sort_points(lists, maps.batch, maps.displacement, maps.mask, launch);
  run_gather_cosines(maps, lists, slopes, mutable_data<float>(stored), mutable_data<T>(grad_moving), launch);
}

std::tuple<Tensor, Tensor, Tensor> warped_cosine_loss_backward(const Tensor& grad_loss, const Tensor& fixed,
                                                               const Tensor& moving, const Tensor& displacement,
                                                               const Tensor& mask, const Tensor& mask_sum,
                                                               bool need_fixed, bool need_moving,
                                                               bool need_displacement, bool deterministic) {
  const torch::stable::accelerator::DeviceGuard guard(fixed.get_device_index());
  const Arguments arguments(fixed, moving, displacement, mask);
  Tensor grad_fixed = empty_if(need_fixed, arguments.fixed);
  Tensor grad_moving = empty_if(need_moving, arguments.moving);
  Tensor grad_displacement = empty_if(need_displacement, arguments.displacement);
  Tensor slopes = scratch(mask, need_moving ? 2 * mask.numel() : 0, ScalarType::Float);
  arguments.with_maps([&](const auto& maps) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(maps.fixed)>>;
    const CosineGradients<T> gradients{float_data(grad_loss, 1, fixed, "grad_loss"),
                                       float_data(mask_sum, 1, fixed, "mask_sum"),
                                       need_fixed ? mutable_data<T>(grad_fixed) : nullptr,
                                       need_displacement ? mutable_data<float>(grad_displacement) : nullptr,
                                       need_moving ? mutable_data<float2>(slopes) : nullptr};
    run_differentiate_cosines(maps, gradients, Launch(fixed));
    if (need_moving) differentiate_moving(maps, data<float2>(slopes), deterministic, grad_moving);
  });
  return {grad_fixed, grad_moving, grad_displacement};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(voxtrast, CUDA, library) {
  library.impl("warped_cosine_loss", TORCH_BOX(&warped_cosine_loss));
  library.impl("warped_cosine_loss_backward", TORCH_BOX(&warped_cosine_loss_backward));
}

}  // namespace voxtrast
