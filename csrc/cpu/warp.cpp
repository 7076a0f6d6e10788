// voxtrast::warp and its gradients on the CPU. What is computed: kernels/warp.py.
#include "warp.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

namespace voxtrast {
namespace {

using torch::stable::Tensor;

Tensor warp(const Tensor& image_given, const Tensor& displacement_given, bool) {
  const Tensor image = torch::stable::contiguous(image_given);
  const Tensor displacement = torch::stable::contiguous(displacement_given);
  Tensor output = torch::stable::new_empty(image, image.sizes());
  with_dimensions(image, "image", [&](auto dimensions) {
    constexpr int D = decltype(dimensions)::value;
    with_element_type(image, "image", [&](auto element) {
      using T = decltype(element);
      sample<T, D, false>(image, displacement, output.mutable_data_ptr<T>());
    });
  });
  return output;
}

// Parallel over blocks of points, each of which is written by one thread alone.
template <typename T, int D>
void differentiate_displacement(const Tensor& grad_output, const Tensor& image, const Tensor& displacement,
                                float* grad_displacement) {
  const Grid<D> grid(image.sizes());
  const int64_t batch = image.size(0), channels = image.size(1), blocks = grid.blocks();
  const float* shift = float_data(displacement, batch * D * grid.points, "displacement");
  const T* values = image.const_data_ptr<T>();
  const T* gradients = grad_output.const_data_ptr<T>();
  torch::stable::parallel_for(0, batch * blocks, grain(kBlock * channels), [&](int64_t begin, int64_t end) {
    Block<D> block;
    float product[Block<D>::kCorners][kBlock];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / blocks;
      block.take(grid, item % blocks * kBlock, nullptr);
      block.locate(grid, shift + b * D * grid.points);
      std::fill(&product[0][0], &product[0][0] + Block<D>::kCorners * kBlock, 0.0f);
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t plane = (b * channels + c) * grid.points;
        for (int64_t n = 0; n < block.count; ++n)
          block.collect(values + plane, n, static_cast<float>(gradients[plane + block.position[n]]), product);
      }
      block.differentiate(grid, product, grad_displacement + b * D * grid.points);
    }
  });
}

// grad_image and grad_displacement; an empty tensor stands for one that is not needed.
std::tuple<Tensor, Tensor> warp_backward(const Tensor& grad_given, const Tensor& image_given,
                                         const Tensor& displacement_given, bool need_image, bool need_displacement,
                                         bool) {
  const Tensor grad_output = torch::stable::contiguous(grad_given);
  const Tensor image = torch::stable::contiguous(image_given);
  const Tensor displacement = torch::stable::contiguous(displacement_given);
  STD_TORCH_CHECK(grad_output.scalar_type() == image.scalar_type() && grad_output.numel() == image.numel(),
                  "voxtrast: grad_output must have the shape and type of image");
  Tensor grad_image = need_image ? torch::stable::new_zeros(image, image.sizes())
                                 : torch::stable::new_empty(image, {0});
  Tensor grad_displacement = need_displacement ? torch::stable::new_empty(displacement, displacement.sizes())
                                               : torch::stable::new_empty(displacement, {0});
  with_dimensions(image, "image", [&](auto dimensions) {
    constexpr int D = decltype(dimensions)::value;
    with_element_type(image, "image", [&](auto element) {
      using T = decltype(element);
      if (need_image) {
        const Grid<D> grid(image.sizes());
        const int64_t channels = image.size(1);
        const float* shift = float_data(displacement, image.size(0) * D * grid.points, "displacement");
        const T* gradients = grad_output.const_data_ptr<T>();
        scatter<T, D>(grid, image.size(0), channels, shift, nullptr, grad_image.mutable_data_ptr<T>(),
                      [&](const Block<D>& block, int64_t b, int64_t c, float* gradient) {
                        const T* plane = gradients + (b * channels + c) * grid.points;
                        for (int64_t n = 0; n < block.count; ++n)
                          gradient[n] = static_cast<float>(plane[block.position[n]]);
                      });
      }
      if (need_displacement)
        differentiate_displacement<T, D>(grad_output, image, displacement, grad_displacement.mutable_data_ptr<float>());
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
