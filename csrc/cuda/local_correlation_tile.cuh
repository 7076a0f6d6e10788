// What the kernels of local_correlation share: the problem, its elements, and the tiles into which it is cut.
//
// A block owns a column of tile_width x tile_height voxels (x, y), one a thread, and marches along z. One plane of the
// other map at a time lies in shared memory with its halo; each of its vectors is read once for the 2 r + 1 voxels of
// the thread's column that see it. These are the slots, kept in registers: slot 0 has just been met (the plane lies r
// below it), slot 2 r is about to be complete. A 2-D map is a volume without y: its rows are the planes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace voxtrast::correlation {

enum class Element : int { kFloat32, kBfloat16, kFloat16 };

constexpr int kThreads = 256;  // of a block

// Of a block whose slots fill the registers: several small blocks, one of which computes while another loads.
constexpr int kFewThreads = 128;
constexpr int forward_threads(int radius) { return radius <= 2 ? kThreads : kFewThreads; }

// Blocks that a processor runs at a time, as registers allow.
constexpr int kForwardBlocks = 2;
constexpr int backward_blocks(int radius) { return radius == 1 ? 4 : radius == 2 ? 3 : 2; }
constexpr int kChannels = 8;  // of a unit, at most, outside the general kernels
// Logits may be large: where they change their base, what a float cannot hold of a factor is carried along.
constexpr float kLog2E = 1.4426950408889634f, kLog2ELow = 1.925963e-8f;
constexpr float kLn2 = 0.6931471805599453f, kLn2Low = -1.9046543e-9f;

struct Problem {
  int64_t count;  // batch * units
  int units, channels, radius, components;
  int depth, height, width;  // of the volume; height is 1 for a 2-D map
  int64_t points;
  float scale, scale_2, scale_2_low;  // the latter two: scale times log2(e)
  Element element;
  int tile_width, tile_height, chunk;          // voxels of a block
  int tiles_x, tiles_y, chunks;                // blocks along each axis
  int pitch, plane_points;                     // of a tile with its halo
  unsigned reciprocal;                         // of the pitch, times 2^20
  int64_t blocks;                              // of the whole grid
};

__device__ inline float exp2_fast(float value) {
#ifdef __CUDA_ARCH__
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(value));
  return result;
#else
  return exp2f(value);
#endif
}

// Calls function(T()) outside of the loops: inside, a branch would make every load wait for the one before.
template <class Function>
__device__ inline void with_element(Element element, Function function) {
  if (element == Element::kFloat32)
    function(float());
  else if (element == Element::kBfloat16)
    function(__nv_bfloat16());
  else
    function(__half());
}

struct Tile {
  int64_t problem;
  int x, y, begin, end;  // the first voxel, and the range along z

  __device__ Tile(const Problem& p, int64_t number) {
    x = static_cast<int>(number % p.tiles_x) * p.tile_width;
    number /= p.tiles_x;
    y = static_cast<int>(number % p.tiles_y) * p.tile_height;
    number /= p.tiles_y;
    begin = static_cast<int>(number % p.chunks) * p.chunk;
    end = min(begin + p.chunk, p.depth);
    problem = number / p.chunks;
  }
};

// The thread's column, and where its own vector lies in a plane in shared memory.
struct Column {
  int x, y, centre;
  int64_t offset;  // of the column's voxel at z = 0
  bool inside;

  __device__ Column(const Problem& p, const Tile& tile, int halo_y) {
    const int row = threadIdx.x / p.tile_width, column = threadIdx.x % p.tile_width;
    x = tile.x + column;
    y = tile.y + row;
    centre = (row + halo_y) * p.pitch + column + p.radius;
    offset = int64_t(y) * p.width + x;
    inside = x < p.width && y < p.height;
  }
};

__device__ inline float times(float value, float factor, float factor_low) {
  return fmaf(value, factor, value * factor_low);
}

// values[c] = map[c][at], times scale_2 if it is a query, 0 where the vector is not to be read
template <bool kIsQuery>
__device__ inline void load_vector(const Problem& p, const void* map, int64_t at, bool read,
                                   float (&values)[kChannels]) {
  const int count = read ? p.channels : 0;
  with_element(p.element, [&](auto type) {
    const auto* source = static_cast<const decltype(type)*>(map) + at;
#pragma unroll
    for (int c = 0; c < kChannels; ++c, source += p.points) values[c] = c < count ? static_cast<float>(*source) : 0.0f;
  });
  if constexpr (kIsQuery) {
#pragma unroll
    for (int c = 0; c < kChannels; ++c) values[c] = times(values[c], p.scale_2, p.scale_2_low);
  }
}

__device__ inline void store_vector(const Problem& p, void* map, int64_t at, float factor,
                                    const float (&values)[kChannels]) {
  with_element(p.element, [&](auto type) {
    auto* target = static_cast<decltype(type)*>(map) + at;
#pragma unroll
    for (int c = 0; c < kChannels; ++c, target += p.points)
      if (c < p.channels) *target = static_cast<decltype(type)>(factor * values[c]);
  });
}

// Calls store(position in the plane, offset in the volume, whether it lies inside) for the thread's part of a plane.
template <int kHaloY, class Store>
__device__ inline void for_plane(const Problem& p, const Tile& tile, int z, Store store) {
  for (int position = threadIdx.x; position < p.plane_points; position += blockDim.x) {
    const int row = static_cast<int>(position * p.reciprocal >> 20);
    const int x = tile.x + position - row * p.pitch - p.radius, y = tile.y + row - kHaloY;
    const bool inside = x >= 0 && x < p.width && y >= 0 && y < p.height;
    store(position, (int64_t(z) * p.height + y) * p.width + x, inside);
  }
}

// Vectors lie in shared memory as two arrays of float4: neighbouring threads read neighbouring 16 bytes.
template <int kHaloY>
__device__ inline void load_plane(const Problem& p, const Tile& tile, const void* map, int z, float4* plane) {
  if (z < 0 || z >= p.depth) return;
  const int64_t first = tile.problem * p.channels * p.points;
  for_plane<kHaloY>(p, tile, z, [&](int position, int64_t offset, bool inside) {
    float values[kChannels];
    load_vector<false>(p, map, first + offset, inside, values);
    plane[position] = make_float4(values[0], values[1], values[2], values[3]);
    plane[p.plane_points + position] = make_float4(values[4], values[5], values[6], values[7]);
  });
}

__device__ inline void read_vector(const Problem& p, const float4* plane, int position, float (&values)[kChannels]) {
  const float4 low = plane[position], high = plane[p.plane_points + position];
  values[0] = low.x, values[1] = low.y, values[2] = low.z, values[3] = low.w;
  values[4] = high.x, values[5] = high.y, values[6] = high.z, values[7] = high.w;
}

// Always in this order: backward repeats the logits of forward to the last bit, so that softmaxes sum to 1.
__device__ inline float dot(const float (&a)[kChannels], const float (&b)[kChannels]) {
  float sum = a[0] * b[0];
#pragma unroll
  for (int c = 1; c < kChannels; ++c) sum = fmaf(a[c], b[c], sum);
  return sum;
}

}  // namespace voxtrast::correlation
