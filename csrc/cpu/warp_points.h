// The work of the warp family on a block of neighbouring points, compiled once for each instruction set from
// warp_points.inl. What is computed: kernels/warp.py.
//
// A displaced point lies in a cell of the voxels' grid. The two corners of a cell along the last axis are neighbours in
// memory and are read, weighted and summed as one pair; a cell has 2 (in 2-D) or 4 (in 3-D) pairs. Where some corners
// lie outside, the nearest cell inside stands in, with weights that fit.
#pragma once

#include <stdint.h>

namespace voxtrast {

// Points of a block: their cells stay in the second-level cache, and a channel reads long stretches of its plane.
constexpr int64_t kBlock = 512;

enum class Element { float32, bfloat16, float16 };

// The voxels of one channel, the axes in the order of memory. The last one has at least 2 voxels, unless there is but
// one voxel at all.
template <int D>
struct Volume {
  int64_t size[D], stride[D];
  int64_t points;
  int component[D];             // of the displacement, that moves along the axis
  int64_t step[1 << (D - 1)];   // from the first pair of a cell to each
};

// Voxels begin .. end of the first axis, some or all.
struct Slab {
  int64_t begin, end;
};

template <int D>
struct Cells {
  int64_t first, count;  // the points
  int32_t coordinate[D][kBlock];
  int64_t base[kBlock];  // of the first corner
  // Of the corners, pair by pair.
  float weight[1 << (D - 1)][2 * kBlock];
  bool wanted[kBlock];   // by vector of points: whether any of them reaches the slab; if none, nothing else is known
  float start[kBlock];  // neutral element of the sum: -0, which keeps the sign of a zero; +0 outside the volume
};

// Sums (weight of a pair) x gradient, or gradient x (value of a corner), pair by pair.
template <int D>
using Products = float[1 << (D - 1)][2 * kBlock];

// displacement (D, points) and mask (points), or null: a point without weight lies outside, like one whose displacement
// is not finite or beyond 2^30. Arrays of floats hold kBlock numbers; what is read is followed by zeros.
template <int D>
struct PointPath {
  void (*locate)(const Volume<D>&, const float* displacement, const float* mask, const Slab&, int64_t first, Cells<D>&);

  // First and last voxel of the first axis that the points first .. first + kBlock read; low > high for none.
  void (*reach)(const Volume<D>&, const float* displacement, const float* mask, int64_t first, int32_t* low,
                int32_t* high);

  // Adds the transpose of the interpolation: sums (pairs) holds what the cell at each voxel gives to that voxel and to
  // the next, from the voxels before the slab to those behind it, which get a part of their sums alone. Pairs of
  // neighbours do not overlap in memory; an addition need not wait for the one before.
  void (*spread)(const Volume<D>&, const Cells<D>&, const Slab&, const float* gradient, float* sums, const float* next);

  // Gradient of the displacement (D, points) from the collected products.
  void (*differentiate)(const Volume<D>&, const float* displacement, const float* mask, const Cells<D>&,
                        const Products<D>& product, float* gradient);

  // By the type of a plane's elements.
  struct {
    // Of the points that are wanted. What these read of the next plane is brought to the cache.
    void (*interpolate)(const Volume<D>&, const Cells<D>&, const void* plane, const void* next, float* values);
    // The same, to an array of that type, plus what is added (null for nothing).
    void (*sample)(const Volume<D>&, const Cells<D>&, const void* plane, const void* next, const float* added,
                   void* values);
    void (*collect)(const Volume<D>&, const Cells<D>&, const void* plane, const void* next, const float* gradient,
                    Products<D>& product);
  } of[3];
};

struct WarpPath {
  PointPath<2> plane;
  PointPath<3> volume;

  // By the type of elements.
  struct {
    // Floats of `count` elements; 0 for one without weight.
    void (*read)(const void* from, const float* mask, int64_t count, float* to);
    // to[i] = a[i] x[i] - b[i] y[i]
    void (*write_difference)(const float* a, const float* x, const float* b, const float* y, int64_t count, void* to);
    // Sums of voxels from sums of pairs; before and after the latter, floats may be read.
    void (*join)(const float* sums, int64_t count, void* to);
  } of[3];

  // The sums of a block over channels, for the cosines of its points.
  void (*add_products)(const float* fixed, const float* warped, int64_t count, float* dot, float* fixed_norm,
                       float* warped_norm);

  // Cosine of each point from those sums (norms are squared), or 0 where a vector has no direction.
  void (*cosines)(const float* dot, const float* fixed_norm, const float* warped_norm, int64_t count, float* cosine);

  // d loss / d fixed = along * warped - radial_fixed * fixed
  // d loss / d warped = along * fixed - radial_warped * warped
  // where d loss / d cosine is `gradient`.
  void (*slopes)(const float* dot, const float* fixed_norm, const float* warped_norm, const float* gradient,
                 int64_t count, float* along, float* radial_fixed, float* radial_warped);
};

const WarpPath& warp_path();

template <int D>
const PointPath<D>& point_path() {
  if constexpr (D == 2) return warp_path().plane;
  else return warp_path().volume;
}

extern const WarpPath kPortableWarp;
#if defined(__x86_64__)
extern const WarpPath kAvx2Warp;
extern const WarpPath kAvx512Warp;
#endif

}  // namespace voxtrast
