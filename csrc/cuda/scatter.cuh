// The transpose of the interpolation by float atomics: the sums depend on the order in which threads arrive.
#pragma once

#include <type_traits>

#include "zeros.cuh"

namespace voxtrast {

// Gradient of the warped image where it was stored.
template <typename S>
struct StoredGradient {
  const S* gradient;  // (B, C, points)

  __device__ void prepare(int64_t, uint32_t, int64_t) {}

  template <int D>
  __device__ float operator()(const Corners<D>&, int64_t element, int64_t) const {
    return load(gradient + element);
  }
};

template <typename Source, int D>
struct Scattering {
  Volume<D> volume;
  Tiles tiles;
  int32_t channels;
  Source source;
  const float* displacement;  // (B, D, points)
  const float* mask;          // (B, points) or null
  float* result;              // (B, C, points), zeros on entry
};

template <typename Source, int D>
__global__ void __launch_bounds__(kThreads) scatter(Scattering<Source, D> in) {
  const auto place = in.tiles.place(blockIdx.x);
  const int64_t point = int64_t(place.tile) * kThreads + threadIdx.x;
  const int64_t points = in.volume.points;
  if (point >= points) return;
  if (in.mask != nullptr && in.mask[place.item * points + point] == 0.0f) return;
  const Cell<D> cell(in.volume, static_cast<uint32_t>(point), in.displacement + place.item * D * points + point);
  const Corners<D> corners(cell);
  Source source = in.source;
  source.prepare(place.item, static_cast<uint32_t>(point), points);
  for (int32_t c = 0; c < in.channels; ++c) {
    const int64_t plane = (place.item * in.channels + c) * points;
    const float gradient = source(corners, plane + point, plane);
#pragma unroll
    for (int corner = 0; corner < Corners<D>::kCorners; ++corner)
      if (corners.weight[corner] != 0.0f)
        atomicAdd(in.result + plane + corners.offset[corner], corners.weight[corner] * gradient);
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads) convert(const float* sums, T* result, int64_t count) {
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t n = int64_t(blockIdx.x) * kThreads + threadIdx.x; n < count; n += step)
    result[n] = from_float<T>(sums[n]);
}

// Elements of scratch memory that float32 sums of a result in T take.
template <typename T>
int64_t elements_of_sums(int64_t elements) {
  return std::is_same_v<T, float> ? 0 : elements;
}

// result (B, C, points) = the transpose of W(., displacement), applied to what source gives; sums is scratch memory.
template <typename T, typename Source, int D, typename Launch>
void run_scatter(const Volume<D>& volume, int64_t batch, int64_t channels, const Source& source,
                 const float* displacement, const float* mask, float* sums, T* result, const Launch& launch) {
  const Tiles grid = tiles_of(volume.points, 1);
  const int64_t elements = batch * channels * volume.points;
  if constexpr (std::is_same_v<T, float>) sums = result;
  run_write_zeros(reinterpret_cast<uint32_t*>(sums), elements, launch);
  const Scattering<Source, D> in{volume, grid, int32_t(channels), source, displacement, mask, sums};
  launch(&scatter<Source, D>, blocks_of(grid, batch), dim3(kThreads), 0, in);
  if constexpr (!std::is_same_v<T, float>) {
    const int64_t blocks = std::min<int64_t>(divide_up(elements, kThreads), 2 * kEnoughBlocks);
    launch(&convert<T>, dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, static_cast<const float*>(sums), result,
           elements);
  }
}

}  // namespace voxtrast
