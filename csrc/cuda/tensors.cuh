// What the operators of the warp family ask of their tensors on CUDA.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <type_traits>

#include "interpolation.cuh"
#include "launch.cuh"

namespace voxtrast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The volumes of a (B, C, *S) tensor.
template <int D>
Volume<D> volume_of(const Tensor& tensor) {
  Volume<D> volume;
  int64_t points = 1, cells = 1;
  for (int axis = 0; axis < D; ++axis) {
    const int64_t size = tensor.size(axis + 2);
    STD_TORCH_CHECK(size < kMaximumSize, "voxtrast: an axis has ", size, " voxels; at most 2^30 work");
    volume.size[axis] = static_cast<int32_t>(size);
    points *= size;
    cells *= size + 1;
    STD_TORCH_CHECK(cells < kMaximumCells, "voxtrast: a volume has ", points,
                    " voxels or more; some 2^32 work on a GPU");
  }
  volume.points = static_cast<uint32_t>(points);
  return volume;
}

// Calls work(T()) with the element type of an image or feature map.
template <typename Work>
void with_element_type(const Tensor& tensor, const char* name, const Work& work) {
  const ScalarType type = tensor.scalar_type();
  if (type == ScalarType::Float) return work(float());
  if (type == ScalarType::BFloat16) return work(__nv_bfloat16());
  if (type == ScalarType::Half) return work(__half());
  STD_TORCH_CHECK(false, "voxtrast: ", name, " must be float32, bfloat16 or float16 here; ",
                  "the functions of voxtrast.kernels take float64 too");
}

// Calls work(std::integral_constant<int, D>()) with the number of spatial axes of a (B, C, *S) tensor.
template <typename Work>
void with_dimensions(const Tensor& tensor, const char* name, const Work& work) {
  STD_TORCH_CHECK(tensor.dim() == 4 || tensor.dim() == 5, "voxtrast: ", name, " must have 4 or 5 axes, got ",
                  tensor.dim());
  if (tensor.dim() == 4) return work(std::integral_constant<int, 2>());
  return work(std::integral_constant<int, 3>());
}

template <typename T>
const T* data(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// Float32 data of a tensor that must have that type, count of elements and device, contiguous.
inline const float* float_data(const Tensor& tensor, int64_t elements, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float, "voxtrast: ", name,
                  " must be float32 here; the functions of voxtrast.kernels cast it");
  STD_TORCH_CHECK(tensor.numel() == elements, "voxtrast: ", name, " holds ", tensor.numel(), " elements, expected ",
                  elements);
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == like.get_device_index(), "voxtrast: ", name,
                  " must be on the device of the other tensors");
  return data<float>(tensor);
}

inline void check_alike(const Tensor& tensor, const char* name, const Tensor& like, const char* like_name) {
  STD_TORCH_CHECK(tensor.scalar_type() == like.scalar_type() && tensor.numel() == like.numel() && tensor.is_cuda() &&
                      tensor.get_device_index() == like.get_device_index(),
                  "voxtrast: ", name, " must have the shape, type and device of ", like_name);
}

// An empty tensor stands for a gradient that is not needed.
inline Tensor empty_if(bool needed, const Tensor& like) {
  return needed ? torch::stable::new_empty(like, like.sizes()) : torch::stable::new_empty(like, {0});
}

// Memory for the time of a call, on the current stream.
inline Tensor scratch(const Tensor& like, int64_t elements, ScalarType type) {
  return torch::stable::new_empty(like, {elements}, type);
}

}  // namespace voxtrast
