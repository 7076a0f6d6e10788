// One view of one slot from the voxels that were read for it and its plan, on one thread of a CPU. No library is needed.
//
// What plan.h leaves open is decided as follows.
// - Outside the region everything is background; between a voxel at its border and the next one outside, values are
//   interpolated. Nearest neighbours (labels): the voxel at floor(coordinate + 1/2).
// - Gaussians end at gaussian_radius(sigma) voxels and their weights sum to 1; beyond the border the last voxel is repeated.
// - A voxel within kBorder of the border of the partner or of the volume still counts as inside: rounding must not
//   decide where the border of one view is that of the other. Of a plane (depth 1) the partner's depth is not asked.
// - gamma and bezier leave a constant view as it is; gamma inverted is low + high - gamma(low + high - v).
// - bezier reads its table linearly. A bias field's coordinate along an axis of one voxel is 0.
// - low_resolution: an axis of n voxels gets m = max(1, floor(n / factor + 1/2)). Voxel j of the coarse grid is voxel
//   floor((2 j + 1) n / (2 m)) of the view; voxel i is read at (i + 1/2) m / n - 1/2, between 0 and m - 1.
// - pixel_shuffle: see permutation.h. patch_swap of two boxes that overlap: the first is written over by the second,
//   then the second by what the first was.
// - Random numbers: words of philox(seed, block, step.stream, slot, step), see random.h. U(low, high) is
//   low + (high - low) uniform(word); two normal numbers are made of the words 0 and 1 of a block, two of 2 and 3:
//   sqrt(-2 ln u) cos(t), sqrt(-2 ln u) sin(t) with u = (1 + (word >> 8)) / 2^24 and t = 2 pi int32(next word) / 2^32.
//
// Equal bit for bit between runs and threads. Between instruction sets the random words, the uniform numbers and all that
// is only moved are equal; what is computed with them differs by float32's rounding where products and sums are fused.
#pragma once

#include <cstdint>
#include <memory>

#include "../geometry/plan.h"

namespace voxtrast {

constexpr double kBorder = 1e-5;         // voxels
constexpr double kFarthest = 1 << 29;    // voxels: whole coordinates and their sums fit 32 bits

enum class VoxelType : int32_t { float32, float16 };
enum class Interpolation : int32_t { linear, nearest };

struct Region {
  const void* voxels = nullptr;  // of the box, in C order
  VoxelType type{};
  Box box;        // in the volume
  Index3 volume{};
  float background = 0.0f;
};

// Where random numbers are asked for, besides the step's stream.
struct DrawKey {
  uint64_t seed = 0;
  uint32_t slot = 0, step = 0;
};

// Null for what is not wanted. In C order, of the size of the view.
struct ViewOutput {
  float* view = nullptr;
  float* clean = nullptr;         // the view before its steps
  float* displacement = nullptr;  // psi, its components first: 3, or 2 (H, W) of a view of depth 1
  float* mask = nullptr;          // 1 where psi is valid, else 0

  bool with_field() const { return displacement != nullptr || mask != nullptr; }
};

// Throws std::invalid_argument for a geometry that cannot be carried out, saying why.
void check_view(const Region& region, const ViewPlan& plan, const ViewOutput& output);

// psi without the deformation: (M L - I) p + M t + m for to_volume = (L, t), from_volume = (M, m). To it comes M shift.
Affine field_affine(const ViewPlan& plan);

// The memory that making views takes besides, kept from one view to the next. Not shared by threads.
class ViewWorkspace {
 public:
  ViewWorkspace();
  ~ViewWorkspace();
  struct Buffers;
  Buffers& buffers() { return *buffers_; }

 private:
  std::unique_ptr<Buffers> buffers_;
};

// Throws std::invalid_argument for a plan that cannot be carried out, saying why.
void make_view(const Region& region, const ViewPlan& plan, const DrawKey& key, Interpolation interpolation,
               const ViewOutput& output, ViewWorkspace& workspace);

}  // namespace voxtrast
