// The masked mean cosine along a displacement field, and its gradients: kernels/warped_cosine_loss.py says what.
//
// The warped map is never stored: each thread warps the channels of its point as it goes over them.
#pragma once

#include "gather.cuh"
#include "reduction.cuh"
#include "scatter.cuh"

namespace voxtrast {

// Shorter vectors have no direction. The same number stands in kernels/warped_cosine_loss.py.
constexpr float kMinimumNorm = 1e-6f;

template <typename T, int D>
struct Maps {
  Volume<D> volume;
  int64_t batch;
  int32_t channels;
  const T* fixed;             // (B, C, points)
  const T* moving;            // (B, C, points)
  const float* displacement;  // (B, D, points)
  const float* mask;          // (B, points)

  __device__ int64_t plane(int64_t item, int64_t channel) const {
    return (item * channels + channel) * volume.points;
  }
  __device__ Cell<D> cell(int64_t item, uint32_t point) const {
    return Cell<D>(volume, point, displacement + item * D * volume.points + point);
  }
};

// Dot product and squared norms of the two vectors of a point.
struct Products {
  float dot = 0.0f, fixed = 0.0f, warped = 0.0f;

  template <typename T, int D>
  __device__ Products(const Maps<T, D>& in, const Corners<D>& corners, int64_t item, uint32_t point) {
    const int64_t points = in.volume.points;
    const T* here = in.fixed + in.plane(item, 0) + point;
    const T* there = in.moving + in.plane(item, 0);
#pragma unroll 2
    for (int32_t c = 0; c < in.channels; ++c, here += points, there += points) {
      const float value = load(here), other = corners.interpolate(there);
      dot += value * other;
      fixed += value * value;
      warped += other * other;
    }
  }

  // Product of the norms, or 0 where a vector has no direction.
  __device__ float norms() const {
    constexpr float minimum = kMinimumNorm * kMinimumNorm;
    return fixed < minimum || warped < minimum ? 0.0f : sqrtf(fixed) * sqrtf(warped);
  }
};

template <typename T, int D>
__global__ void __launch_bounds__(kThreads, 4) sum_cosines(Maps<T, D> in, Partial* partials) {
  reduce_points(in.batch, in.volume.points, partials, [&](int64_t item, int64_t point, Partial& partial) {
    const float weight = in.mask[item * in.volume.points + point];
    if (weight == 0.0f) return;
    const Corners<D> corners(in.cell(item, static_cast<uint32_t>(point)));
    const Products products(in, corners, item, static_cast<uint32_t>(point));
    const float norms = products.norms();
    partial.weight += weight;
    partial.sum += static_cast<double>(weight) * (norms == 0.0f ? 0.0f : products.dot / norms);
  });
}

template <typename T, int D, typename Launch>
void run_warped_cosine_loss(const Maps<T, D>& in, Partial* partials, float* loss, float* mask_sum,
                            const Launch& launch) {
  const int64_t count = partials_of(in.batch, in.volume.points);
  launch(&sum_cosines<T, D>, dim3(static_cast<unsigned>(count)), dim3(kThreads), kThreads * sizeof(Partial), in,
         partials);
  run_finish_loss<true>(partials, count, loss, mask_sum, launch);
}

// d loss / d fixed = along * warped - radial_fixed * fixed; d loss / d warped = along * fixed - radial_warped * warped.
// What is not needed is null.
template <typename T>
struct CosineGradients {
  const float* grad_loss;
  const float* mask_sum;
  T* fixed;             // (B, C, points)
  float* displacement;  // (B, D, points)
  float2* slopes;       // (B, points), (along, radial_warped): from them the gradient of moving is spread
};

template <typename T, int D>
__device__ void write_zeros_at(const Maps<T, D>& in, const CosineGradients<T>& to, int64_t item, int64_t point) {
  const int64_t points = in.volume.points;
  if (to.fixed != nullptr)
    for (int32_t c = 0; c < in.channels; ++c) to.fixed[in.plane(item, c) + point] = from_float<T>(0.0f);
  if (to.displacement != nullptr)
    for (int axis = 0; axis < D; ++axis) to.displacement[(item * D + axis) * points + point] = 0.0f;
}

// What belongs to a point alone.
template <typename T, int D>
__global__ void __launch_bounds__(kThreads, 2)
    differentiate_cosines(Maps<T, D> in, CosineGradients<T> to, Tiles tiles) {
  const auto place = tiles.place(blockIdx.x);
  const int64_t points = in.volume.points;
  const int64_t point = int64_t(place.tile) * kThreads + threadIdx.x;
  if (point >= points) return;
  const float weight = in.mask[place.item * points + point];
  if (weight == 0.0f) return write_zeros_at(in, to, place.item, point);
  const Cell<D> cell = in.cell(place.item, static_cast<uint32_t>(point));
  const Corners<D> corners(cell, to.displacement == nullptr ? 0 : cell.sloping());
  const Products products(in, corners, place.item, static_cast<uint32_t>(point));
  const float total = *to.mask_sum, norms = products.norms();
  const float factor = total == 0.0f ? 0.0f : -*to.grad_loss / total * weight;
  const float along = norms == 0.0f ? 0.0f : factor / norms;
  const float radial = norms == 0.0f ? 0.0f : factor * (products.dot / norms);  // of both, but for the squared norm
  const float radial_fixed = norms == 0.0f ? 0.0f : radial / products.fixed;
  const float radial_warped = norms == 0.0f ? 0.0f : radial / products.warped;
  if (to.slopes != nullptr) to.slopes[place.item * points + point] = make_float2(along, radial_warped);
  if (to.fixed == nullptr && to.displacement == nullptr) return;

  float product[Cell<D>::kCorners] = {};
  const int64_t start = in.plane(place.item, 0);
  const T *here = in.fixed + start + point, *there = in.moving + start;
  T* gradient = to.fixed + (to.fixed == nullptr ? 0 : start + point);
  for (int32_t c = 0; c < in.channels; ++c, here += points, there += points) {
    float value[Cell<D>::kCorners];
    corners.read(there, value);
    const float warped = corners.sum(value), fixed = load(here);
    const float slope = along * fixed - radial_warped * warped;
#pragma unroll
    for (int corner = 0; corner < Cell<D>::kCorners; ++corner)
      product[corner] += slope * value[corner];
    if (to.fixed != nullptr) {
      *gradient = from_float<T>(along * warped - radial_fixed * fixed);
      gradient += points;
    }
  }
  if (to.displacement != nullptr)
    cell.differentiate(product, points, to.displacement + place.item * D * points + point);
}

template <typename T, int D, typename Launch>
void run_differentiate_cosines(const Maps<T, D>& in, const CosineGradients<T>& to, const Launch& launch) {
  const Tiles grid = tiles_of(in.volume.points, 1);
  launch(&differentiate_cosines<T, D>, blocks_of(grid, in.batch), dim3(kThreads), 0, in, to, grid);
}

// Gradient of the warped map, found anew from the slopes. For scatter.
template <typename T>
struct CosineSlopes {
  const T* fixed;        // (B, C, points)
  const T* moving;       // (B, C, points)
  const float2* slopes;  // (B, points)
  float2 slope;

  __device__ void prepare(int64_t item, uint32_t point, int64_t points) { slope = slopes[item * points + point]; }

  template <int D>
  __device__ float operator()(const Corners<D>& corners, int64_t element, int64_t plane) const {
    return slope.x * load(fixed + element) - slope.y * corners.interpolate(moving + plane);
  }
};

// The same for the channels first .. first + count, stored: result (B, count, points), for gather.
template <typename T, int D>
__global__ void __launch_bounds__(kThreads)
    store_slopes(Maps<T, D> in, CosineSlopes<T> source, Tiles tiles, int32_t first, int32_t count, float* result) {
  const auto place = tiles.place(blockIdx.x);
  const int64_t points = in.volume.points;
  const int64_t point = int64_t(place.tile) * kThreads + threadIdx.x;
  if (point >= points || in.mask[place.item * points + point] == 0.0f) return;
  const Corners<D> corners(in.cell(place.item, static_cast<uint32_t>(point)));
  source.prepare(place.item, static_cast<uint32_t>(point), points);
#pragma unroll 2
  for (int32_t c = 0; c < count; ++c) {
    const int64_t plane = in.plane(place.item, first + c);
    result[(place.item * count + c) * points + point] = source(corners, plane + point, plane);
  }
}

// Channels whose gradients are stored at a time.
inline int64_t channels_at_once(int64_t channels) { return std::min<int64_t>(channels, kChannelsOfGather); }

// grad_moving (B, C, points), with lists of the points that have weight; stored (B, channels_at_once, points) is
// scratch memory.
template <typename T, int D, typename Launch>
void run_gather_cosines(const Maps<T, D>& in, const CellLists<D>& lists, const float2* slopes, float* stored,
                        T* grad_moving, const Launch& launch) {
  const CosineSlopes<T> source{in.fixed, in.moving, slopes, {}};
  const Tiles grid = tiles_of(in.volume.points, 1);
  for (int64_t first = 0; first < in.channels; first += kChannelsOfGather) {
    const int64_t count = channels_at_once(in.channels - first);
    launch(&store_slopes<T, D>, blocks_of(grid, in.batch), dim3(kThreads), 0, in, source, grid, int32_t(first),
           int32_t(count), stored);
    run_gather(lists, in.batch, count, in.channels, static_cast<const float*>(stored), in.displacement,
               grad_moving + first * in.volume.points, launch);
  }
}

}  // namespace voxtrast
