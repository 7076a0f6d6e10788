// What the operators on volumes share: their arguments, and the volume as the compiled paths see it.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "warp_points.h"

namespace voxtrast {

// Longest axis; sums of a coordinate and a displacement below it fit int32.
constexpr int64_t kMaximumSize = int64_t(1) << 30;

// sizes: those of a (B, C, *S) tensor. Axes of one voxel behind the others move before them: the same memory.
template <int D>
Volume<D> make_volume(torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  Volume<D> volume;
  volume.points = 1;
  for (int axis = 0; axis < D; ++axis) {
    volume.size[axis] = sizes[axis + 2];
    volume.component[axis] = axis;
    volume.points *= volume.size[axis];
    STD_TORCH_CHECK(volume.size[axis] < kMaximumSize, "voxtrast: an axis has ", volume.size[axis],
                    " voxels; at most 2^30 work");
  }
  while (volume.points > 1 && volume.size[D - 1] == 1) {
    std::rotate(volume.size, volume.size + D - 1, volume.size + D);
    std::rotate(volume.component, volume.component + D - 1, volume.component + D);
  }
  int64_t stride = 1;
  for (int axis = D - 1; axis >= 0; --axis) {
    volume.stride[axis] = stride;
    stride *= volume.size[axis];
  }
  for (int row = 0; row < 1 << (D - 1); ++row) {
    volume.step[row] = 0;
    for (int axis = 0; axis < D - 1; ++axis)
      if (row >> (D - 2 - axis) & 1 && volume.size[axis] > 1) volume.step[row] += volume.stride[axis];
  }
  return volume;
}

template <int D>
int64_t blocks(const Volume<D>& volume) {
  return (volume.points + kBlock - 1) / kBlock;
}

template <int D>
Slab whole(const Volume<D>& volume) {
  return {0, volume.size[0]};
}

// An image whose elements are read in pairs. Of volumes of a single voxel the last pair would end beyond the memory.
inline torch::stable::Tensor readable_in_pairs(const torch::stable::Tensor& image_given) {
  const torch::stable::Tensor image = torch::stable::contiguous(image_given);
  const int64_t count = image.numel();
  if (count > image.size(0) * image.size(1)) return image;
  torch::stable::Tensor longer = torch::stable::new_empty(image, {count + 1});
  torch::stable::fill_(longer, 0.0);
  std::memcpy(longer.mutable_data_ptr(), image.const_data_ptr(), count * image.element_size());
  return longer;
}

template <typename T>
constexpr int kElement = static_cast<int>(std::is_same_v<T, float> ? Element::float32
                                          : std::is_same_v<T, torch::headeronly::BFloat16> ? Element::bfloat16
                                                                                             : Element::float16);

// Calls work(T()) with the element type of an image or feature map.
template <typename Work>
void with_element_type(const torch::stable::Tensor& tensor, const char* name, const Work& work) {
  using torch::headeronly::ScalarType;
  const ScalarType type = tensor.scalar_type();
  if (type == ScalarType::Float) return work(float());
  if (type == ScalarType::BFloat16) return work(torch::headeronly::BFloat16());
  if (type == ScalarType::Half) return work(torch::headeronly::Half());
  STD_TORCH_CHECK(false, "voxtrast: ", name, " must be float32, bfloat16 or float16 here; ",
                  "the functions of voxtrast.kernels take float64 too");
}

// Float32 data of a tensor that must have that type and count of elements, contiguous.
inline const float* float_data(const torch::stable::Tensor& tensor, int64_t elements, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == torch::headeronly::ScalarType::Float, "voxtrast: ", name,
                  " must be float32 here; the functions of voxtrast.kernels cast it");
  STD_TORCH_CHECK(tensor.numel() == elements, "voxtrast: ", name, " holds ", tensor.numel(), " elements, expected ",
                  elements);
  return tensor.const_data_ptr<float>();
}

// Work items per thread, at least: below some 16k interpolations a second thread costs more than it brings.
inline int64_t grain(int64_t cost_of_item) { return std::max<int64_t>(1, 16384 / std::max<int64_t>(1, cost_of_item)); }

// Calls work(std::integral_constant<int, D>()) with the number of spatial axes of a (B, C, *S) tensor.
template <typename Work>
void with_dimensions(const torch::stable::Tensor& tensor, const char* name, const Work& work) {
  STD_TORCH_CHECK(tensor.dim() == 4 || tensor.dim() == 5, "voxtrast: ", name, " must have 4 or 5 axes, got ",
                  tensor.dim());
  if (tensor.dim() == 4) return work(std::integral_constant<int, 2>());
  return work(std::integral_constant<int, 3>());
}

}  // namespace voxtrast
