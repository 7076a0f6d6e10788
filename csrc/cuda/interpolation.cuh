// Linear interpolation at displaced points, one thread a point: what the warp family shares.
//
// A displacement is split into its whole part and its fraction before the point is added, so that the fraction keeps
// every bit and a zero displacement is exactly the identity.
#pragma once

#include <cstdint>

#include "elements.cuh"

namespace voxtrast {

// Longest axis; sums of a coordinate and a displacement below it fit int32.
constexpr int64_t kMaximumSize = int64_t(1) << 30;
// Voxels of a volume, and the cells around them, are numbered in 32 bits, with some to spare for ends of lists.
constexpr int64_t kMaximumCells = (int64_t(1) << 32) - (int64_t(1) << 23);

// The voxels of one volume, as seen by one channel.
template <int D>
struct Volume {
  int32_t size[D];
  uint32_t points;

  // Coordinates of the voxel of a linear index.
  __device__ void locate(uint32_t point, int32_t* coordinate) const {
#pragma unroll
    for (int axis = D - 1; axis > 0; --axis) {
      const uint32_t rest = point / static_cast<uint32_t>(size[axis]);
      coordinate[axis] = static_cast<int32_t>(point - rest * static_cast<uint32_t>(size[axis]));
      point = rest;
    }
    coordinate[0] = static_cast<int32_t>(point);
  }
};

// Side of a corner along an axis: 0 for the lower, 1 for the upper neighbour.
template <int D>
__device__ constexpr int side_of(int corner, int axis) {
  return corner >> (D - 1 - axis) & 1;
}

// The cell of the grid that holds one displaced point.
template <int D>
struct Cell {
  static constexpr int kCorners = 1 << D;

  float share[D][2];      // weight of the lower and the upper neighbour along an axis; 0 outside the volume
  bool inside[D][2];
  int32_t lower[D];       // coordinates of the lowest corner, -1 at least where anything is inside
  uint32_t base;          // its linear index, modulo 2^32: right for every corner that lies inside
  uint32_t stride[D];

  // displacement: component 0 of the point, the others `points` further each
  __device__ Cell(const Volume<D>& volume, uint32_t point, const float* displacement) {
    int32_t here[D];
    volume.locate(point, here);
    base = 0;
    uint32_t step = 1;
#pragma unroll
    for (int axis = D - 1; axis >= 0; --axis) {
      const float given = displacement[int64_t(axis) * volume.points];
      // False for NaN, infinities and whatever int32 cannot hold: such a point lies outside.
      const bool usable = given > -float(kMaximumSize) && given < float(kMaximumSize);
      const float shift = usable ? given : 0.0f;
      const float whole = floorf(shift);
      const float fraction = shift - whole;
      lower[axis] = here[axis] + static_cast<int32_t>(whole);
      inside[axis][0] = usable && lower[axis] >= 0 && lower[axis] < volume.size[axis];
      inside[axis][1] = usable && lower[axis] >= -1 && lower[axis] < volume.size[axis] - 1;
      share[axis][0] = inside[axis][0] ? 1.0f - fraction : 0.0f;
      share[axis][1] = inside[axis][1] ? fraction : 0.0f;
      stride[axis] = step;
      base += static_cast<uint32_t>(lower[axis]) * step;
      step *= static_cast<uint32_t>(volume.size[axis]);
    }
  }

  __device__ uint32_t offset(int corner) const {
    uint32_t sum = base;
#pragma unroll
    for (int axis = 0; axis < D; ++axis)
      if (side_of<D>(corner, axis)) sum += stride[axis];
    return sum;
  }

  __device__ float weight(int corner) const {
    float product = 1.0f;
#pragma unroll
    for (int axis = 0; axis < D; ++axis) product *= share[axis][side_of<D>(corner, axis)];
    return product;
  }

  // Derivative of a corner's weight with the displacement along an axis.
  __device__ float slope(int corner, int axis) const {
    const int side = side_of<D>(corner, axis);
    float product = inside[axis][side] ? (side ? 1.0f : -1.0f) : 0.0f;
#pragma unroll
    for (int other = 0; other < D; ++other)
      if (other != axis) product *= share[other][side_of<D>(corner, other)];
    return product;
  }

  // Bits of the corners that the gradient of the displacement depends on. `differentiate` looks at no other.
  __device__ unsigned sloping() const {
    unsigned bits = 0;
#pragma unroll
    for (int corner = 0; corner < kCorners; ++corner)
#pragma unroll
      for (int axis = 0; axis < D; ++axis)
        if (slope(corner, axis) != 0.0f) bits |= 1u << corner;
    return bits;
  }

  // Writes the gradient of the displacement, given each corner's sum over the channels of gradient times value.
  __device__ void differentiate(const float* product, int64_t points, float* gradient) const {
#pragma unroll
    for (int axis = 0; axis < D; ++axis) {
      float sum = 0.0f;
#pragma unroll
      for (int corner = 0; corner < kCorners; ++corner) {
        const float factor = slope(corner, axis);
        if (factor != 0.0f) sum += factor * product[corner];
      }
      gradient[axis * points] = sum;
    }
  }
};

// The corners of a cell with their weights, for threads that interpolate many channels.
template <int D>
struct Corners {
  static constexpr int kCorners = 1 << D;

  float weight[kCorners];
  uint32_t offset[kCorners];  // 0 where the value has no part: loads without conditions are under way together
  float start;                // neutral element of the sum: -0, which keeps the sign of a zero; +0 outside the volume

  // more: bits of corners that are wanted though they may have no weight
  __device__ explicit Corners(const Cell<D>& cell, unsigned more = 0) {
    bool any = false;
#pragma unroll
    for (int corner = 0; corner < kCorners; ++corner) {
      weight[corner] = cell.weight(corner);
      offset[corner] = weight[corner] != 0.0f || more >> corner & 1 ? cell.offset(corner) : 0;
      any |= weight[corner] != 0.0f;
    }
    start = any ? -0.0f : 0.0f;
  }

  // Values of one channel at the corners.
  template <typename T>
  __device__ void read(const T* plane, float* value) const {
#pragma unroll
    for (int corner = 0; corner < kCorners; ++corner) value[corner] = load(plane + offset[corner]);
  }

  // A corner without weight has no part: it may hold an infinity.
  __device__ float sum(const float* value) const {
    float total = start;
#pragma unroll
    for (int corner = 0; corner < kCorners; ++corner)
      if (weight[corner] != 0.0f) total += weight[corner] * value[corner];
    return total;
  }

  // Value of one channel at the displaced point.
  template <typename T>
  __device__ float interpolate(const T* plane) const {
    float value[kCorners];
    read(plane, value);
    return sum(value);
  }
};

// What is computed a tile of points at a time: blocks are numbered (item, part, tile), tiles fastest.
struct Tiles {
  uint32_t tiles, parts;

  struct Place {
    int64_t item;
    uint32_t part, tile;
  };

  __device__ Place place(uint32_t block) const {
    const uint32_t row = block / tiles;
    return {int64_t(row / parts), row % parts, block % tiles};
  }
};

}  // namespace voxtrast
