// voxtrast::warp and its gradients on CUDA.
#include "warp.cuh"

#include <tuple>

#include "gather.cuh"
#include "scatter.cuh"
#include "tensors.cuh"

namespace voxtrast {
namespace {

Tensor warp(const Tensor& image_given, const Tensor& displacement_given, bool) {
  const torch::stable::accelerator::DeviceGuard guard(image_given.get_device_index());
  const Tensor image = torch::stable::contiguous(image_given);
  const Tensor displacement = torch::stable::contiguous(displacement_given);
  Tensor output = torch::stable::new_empty(image, image.sizes());
  with_dimensions(image, "image", [&](auto dimensions) {
    constexpr int D = decltype(dimensions)::value;
    with_element_type(image, "image", [&](auto element) {
      using T = decltype(element);
      const Volume<D> volume = volume_of<D>(image);
      const int64_t batch = image.size(0);
      const float* shift = float_data(displacement, batch * D * volume.points, image, "displacement");
      run_sample<T, D, false>(volume, batch, image.size(1), data<T>(image), shift, mutable_data<T>(output),
                              Launch(image));
    });
  });
  return output;
}

template <typename T, int D>
void differentiate_image(const Volume<D>& volume, const Tensor& gradient, const float* displacement, bool deterministic,
                         Tensor& grad_image) {
  const int64_t batch = gradient.size(0), channels = gradient.size(1);
  const Launch launch(gradient);
  if (!deterministic) {
    Tensor sums = scratch(gradient, elements_of_sums<T>(gradient.numel()), ScalarType::Float);
    return run_scatter(volume, batch, channels, StoredGradient<T>{data<T>(gradient)}, displacement,
                       static_cast<const float*>(nullptr), mutable_data<float>(sums), mutable_data<T>(grad_image),
                       launch);
  }
  Tensor words = scratch(gradient, words_of_lists(volume, batch), ScalarType::Int);
  const CellLists<D> lists = lists_in(volume, batch, mutable_data<uint32_t>(words));
  run_sort_points(lists, batch, displacement, nullptr, launch);
  run_gather(lists, batch, channels, channels, data<T>(gradient), displacement, mutable_data<T>(grad_image), launch);
}

std::tuple<Tensor, Tensor> warp_backward(const Tensor& grad_given, const Tensor& image_given,
                                         const Tensor& displacement_given, bool need_image, bool need_displacement,
                                         bool deterministic) {
  const torch::stable::accelerator::DeviceGuard guard(image_given.get_device_index());
  const Tensor grad_output = torch::stable::contiguous(grad_given);
  const Tensor image = torch::stable::contiguous(image_given);
  const Tensor displacement = torch::stable::contiguous(displacement_given);
  check_alike(grad_output, "grad_output", image, "image");
  Tensor grad_image = empty_if(need_image, image);
  Tensor grad_displacement = empty_if(need_displacement, displacement);
  with_dimensions(image, "image", [&](auto dimensions) {
    constexpr int D = decltype(dimensions)::value;
    with_element_type(image, "image", [&](auto element) {
      using T = decltype(element);
      const Volume<D> volume = volume_of<D>(image);
      const int64_t batch = image.size(0), channels = image.size(1);
      const float* shift = float_data(displacement, batch * D * volume.points, image, "displacement");
      if (need_image) differentiate_image<T, D>(volume, grad_output, shift, deterministic, grad_image);
      if (need_displacement)
        run_differentiate_displacement(volume, batch, channels, data<T>(grad_output), data<T>(image), shift,
                                       mutable_data<float>(grad_displacement), Launch(image));
    });
  });
  return {grad_image, grad_displacement};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(voxtrast, CUDA, library) {
  library.impl("warp", TORCH_BOX(&warp));
  library.impl("warp_backward", TORCH_BOX(&warp_backward));
}

}  // namespace voxtrast
