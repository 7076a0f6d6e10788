// voxtrast::warp and its gradients on the CPU. What is computed: kernels/warp.py.
#include "warp.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

namespace voxtrast {
namespace {

using torch::stable::Tensor;

Tensor warp(const Tensor& image_given, const Tensor& displacement_given, bool) {
  const Tensor image = readable_in_pairs(image_given);
  const Tensor displacement = torch::stable::contiguous(displacement_given);
  Tensor output = new_result(image_given);
  with_dimensions(image_given, "image", [&](auto dimensions) {
    constexpr int D = decltype(dimensions)::value;
    with_element_type(image, "image", [&](auto element) {
      using T = decltype(element);
      sample<T, D, false>(image, image_given.sizes(), displacement, output.mutable_data_ptr<T>());
    });
  });
  return output;
}

// Parallel over blocks of points, each of which is written by one thread alone.
template <typename T, int D>
void differentiate_displacement(const Volume<D>& volume, int64_t batch, int64_t channels, const T* gradients,
                                const T* values, const float* displacement, float* grad_displacement) {
  const PointPath<D>& path = point_path<D>();
  const int64_t count = blocks(volume), points = volume.points;
  torch::stable::parallel_for(0, batch * count, grain(kBlock * channels), [&](int64_t begin, int64_t end) {
    Cells<D> cells;
    Products<D> product;
    float gradient[kBlock];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / count, first = item % count * kBlock;
      const float* shift = displacement + b * D * points;
      path.locate(volume, shift, nullptr, whole(volume), first, cells);
      std::memset(product, 0, sizeof(product));
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t plane = (b * channels + c) * points;
        warp_path().of[kElement<T>].read(gradients + plane + first, nullptr, cells.count, gradient);
        const T* next = values + plane + (c + 1 < channels ? points : 0);
        path.of[kElement<T>].collect(volume, cells, values + plane, next, gradient, product);
      }
      path.differentiate(volume, shift, nullptr, cells, product, grad_displacement + b * D * points);
    }
  });
}

// grad_image and grad_displacement; an empty tensor stands for one that is not needed.
std::tuple<Tensor, Tensor> warp_backward(const Tensor& grad_given, const Tensor& image_given,
                                         const Tensor& displacement_given, bool need_image, bool need_displacement,
                                         bool) {
  const Tensor grad_output = torch::stable::contiguous(grad_given);
  const Tensor image = readable_in_pairs(image_given);
  const Tensor displacement = torch::stable::contiguous(displacement_given);
  STD_TORCH_CHECK(grad_output.scalar_type() == image.scalar_type() && grad_output.numel() == image_given.numel(),
                  "voxtrast: grad_output must have the shape and type of image");
  Tensor grad_image = new_result(image_given, need_image);
  Tensor grad_displacement = new_result(displacement, need_displacement);
  with_dimensions(image_given, "image", [&](auto dimensions) {
    constexpr int D = decltype(dimensions)::value;
    with_element_type(image, "image", [&](auto element) {
      using T = decltype(element);
      const Volume<D> volume = make_volume<D>(image_given.sizes());
      const int64_t batch = image_given.size(0), channels = image_given.size(1);
      const float* shift = float_data(displacement, batch * D * volume.points, "displacement");
      const T* gradients = grad_output.const_data_ptr<T>();
      if (need_image)
        scatter<T, D>(volume, batch, channels, shift, nullptr, grad_image.mutable_data_ptr<T>(),
                      [&](const Cells<D>& cells, int64_t b, int64_t c, float* gradient) {
                        const T* plane = gradients + (b * channels + c) * volume.points;
                        warp_path().of[kElement<T>].read(plane + cells.first, nullptr, cells.count, gradient);
                      });
      if (need_displacement)
        differentiate_displacement<T, D>(volume, batch, channels, gradients, image.const_data_ptr<T>(), shift,
                                         grad_displacement.mutable_data_ptr<float>());
    });
  });
  return {grad_image, grad_displacement};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(voxtrast, CPU, library) {
  library.impl("warp", TORCH_BOX(&warp));
  library.impl("warp_backward", TORCH_BOX(&warp_backward));
}

}  // namespace voxtrast
