// The transpose of the interpolation, the same bits every time: each voxel sums what the points around it send.
//
// Lists of points come in any order, so no rounding may depend on it. A first walk along the lists finds the largest
// contribution to a voxel; the second rounds every contribution to a multiple of a unit so small beside it that little
// is lost, and so large that float64 holds all sums of such multiples exactly.
#pragma once

#include "cells.cuh"

namespace voxtrast {

constexpr int kGatherThreads = 128;
constexpr int kChannelsOfGather = 8;     // share the walk along the lists
constexpr uint32_t kLongestAlone = 256;  // points that a thread sums by itself; beyond them its block helps

// The logarithm of a power of two that `count` does not exceed, 1 at least.
__device__ inline int bits_of(uint32_t count) {
  int bits = 1;
  while (bits < 32 && uint64_t(1) << bits < count) ++bits;
  return bits;
}

// (value + shift) - shift is value rounded to a multiple of the unit, for every value up to `largest`; sums of 2^bits
// of them stay below 2^53 units. Infinities and NaN stay what they are, and reach the sum in any order.
__device__ inline double shift_of(float largest, int bits) {
  const uint32_t exponent = __builtin_bit_cast(uint32_t, largest) >> 23;  // largest < 2^(exponent - 126)
  return __builtin_bit_cast(double, (static_cast<uint64_t>(exponent) - 126 + bits + 1023) << 52) * 1.5;
}

template <typename S, typename T, int D>
struct Gathering {
  CellLists<D> lists;
  Tiles tiles;                // parts are groups of channels
  int32_t channels;           // of gradient
  int64_t channels_of_result;
  const S* gradient;          // (B, channels, points), of the warped image
  const float* displacement;  // (B, D, points)
  T* result;                  // (B, channels_of_result, points), of which the first `channels` are written
};

// The lists around one voxel: one for each corner that the voxel can be.
template <int D>
struct Surroundings {
  const float* displacement[D];  // (points) of the item
  const uint32_t* slots;         // of the item
  const uint32_t* listed;        // points, of the item
  uint32_t cell;                 // whose lowest corner is the voxel
  uint32_t stride[D];            // from cell to cell along an axis

  __device__ Surroundings(const CellLists<D>& lists, const float* fields, int64_t item, uint32_t voxel)
      : slots(lists.slots + item * lists.slots_of_item), listed(lists.points + item * lists.volume.points), cell(0) {
    int32_t here[D];
    lists.volume.locate(voxel, here);
    uint32_t step = 1;
#pragma unroll
    for (int axis = D - 1; axis >= 0; --axis) {
      displacement[axis] = fields + axis * int64_t(lists.volume.points);
      stride[axis] = step;
      cell += (here[axis] + 1) * step;
      step *= lists.volume.size[axis] + 1;
    }
  }

  // The slot of the cell that has the voxel at a corner.
  __device__ const uint32_t* slot(int corner) const {
    uint32_t other = cell;
#pragma unroll
    for (int axis = 0; axis < D; ++axis) other -= side_of<D>(corner, axis) ? stride[axis] : 0;
    return slots + slot_of_cell(other);
  }

  __device__ uint32_t count() const {
    uint32_t total = 0;
#pragma unroll
    for (int corner = 0; corner < 1 << D; ++corner) total += slot(corner)[1] - slot(corner)[0];
    return total;
  }

  // Calls work(point, weight) for each point that weighs the voxel: every `lanes`-th, from `lane` on. One loop over all
  // lists: threads with a short list go on to the next while their neighbours are in a long one.
  template <typename Work>
  __device__ void visit(uint32_t lane, uint32_t lanes, const Work& work) const {
    int corner = -1;
    uint32_t next = 0, end = 0;
    while (true) {
      while (next >= end) {
        if (++corner == 1 << D) return;
        const uint32_t* place = slot(corner);
        next = place[0] + lane;
        end = place[1];
      }
      const uint32_t point = listed[next];
      next += lanes;
      float weight = 1.0f;
#pragma unroll
      for (int axis = 0; axis < D; ++axis) {
        const float shift = load(displacement[axis] + point);
        const float fraction = shift - floorf(shift);
        weight *= side_of<D>(corner, axis) ? fraction : 1.0f - fraction;
      }
      if (weight != 0.0f) work(point, weight);
    }
  }
};

// What one thread knows of the sums of a voxel, for a group of channels.
template <typename S>
struct Sums {
  const S* gradient;  // (count, points)
  int64_t points;
  int count;
  float largest[kChannelsOfGather] = {};  // magnitude
  double shift[kChannelsOfGather] = {};
  double total[kChannelsOfGather] = {};

  // What a point sends.
  __device__ void read(uint32_t point, float weight, float* value) const {
    const S* row = gradient + point;
#pragma unroll
    for (int c = 0; c < kChannelsOfGather; ++c, row += points) value[c] = c < count ? load(row) : 0.0f;
#pragma unroll
    for (int c = 0; c < kChannelsOfGather; ++c) value[c] *= weight;
  }

  __device__ void measure(uint32_t point, float weight) {
    float value[kChannelsOfGather];
    read(point, weight, value);
#pragma unroll
    for (int c = 0; c < kChannelsOfGather; ++c) largest[c] = fmaxf(largest[c], fabsf(value[c]));
  }

  __device__ void add(uint32_t point, float weight) {
    float value[kChannelsOfGather];
    read(point, weight, value);
#pragma unroll
    for (int c = 0; c < kChannelsOfGather; ++c) total[c] += (static_cast<double>(value[c]) + shift[c]) - shift[c];
  }
};

struct GatheredTogether {
  double total[kChannelsOfGather];
  uint32_t largest[kChannelsOfGather];  // bits of a float that is not negative: ordered as the floats are
  bool any_long;
  bool is_long[kGatherThreads];
};

// Whole blocks sum the voxels of their tile that have long lists, one after the other.
template <typename S, typename T, int D>
__device__ void gather_together(Sums<S> sums, const Surroundings<D>& around, uint32_t voxel, T* result) {
  auto& shared = *shared_memory<GatheredTogether>();
  if (threadIdx.x < kChannelsOfGather) shared.largest[threadIdx.x] = 0, shared.total[threadIdx.x] = 0.0;
  __syncthreads();
  around.visit(threadIdx.x, kGatherThreads, [&](uint32_t point, float weight) { sums.measure(point, weight); });
#pragma unroll
  for (int c = 0; c < kChannelsOfGather; ++c)
    atomicMax(&shared.largest[c], __builtin_bit_cast(uint32_t, sums.largest[c]));
  __syncthreads();
  const int bits = bits_of(around.count());
#pragma unroll
  for (int c = 0; c < kChannelsOfGather; ++c)
    sums.shift[c] = shift_of(__builtin_bit_cast(float, shared.largest[c]), bits);
  around.visit(threadIdx.x, kGatherThreads, [&](uint32_t point, float weight) { sums.add(point, weight); });
#pragma unroll
  for (int c = 0; c < kChannelsOfGather; ++c) atomicAdd(&shared.total[c], sums.total[c]);
  __syncthreads();
  if (threadIdx.x < sums.count)
    result[threadIdx.x * sums.points + voxel] = from_float<T>(static_cast<float>(shared.total[threadIdx.x]));
  __syncthreads();
}

template <typename S, typename T, int D>
__device__ void gather_alone(Sums<S> sums, const Surroundings<D>& around, uint32_t count, uint32_t voxel, T* result) {
  around.visit(0, 1, [&](uint32_t point, float weight) { sums.measure(point, weight); });
  const int bits = bits_of(count);
#pragma unroll
  for (int c = 0; c < kChannelsOfGather; ++c) sums.shift[c] = shift_of(sums.largest[c], bits);
  around.visit(0, 1, [&](uint32_t point, float weight) { sums.add(point, weight); });
  T* target = result + voxel;
#pragma unroll
  for (int c = 0; c < kChannelsOfGather; ++c, target += sums.points)
    if (c < sums.count) *target = from_float<T>(static_cast<float>(sums.total[c]));
}

template <typename S, typename T, int D>
__global__ void __launch_bounds__(kGatherThreads, 4) gather(Gathering<S, T, D> in) {
  auto& shared = *shared_memory<GatheredTogether>();
  const auto place = in.tiles.place(blockIdx.x);
  const int64_t points = in.lists.volume.points;
  const int64_t first_voxel = int64_t(place.tile) * kGatherThreads, voxel = first_voxel + threadIdx.x;
  const int32_t first = place.part * kChannelsOfGather, rest = in.channels - first;
  const float* displacement = in.displacement + place.item * D * points;
  T* result = in.result + (place.item * in.channels_of_result + first) * points;
  const Sums<S> sums{in.gradient + (place.item * in.channels + first) * points, points,
                     rest < kChannelsOfGather ? rest : kChannelsOfGather};
  shared.is_long[threadIdx.x] = false;
  if (threadIdx.x == 0) shared.any_long = false;
  __syncthreads();
  if (voxel < points) {
    const Surroundings<D> around(in.lists, displacement, place.item, static_cast<uint32_t>(voxel));
    const uint32_t count = around.count();
    if (count > kLongestAlone) {
      shared.is_long[threadIdx.x] = shared.any_long = true;
    } else {
      gather_alone(sums, around, count, static_cast<uint32_t>(voxel), result);
    }
  }
  __syncthreads();
  if (!shared.any_long) return;
  for (int thread = 0; thread < kGatherThreads; ++thread) {
    if (!shared.is_long[thread]) continue;
    const uint32_t other = static_cast<uint32_t>(first_voxel) + thread;
    gather_together(sums, Surroundings<D>(in.lists, displacement, place.item, other), other, result);
  }
}

// result = the transpose of W(., displacement), applied to gradient, for the points in the lists.
template <typename S, typename T, int D, typename Launch>
void run_gather(const CellLists<D>& lists, int64_t batch, int64_t channels, int64_t channels_of_result,
                const S* gradient, const float* displacement, T* result, const Launch& launch) {
  const Tiles grid = tiles_of(lists.volume.points, divide_up(channels, kChannelsOfGather), kGatherThreads);
  const Gathering<S, T, D> in{lists, grid, int32_t(channels), channels_of_result, gradient, displacement, result};
  launch(&gather<S, T, D>, blocks_of(grid, batch), dim3(kGatherThreads), sizeof(GatheredTogether), in);
}

}  // namespace voxtrast
