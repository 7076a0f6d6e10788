// Linear interpolation at displaced points, a block of points at a time: what the warp family shares.
//
// A block holds the neighbours of its points and their weights once; the channels then share them. A displacement is
// split into its whole part and its fraction before the point is added, so that the fraction keeps every bit and a
// zero displacement is exactly the identity.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cstdint>

namespace voxtrast {

// Points of a block: neighbours and weights of 128 points stay in the first-level cache.
constexpr int64_t kBlock = 128;
// Longest axis; sums of a coordinate and a displacement below it fit int32.
constexpr int64_t kMaximumSize = int64_t(1) << 30;

// The voxels of one volume, as seen by one channel.
template <int D>
struct Grid {
  int64_t size[D];
  int64_t points;

  // sizes are those of a (B, C, *S) tensor
  explicit Grid(torch::headeronly::IntHeaderOnlyArrayRef sizes) : points(1) {
    for (int axis = 0; axis < D; ++axis) {
      size[axis] = sizes[axis + 2];
      points *= size[axis];
      STD_TORCH_CHECK(size[axis] < kMaximumSize, "voxtrast: an axis has ", size[axis], " voxels; at most 2^30 work");
    }
  }

  int64_t blocks() const { return (points + kBlock - 1) / kBlock; }
};

template <int D>
struct Block {
  static constexpr int kCorners = 1 << D;

  int64_t count;              // points in use
  int64_t position[kBlock];   // linear index of the point
  int32_t coordinate[D][kBlock];
  // Lower and upper neighbour along each axis: weight, and 1 or 0 for inside or outside the volume.
  float axis_weight[D][2][kBlock];
  float axis_inside[D][2][kBlock];
  int64_t axis_offset[D][2][kBlock];
  // The corners of the cell that holds the displaced point. Weight 0 and a readable offset where one lies outside.
  int64_t offset[kCorners][kBlock];
  float weight[kCorners][kBlock];
  float start[kBlock];  // neutral element of the sum: -0, which keeps the sign of a zero; +0 outside the volume

  // Takes the points first .. first + kBlock of the volume, without those whose weight in mask (if any) is zero.
  void take(const Grid<D>& grid, int64_t first, const float* mask) {
    int32_t here[D];
    int64_t rest = first;
    for (int axis = D - 1; axis >= 0; --axis) {
      here[axis] = static_cast<int32_t>(rest % grid.size[axis]);
      rest /= grid.size[axis];
    }
    const int64_t last = std::min(first + kBlock, grid.points);
    count = 0;
    for (int64_t point = first; point < last; ++point) {
      if (mask == nullptr || mask[point] != 0.0f) {
        position[count] = point;
        for (int axis = 0; axis < D; ++axis) coordinate[axis][count] = here[axis];
        ++count;
      }
      for (int axis = D - 1; axis >= 0 && ++here[axis] == grid.size[axis]; --axis) here[axis] = 0;
    }
  }

  // Finds neighbours and weights. displacement: (D, points) of this volume.
  void locate(const Grid<D>& grid, const float* displacement) {
    int64_t stride = 1;
    for (int axis = D - 1; axis >= 0; --axis) {
      const float* component = displacement + axis * grid.points;
      const int32_t size = static_cast<int32_t>(grid.size[axis]);
      for (int64_t n = 0; n < count; ++n) {
        const float given = component[position[n]];
        // False for NaN, infinities and whatever int32 cannot hold: such a point lies outside.
        const bool usable = given > -float(kMaximumSize) && given < float(kMaximumSize);
        const float shift = usable ? given : 0.0f;
        int32_t whole = static_cast<int32_t>(shift);
        whole -= shift < static_cast<float>(whole);
        const float fraction = shift - static_cast<float>(whole);
        const int32_t lower = coordinate[axis][n] + whole;
        const bool lower_inside = usable && lower >= 0 && lower < size;
        const bool upper_inside = usable && lower >= -1 && lower < size - 1;
        axis_weight[axis][0][n] = lower_inside ? 1.0f - fraction : 0.0f;
        axis_weight[axis][1][n] = upper_inside ? fraction : 0.0f;
        axis_inside[axis][0][n] = lower_inside ? 1.0f : 0.0f;
        axis_inside[axis][1][n] = upper_inside ? 1.0f : 0.0f;
        axis_offset[axis][0][n] = stride * (lower_inside ? lower : 0);
        axis_offset[axis][1][n] = stride * (upper_inside ? lower + 1 : 0);
      }
      stride *= grid.size[axis];
    }
    for (int corner = 0; corner < kCorners; ++corner) {
      for (int64_t n = 0; n < count; ++n) {
        float product = 1.0f;
        int64_t sum = 0;
        for (int axis = 0; axis < D; ++axis) {
          const int side = corner >> (D - 1 - axis) & 1;
          product *= axis_weight[axis][side][n];
          sum += axis_offset[axis][side][n];
        }
        weight[corner][n] = product;
        offset[corner][n] = sum;
      }
    }
    for (int64_t n = 0; n < count; ++n) {
      bool inside = false;
      for (int corner = 0; corner < kCorners; ++corner) inside |= weight[corner][n] != 0.0f;
      start[n] = inside ? -0.0f : 0.0f;
    }
  }

  // Value of one channel at the n-th point. A corner without weight is not added: it may hold an infinity.
  template <typename T>
  float interpolate(const T* plane, int64_t n) const {
    float sum = start[n];
    for (int corner = 0; corner < kCorners; ++corner) {
      const float value = static_cast<float>(plane[offset[corner][n]]);
      sum += weight[corner][n] != 0.0f ? weight[corner][n] * value : -0.0f;
    }
    return sum;
  }

  // Adds the transpose of interpolate: spreads a gradient over the corners.
  void spread(float* plane, int64_t n, float gradient) const {
    for (int corner = 0; corner < kCorners; ++corner)
      if (weight[corner][n] != 0.0f) plane[offset[corner][n]] += weight[corner][n] * gradient;
  }

  // product[corner][n] += gradient * value of the corner: all that the gradient of the displacement needs of a channel.
  template <typename T>
  void collect(const T* plane, int64_t n, float gradient, float (*product)[kBlock]) const {
    for (int corner = 0; corner < kCorners; ++corner)
      product[corner][n] += gradient * static_cast<float>(plane[offset[corner][n]]);
  }

  // Gradient of the displacement from the collected products, written to gradient (D, points) of this volume.
  void differentiate(const Grid<D>& grid, const float (*product)[kBlock], float* gradient) const {
    for (int axis = 0; axis < D; ++axis) {
      for (int64_t n = 0; n < count; ++n) {
        float sum = 0.0f;
        for (int corner = 0; corner < kCorners; ++corner) {
          const int side = corner >> (D - 1 - axis) & 1;
          float factor = side ? axis_inside[axis][1][n] : -axis_inside[axis][0][n];
          for (int other = 0; other < D; ++other)
            if (other != axis) factor *= axis_weight[other][corner >> (D - 1 - other) & 1][n];
          sum += factor != 0.0f ? factor * product[corner][n] : 0.0f;
        }
        gradient[axis * grid.points + position[n]] = sum;
      }
    }
  }
};

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
