// The transpose of the interpolation, the same bits every time: each voxel sums what the points around it send.
//
// Lists of points come in any order, so the sum is one of whole numbers: a voxel's contributions are rounded to
// multiples of its largest one over 2^61 and more, divided by their number, which loses less than float32 sums do.
#pragma once

#include "cells.cuh"

namespace voxtrast {

constexpr int kGatherThreads = 128;
constexpr int kChannelsOfGather = 8;     // share the walk along the lists
constexpr uint32_t kLongestAlone = 256;  // points that a thread sums by itself; beyond them its block helps

// Contributions that no whole number holds, two bits a channel: +infinity, -infinity, or NaN as both.
__device__ inline uint32_t mark_of(float value, int channel) {
  if (value - value == 0.0f) return 0;
  return (value > 0.0f ? 1u : value < 0.0f ? 2u : 3u) << 2 * channel;
}

// The unit of the sum of `count` numbers of which `largest` is the largest magnitude: a power of two, given by its
// exponent. Sums stay below 2^62.
__device__ inline int exponent_of_unit(float largest, uint32_t count) {
  const int above = static_cast<int>(__builtin_bit_cast(uint32_t, largest) >> 23) - 126;  // largest < 2^above
  int bits = 0;
  while (bits < 32 && uint64_t(1) << bits < count) ++bits;
  return above + bits - 62;
}

__device__ inline double power_of_two(int exponent) {
  return __builtin_bit_cast(double, static_cast<uint64_t>(exponent + 1023) << 52);
}

__device__ inline float value_of_sum(long long sum, int exponent, uint32_t mark) {
  constexpr float infinity = __builtin_inff();
  if (mark == 3) return infinity - infinity;
  if (mark != 0) return mark == 1 ? infinity : -infinity;
  return static_cast<float>(static_cast<double>(sum) * power_of_two(exponent));
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
  static constexpr int kCorners = 1 << D;

  uint32_t begin[kCorners], end[kCorners];
  uint32_t count;

  __device__ Surroundings(const CellLists<D>& lists, int64_t item, uint32_t voxel) : count(0) {
    int32_t here[D];
    lists.volume.locate(voxel, here);
    const uint32_t* slots = lists.slots + item * lists.slots_of_item;
#pragma unroll
    for (int corner = 0; corner < kCorners; ++corner) {
      int32_t lowest[D];
#pragma unroll
      for (int axis = 0; axis < D; ++axis) lowest[axis] = here[axis] - side_of<D>(corner, axis);
      const uint32_t slot = lists.slot(lowest);
      begin[corner] = slots[slot];
      end[corner] = slots[slot + 1];
      count += end[corner] - begin[corner];
    }
  }

  // Calls work(point, weight) for each point that weighs the voxel: every `lanes`-th, from `lane` on.
  template <typename Work>
  __device__ void visit(const CellLists<D>& lists, const float* displacement, const uint32_t* listed, uint32_t lane,
                        uint32_t lanes, const Work& work) const {
#pragma unroll
    for (int corner = 0; corner < kCorners; ++corner) {
      for (uint64_t n = uint64_t(begin[corner]) + lane; n < end[corner]; n += lanes) {
        const uint32_t point = listed[n];
        float weight = 1.0f;
#pragma unroll
        for (int axis = 0; axis < D; ++axis) {
          const float shift = displacement[axis * int64_t(lists.volume.points) + point];
          const float fraction = shift - floorf(shift);
          weight *= side_of<D>(corner, axis) ? fraction : 1.0f - fraction;
        }
        if (weight != 0.0f) work(point, weight);
      }
    }
  }
};

// What one thread knows of the sums of a voxel, for a group of channels.
template <typename S>
struct Sums {
  const S* gradient;  // (count, points)
  int64_t points;
  int count;
  float largest[kChannelsOfGather] = {};
  long long total[kChannelsOfGather] = {};
  uint32_t marks = 0;

  __device__ void measure(uint32_t point, float weight) {
#pragma unroll
    for (int c = 0; c < kChannelsOfGather; ++c) {
      if (c >= count) continue;
      const float value = weight * to_float(gradient[c * points + point]);
      const uint32_t mark = mark_of(value, c);
      marks |= mark;
      if (mark == 0) largest[c] = fmaxf(largest[c], fabsf(value));
    }
  }

  __device__ void add(uint32_t point, float weight, const int* exponent) {
#pragma unroll
    for (int c = 0; c < kChannelsOfGather; ++c) {
      if (c >= count) continue;
      const float value = weight * to_float(gradient[c * points + point]);
      if (mark_of(value, c) == 0) total[c] += llrint(static_cast<double>(value) * power_of_two(-exponent[c]));
    }
  }
};

struct GatheredTogether {
  unsigned long long total[kChannelsOfGather];
  uint32_t largest[kChannelsOfGather];  // bits of a float that is not negative: ordered as the floats are
  uint32_t marks;
  bool any_long;
  bool is_long[kGatherThreads];
};

// Whole blocks sum the voxels of their tile that have long lists, one after the other.
template <typename S, typename T, int D>
__device__ void gather_together(const Gathering<S, T, D>& in, const Sums<S>& empty, int64_t item, uint32_t voxel,
                                const float* displacement, const uint32_t* listed, T* result) {
  auto& shared = *shared_memory<GatheredTogether>();
  Sums<S> sums = empty;
  const Surroundings<D> around(in.lists, item, voxel);
  if (threadIdx.x < kChannelsOfGather) shared.largest[threadIdx.x] = 0, shared.total[threadIdx.x] = 0;
  if (threadIdx.x == 0) shared.marks = 0;
  __syncthreads();
  around.visit(in.lists, displacement, listed, threadIdx.x, kGatherThreads,
               [&](uint32_t point, float weight) { sums.measure(point, weight); });
  for (int c = 0; c < sums.count; ++c) atomicMax(&shared.largest[c], __builtin_bit_cast(uint32_t, sums.largest[c]));
  atomicOr(&shared.marks, sums.marks);
  __syncthreads();
  int exponent[kChannelsOfGather];
#pragma unroll
  for (int c = 0; c < kChannelsOfGather; ++c)
    exponent[c] = exponent_of_unit(__builtin_bit_cast(float, shared.largest[c]), around.count);
  around.visit(in.lists, displacement, listed, threadIdx.x, kGatherThreads,
               [&](uint32_t point, float weight) { sums.add(point, weight, exponent); });
  for (int c = 0; c < sums.count; ++c) atomicAdd(&shared.total[c], static_cast<unsigned long long>(sums.total[c]));
  __syncthreads();
#pragma unroll
  for (int c = 0; c < kChannelsOfGather; ++c)
    if (c < sums.count && threadIdx.x == c)
      result[c * sums.points + voxel] =
          from_float<T>(value_of_sum(static_cast<long long>(shared.total[c]), exponent[c], shared.marks >> 2 * c & 3));
  __syncthreads();
}

template <typename S, typename T, int D>
__global__ void __launch_bounds__(kGatherThreads) gather(Gathering<S, T, D> in) {
  auto& shared = *shared_memory<GatheredTogether>();
  const auto place = in.tiles.place(blockIdx.x);
  const int64_t points = in.lists.volume.points;
  const int64_t voxel = int64_t(place.tile) * kGatherThreads + threadIdx.x;
  const int32_t first = place.part * kChannelsOfGather, rest = in.channels - first;
  const float* displacement = in.displacement + place.item * D * points;
  const uint32_t* listed = in.lists.points + place.item * points;
  T* result = in.result + (place.item * in.channels_of_result + first) * points;
  Sums<S> sums{in.gradient + (place.item * in.channels + first) * points, points,
               rest < kChannelsOfGather ? rest : kChannelsOfGather};
  const Sums<S> empty = sums;
  shared.is_long[threadIdx.x] = false;
  if (threadIdx.x == 0) shared.any_long = false;
  __syncthreads();
  if (voxel < points) {
    const Surroundings<D> around(in.lists, place.item, static_cast<uint32_t>(voxel));
    if (around.count > kLongestAlone) {
      shared.is_long[threadIdx.x] = shared.any_long = true;
    } else {
      around.visit(in.lists, displacement, listed, 0, 1,
                   [&](uint32_t point, float weight) { sums.measure(point, weight); });
      int exponent[kChannelsOfGather];
#pragma unroll
      for (int c = 0; c < kChannelsOfGather; ++c) exponent[c] = exponent_of_unit(sums.largest[c], around.count);
      around.visit(in.lists, displacement, listed, 0, 1,
                   [&](uint32_t point, float weight) { sums.add(point, weight, exponent); });
#pragma unroll
      for (int c = 0; c < kChannelsOfGather; ++c)
        if (c < sums.count)
          result[c * points + voxel] =
              from_float<T>(value_of_sum(sums.total[c], exponent[c], sums.marks >> 2 * c & 3));
    }
  }
  __syncthreads();
  if (!shared.any_long) return;
  for (int thread = 0; thread < kGatherThreads; ++thread)
    if (shared.is_long[thread])
      gather_together(in, empty, place.item, place.tile * kGatherThreads + thread, displacement, listed, result);
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
