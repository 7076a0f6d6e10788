// Reading an image at displaced points, and the gradient of the displacement. What is computed: kernels/warp.py.
#pragma once

#include <algorithm>

#include "interpolation.cuh"
#include "shared_memory.cuh"

namespace voxtrast {

constexpr int kThreads = 256;

// Blocks that keep the largest devices busy. It does not ask the device: the same everywhere, and in every test.
constexpr int64_t kEnoughBlocks = 2048;

constexpr int64_t divide_up(int64_t count, int64_t by) { return (count + by - 1) / by; }

inline Tiles tiles_of(int64_t points, int64_t parts, int threads = kThreads) {
  return {static_cast<uint32_t>(divide_up(points, threads)), static_cast<uint32_t>(parts)};
}

inline dim3 blocks_of(const Tiles& tiles, int64_t items) {
  return dim3(static_cast<unsigned>(items * tiles.parts * tiles.tiles));
}

template <typename T, int D>
struct Sampling {
  Volume<D> volume;
  Tiles tiles;
  int32_t channels, channels_of_part;
  const T* image;             // (B, C, points)
  const float* displacement;  // (B, D, points)
  T* output;                  // (B, C, points)
};

// output(b, c, p) = W(image, displacement)(p), plus displacement(b, c, p) where AddDisplacement (c is then an axis).
template <typename T, int D, bool AddDisplacement>
__global__ void __launch_bounds__(kThreads) sample(Sampling<T, D> in) {
  const auto place = in.tiles.place(blockIdx.x);
  const int64_t point = int64_t(place.tile) * kThreads + threadIdx.x;
  if (point >= in.volume.points) return;
  const int64_t points = in.volume.points;
  const float* shift = in.displacement + place.item * D * points + point;
  const Cell<D> cell(in.volume, static_cast<uint32_t>(point), shift);
  const Corners<D> corners(cell);
  const int32_t first = place.part * in.channels_of_part;
  const int32_t rest = in.channels - first, count = rest < in.channels_of_part ? rest : in.channels_of_part;
  const int64_t start = (place.item * in.channels + first) * points;
  const T* plane = in.image + start;
  T* target = in.output + start + point;
#pragma unroll(D == 2 ? 4 : 2)
  for (int32_t c = 0; c < count; ++c, plane += points, target += points) {
    float value = corners.interpolate(plane);
    if constexpr (AddDisplacement) value += shift[(first + c) * points];
    *target = from_float<T>(value);
  }
}

template <typename T, int D, bool AddDisplacement, typename Launch>
void run_sample(const Volume<D>& volume, int64_t batch, int64_t channels, const T* image, const float* displacement,
                T* output, const Launch& launch) {
  // Small volumes split their channels over blocks, each of which finds the neighbours anew.
  const int64_t tiles = divide_up(volume.points, kThreads);
  const int64_t wanted = std::clamp<int64_t>(kEnoughBlocks / (batch * tiles), 1, channels);
  const int64_t channels_of_part = divide_up(channels, wanted);
  const Tiles grid = tiles_of(volume.points, divide_up(channels, channels_of_part));
  const Sampling<T, D> in{volume, grid, int32_t(channels), int32_t(channels_of_part), image, displacement, output};
  launch(&sample<T, D, AddDisplacement>, blocks_of(grid, batch), dim3(kThreads), 0, in);
}

template <typename T, int D>
struct Differentiation {
  Volume<D> volume;
  Tiles tiles;
  int32_t channels;
  const T* gradient;          // (B, C, points), of the output
  const T* image;             // (B, C, points)
  const float* displacement;  // (B, D, points)
  float* grad_displacement;   // (B, D, points)
};

template <typename T, int D>
__global__ void __launch_bounds__(kThreads, 3) differentiate_displacement(Differentiation<T, D> in) {
  const auto place = in.tiles.place(blockIdx.x);
  const int64_t point = int64_t(place.tile) * kThreads + threadIdx.x;
  if (point >= in.volume.points) return;
  const int64_t points = in.volume.points;
  const int64_t field = place.item * D * points + point;
  const Cell<D> cell(in.volume, static_cast<uint32_t>(point), in.displacement + field);
  const Corners<D> corners(cell, cell.sloping());
  float product[Cell<D>::kCorners] = {};
  const T* plane = in.image + place.item * in.channels * points;
  const T* gradient = in.gradient + place.item * in.channels * points + point;
#pragma unroll 2
  for (int32_t c = 0; c < in.channels; ++c, plane += points, gradient += points) {
    const float slope = load(gradient);
#pragma unroll
    for (int corner = 0; corner < Cell<D>::kCorners; ++corner)
      product[corner] += slope * load(plane + corners.offset[corner]);
  }
  cell.differentiate(product, points, in.grad_displacement + field);
}

template <typename T, int D, typename Launch>
void run_differentiate_displacement(const Volume<D>& volume, int64_t batch, int64_t channels, const T* gradient,
                                    const T* image, const float* displacement, float* grad_displacement,
                                    const Launch& launch) {
  const Tiles grid = tiles_of(volume.points, 1);
  const Differentiation<T, D> in{volume, grid, int32_t(channels), gradient, image, displacement, grad_displacement};
  launch(&differentiate_displacement<T, D>, blocks_of(grid, batch), dim3(kThreads), 0, in);
}

}  // namespace voxtrast
