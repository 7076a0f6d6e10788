// Chooses and starts the kernels of local_correlation: on a GPU (local_correlation.cu), or under the tests' emulation.
#pragma once

#include "local_correlation_backward.cuh"
#include "local_correlation_forward.cuh"
#include "local_correlation_general.cuh"

#include <algorithm>
#include <initializer_list>
#include <type_traits>

namespace voxtrast::correlation {

constexpr int kMostRadius = 4;  // of the kernels that are compiled for one radius
constexpr int64_t kMostBlocks = 0x7fffffff;

inline bool is_general(const Problem& p) { return p.radius > kMostRadius || p.channels > kChannels; }

// sizes: (depth, height, width) or (height, width)
inline Problem describe(int64_t batch, int64_t units, int64_t channels, const int64_t* sizes, int dimensions,
                        int64_t radius, double scale, Element element) {
  Problem p = {};
  p.count = batch * units;
  p.units = static_cast<int>(units);
  p.channels = static_cast<int>(channels);
  p.components = dimensions;
  p.depth = static_cast<int>(sizes[0]);
  p.height = dimensions == 3 ? static_cast<int>(sizes[1]) : 1;
  p.width = static_cast<int>(sizes[dimensions - 1]);
  p.points = int64_t(p.depth) * p.height * p.width;
  // A wider window sees no more voxels.
  p.radius = static_cast<int>(std::min<int64_t>(radius, std::max({p.depth, p.height, p.width})));
  const double scale_2 = scale * 1.4426950408889634;
  p.scale = static_cast<float>(scale);
  p.scale_2 = static_cast<float>(scale_2);
  p.scale_2_low = static_cast<float>(scale_2 - p.scale_2);
  p.element = element;
  return p;
}

// Cuts the problem into the tiles of blocks of at most `threads`, of which a processor runs `resident` at a time.
inline Problem cut(Problem p, int threads, int resident, int processors) {
  const bool volume = p.components == 3;
  p.tile_width = !volume ? std::min(threads, (p.width + 31) / 32 * 32) : p.width > 16 ? 32 : p.width > 8 ? 16 : 8;
  const int rows = 32 / std::min(p.tile_width, 32);  // of a warp
  p.tile_height = volume ? std::min(threads / p.tile_width, (p.height + rows - 1) / rows * rows) : 1;
  p.pitch = p.tile_width + 2 * p.radius;
  p.plane_points = p.pitch * (p.tile_height + (volume ? 2 * p.radius : 0));
  p.reciprocal = ((1u << 20) + p.pitch - 1) / p.pitch;
  p.tiles_x = (p.width + p.tile_width - 1) / p.tile_width;
  p.tiles_y = (p.height + p.tile_height - 1) / p.tile_height;
  // Each chunk meets 2 r planes besides its own: as many chunks as make the device finish first.
  const int64_t columns = p.count * p.tiles_x * p.tiles_y, together = int64_t(resident) * processors;
  int64_t least = INT64_MAX;
  for (int chunks = 1; chunks <= std::min(p.depth, 64); ++chunks) {
    const int chunk = (p.depth + chunks - 1) / chunks;
    const int64_t time = (columns * chunks + together - 1) / together * (chunk + 2 * p.radius);
    if (time >= least) continue;
    least = time;
    p.chunk = chunk;
  }
  p.chunks = (p.depth + p.chunk - 1) / p.chunk;
  p.blocks = columns * p.chunks;
  return p;
}

// Calls function(radius, is_volume) with constants.
template <class Function>
void with_radius(const Problem& p, Function function) {
  const auto with = [&](auto radius) {
    if (p.components == 3)
      function(radius, std::true_type());
    else
      function(radius, std::false_type());
  };
  switch (p.radius) {
    case 1: return with(std::integral_constant<int, 1>());
    case 2: return with(std::integral_constant<int, 2>());
    case 3: return with(std::integral_constant<int, 3>());
    default: return with(std::integral_constant<int, 4>());
  }
}

inline dim3 blocks_for(int64_t blocks) { return dim3(static_cast<unsigned>(std::min(blocks, kMostBlocks))); }
inline dim3 blocks_for_items(int64_t items) { return blocks_for((items + kThreads - 1) / kThreads); }

// With one unit, mean is not written: the displacement is the mean.
template <class Launch>
void forward(const Launch& launch, const Problem& given, int processors, const void* query, const void* key,
             float* displacement, float* log_sum_exp, float* mean) {
  const Problem p = cut(given, forward_threads(given.radius), kForwardBlocks, processors);
  float* const means = p.units == 1 ? displacement : mean;
  if (is_general(p)) {
    launch(&correlate_general, blocks_for_items(p.count * p.points), dim3(kThreads), 0, p, query, key, means,
           log_sum_exp);
  } else {
    const size_t bytes = 2 * sizeof(float) * kChannels * p.plane_points;
    with_radius(p, [&](auto radius, auto is_volume) {
      launch(&correlate<radius.value, is_volume.value>, blocks_for(p.blocks), dim3(p.tile_width * p.tile_height),
             bytes, p, query, key, means, log_sum_exp);
    });
  }
  if (p.units == 1) return;
  const int64_t batch = p.count / p.units, values = p.components * p.points;
  launch(&average_units, blocks_for_items(batch * values), dim3(kThreads), 0, mean, displacement, batch, p.units,
         values);
}

// grad_query, grad_key: nullptr where not needed
template <class Launch>
void backward(const Launch& launch, const Problem& whole, int processors, const Gradients& given, const void* query,
              const void* key, void* grad_query, void* grad_key) {
  const Problem p = cut(whole, kFewThreads, backward_blocks(whole.radius), processors);
  if (is_general(p)) {
    const int64_t groups = (p.channels + kChannels - 1) / kChannels;
    const dim3 grid = blocks_for_items(groups * p.count * p.points), block(kThreads);
    const bool volume = p.components == 3;
    if (grad_query)
      launch(volume ? &differentiate_general<false, true> : &differentiate_general<false, false>, grid, block, 0, p,
             given, query, key, grad_query);
    if (grad_key)
      launch(volume ? &differentiate_general<true, true> : &differentiate_general<true, false>, grid, block, 0, p,
             given, query, key, grad_key);
    return;
  }
  const dim3 grid = blocks_for(p.blocks), block(p.tile_width * p.tile_height);
  const size_t pull_bytes = 2 * (2 * p.radius + 1) * sizeof(float4) * block.x;
  const size_t key_bytes = 2 * sizeof(float) * kChannels * p.plane_points + pull_bytes;
  const size_t query_bytes = 2 * (sizeof(float) * kQueryFloats * p.plane_points + 15) / 16 * 16;
  with_radius(p, [&](auto radius, auto is_volume) {
    if (grad_query)
      launch(&differentiate_query<radius.value, is_volume.value>, grid, block, key_bytes, p, given, query, key,
             grad_query);
    if (grad_key)
      launch(&differentiate_key<radius.value, is_volume.value>, grid, block, query_bytes, p, given, query, key,
             grad_key);
  });
}

}  // namespace voxtrast::correlation
