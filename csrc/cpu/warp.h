// The two loops of the warp family: reading an image at displaced points, and the transpose of that.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "interpolation.h"
#include "memory.h"

namespace voxtrast {

// A tensor that the caller will fill.
inline torch::stable::Tensor new_result(const torch::stable::Tensor& like, bool needed = true) {
  if (!needed) return torch::stable::new_empty(like, {0});
  torch::stable::Tensor result = torch::stable::new_empty(like, like.sizes());
  prefer_large_pages(result.mutable_data_ptr(), result.numel() * result.element_size());
  return result;
}

// output(b, c, p) = W(image, displacement)(p), plus displacement(b, c, p) where AddDisplacement (c is then an axis).
template <typename T, int D, bool AddDisplacement>
void sample(const torch::stable::Tensor& image, torch::headeronly::IntHeaderOnlyArrayRef sizes,
            const torch::stable::Tensor& displacement, T* output) {
  const Volume<D> volume = make_volume<D>(sizes);
  const PointPath<D>& path = point_path<D>();
  const int64_t batch = sizes[0], channels = sizes[1], points = volume.points, count = blocks(volume);
  const float* shift = float_data(displacement, batch * D * points, "displacement");
  const T* values = image.const_data_ptr<T>();
  torch::stable::parallel_for(0, batch * count, grain(kBlock * channels), [&](int64_t begin, int64_t end) {
    Cells<D> cells;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / count, first = item % count * kBlock;
      path.locate(volume, shift + b * D * points, nullptr, whole(volume), first, cells);
      for (int64_t c = 0; c < channels; ++c) {
        const int64_t plane = (b * channels + c) * points;
        const float* added = AddDisplacement ? shift + plane + first : nullptr;
        const T* next = values + plane + (c + 1 < channels ? points : 0);
        path.of[kElement<T>].sample(volume, cells, values + plane, next, added, output + plane + first);
      }
    }
  });
}

// First and last voxels of the first axis that the points of each block read.
struct Reach {
  std::vector<int32_t> low, high;

  template <int D>
  Reach(const Volume<D>& volume, int64_t batch, const float* displacement, const float* mask)
      : low(batch * blocks(volume)), high(batch * blocks(volume)) {
    const int64_t count = blocks(volume), points = volume.points;
    torch::stable::parallel_for(0, batch * count, grain(kBlock / 4), [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t b = item / count;
        point_path<D>().reach(volume, displacement + b * D * points, mask == nullptr ? nullptr : mask + b * points,
                              item % count * kBlock, &low[item], &high[item]);
      }
    });
  }
};

// How the sums of a plane are cut along the first axis. What is chosen here does not show in the result.
template <int D>
struct Slabs {
  int64_t thickness, count, channels;  // channels that share the cells of the points
  int64_t pairs;                       // of a slab, with the voxels before and after it that share cells with it

  Slabs(const Volume<D>& volume, int64_t planes, int64_t channels_given) {
    constexpr int64_t kPairs = int64_t(1) << 17, kLeast = 4;
    const int64_t stride = volume.stride[0], size = volume.size[0];
    channels = std::min<int64_t>(8, channels_given);
    thickness = std::max(kLeast, kPairs / stride - 2);
    // Enough of them for every thread.
    const int64_t wanted = 4 * torch::stable::get_num_threads() * channels / planes + 1;
    thickness = std::min(std::max(kLeast, std::min(thickness, (size + wanted - 1) / wanted)), size);
    count = (size + thickness - 1) / thickness;
    pairs = (thickness + 2) * stride;
  }
};

// grad_image (B, C, *S) = transpose of the interpolation of gradients at the displaced points.
// fill(cells, b, c, gradient) writes the gradients of one channel at the points of a block.
// Whoever owns a slab of a plane visits the blocks that reach it in their order. Every sum has one order, whatever the
// number of slabs and threads.
template <typename T, int D, typename Fill>
void scatter(const Volume<D>& volume, int64_t batch, int64_t channels, const float* displacement, const float* mask,
             T* grad_image, const Fill& fill) {
  constexpr int64_t kMargin = 64;  // floats that may be read before and after the sums
  const PointPath<D>& path = point_path<D>();
  const Reach reach(volume, batch, displacement, mask);
  const Slabs<D> slabs(volume, batch * channels, channels);
  const int64_t groups = (channels + slabs.channels - 1) / slabs.channels;
  const int64_t count = blocks(volume), points = volume.points, stride = volume.stride[0];
  torch::stable::parallel_for(0, batch * groups * slabs.count, 1, [&](int64_t begin, int64_t end) {
    Cells<D> cells;
    float gradient[kBlock] = {};
    Buffer<float> memory;
    const int64_t row = 2 * slabs.pairs + 2 * kMargin;
    float* sums = memory.of(slabs.channels * row);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / (groups * slabs.count), group = item / slabs.count % groups;
      const int64_t start = item % slabs.count * slabs.thickness;
      const Slab slab = {start, std::min(start + slabs.thickness, volume.size[0])};
      const int64_t first = group * slabs.channels, last = std::min(first + slabs.channels, channels);
      std::fill(sums, sums + (last - first) * row, 0.0f);
      for (int64_t block = 0; block < count; ++block) {
        if (reach.high[b * count + block] < slab.begin || reach.low[b * count + block] >= slab.end) continue;
        const float* shift = displacement + b * D * points;
        const float* weight = mask == nullptr ? nullptr : mask + b * points;
        path.locate(volume, shift, weight, slab, block * kBlock, cells);
        for (int64_t c = first; c < last; ++c) {
          fill(cells, b, c, gradient);
          float* plane = sums + (c - first) * row + kMargin;
          path.spread(volume, cells, slab, gradient, plane, plane + (c + 1 < last ? row : 0));
        }
      }
      for (int64_t c = first; c < last; ++c)
        warp_path().of[kElement<T>].join(sums + (c - first) * row + kMargin + 2 * stride,
                                         (slab.end - slab.begin) * stride,
                                         grad_image + (b * channels + c) * points + slab.begin * stride);
    }
  });
}

}  // namespace voxtrast
