// Everything that was decided about one slot of one step, as plain data: written by the planner, read by the operators.
// Indices are (D, H, W), in voxels; index 0 is the centre of the first voxel. A 2-D view has depth 1.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <string>
#include <vector>

namespace voxtrast {

using Index3 = std::array<int64_t, 3>;
using Affine = std::array<double, 12>;  // (3, 4), row by row: index p -> linear p + offset

// Voxels lower <= index < upper of a volume; may reach beyond it, where everything is background.
struct Box {
  Index3 lower{}, upper{};
};

enum class StepKind : int32_t {
  noise,           // numbers: std                          v + std N(0, 1)
  blur,            // numbers: sigma (voxels)               Gaussian, edges repeated
  contrast,        // numbers: factor                       mean + factor (v - mean), of the view as it is by then
  brightness,      // numbers: shift                        v + shift
  gamma,           // numbers: exponent, inverted (0 or 1)  low + (high - low) ((v - low) / (high - low))^exponent
  bias_field,      // numbers: background, then the coefficients of a polynomial of degree 3, see bias_terms
  low_resolution,  // numbers: factor (>= 1)                nearest voxel of a grid coarser by it, read back linearly
  bezier,          // numbers: table of kBezierTable values over [0, 1], between the view's least and greatest value
  pixel_shuffle,   // boxes; the voxels of each permuted inside it, all read from the view as it was before the step
  patch_swap,      // boxes, pair by pair of equal size; the two are exchanged, pair after pair
  in_paint,        // numbers: low, high; boxes             the boxes filled with U(low, high)
  out_paint,       // numbers: low, high; boxes             all but the boxes filled with U(low, high)
  cut_out,         // numbers: value; boxes                 the boxes filled with one value
  cut_out_outside  // numbers: value; boxes                 all but the boxes filled with one value
};

constexpr int kBezierTable = 256;
// Exponents (d, h, w) of the terms of a bias field, d + h + w <= 3, in lexicographic order; coordinates run over [-1, 1]
// along each axis. The field is exp(sum of coefficient * term) and multiplies v - background.
constexpr int kBiasTerms = 20;

struct Step {
  StepKind kind{};
  uint32_t stream = 0;          // of the numbers that the step draws for itself, voxel by voxel: see random.h
  std::vector<float> numbers;   // in the units of the volume
  std::vector<int32_t> boxes;   // six a box: lower D, H, W and sizes D, H, W, in indices of the view
};

// A smooth deformation: uniform cubic B-spline over the indices of the view. Control point k of an axis stands at index
// (k - 1) * spacing; along each axis there are points for every index from 0 to size - 1.
struct Elastic {
  Index3 points{};                  // along each axis; 0 for no deformation
  std::array<double, 3> spacing{};  // voxels of the view between control points
  std::vector<float> shift;         // (3, *points): displacement of the control points in voxels of the volume
};

// How far a Gaussian is evaluated, on both sides of its middle: regions hold that much more for `antialias`.
inline int64_t gaussian_radius(float sigma) { return static_cast<int64_t>(std::ceil(4.0f * sigma)); }

struct ViewPlan {
  std::string name;
  Index3 size{};     // of the view
  Box box;           // of the volume, before flips, turns, the affine and the deformation: what is resized to `size`
  std::array<int32_t, 3> flips{};  // 1 for a flipped axis; first flipped, then turned by numpy's rot90 in the plane (H, W)
  int32_t quarter_turns = 0;       // 0 to 3
  bool clean = false;         // the view before its steps is wanted as well
  bool displacement = false;  // the field psi and its mask are wanted
  Affine to_volume{};  // index p of the view -> index of the volume; the deformation is added to it
  Elastic elastic;
  std::array<float, 3> antialias{};  // sigma in voxels of the volume along its axes, before sampling; 0 for none
  // For views with a displacement: from indices of the volume to those of the view that it leads to. Then
  //     psi(p) = from_volume(to_volume(p) + elastic(p)) - p,   valid where p + psi(p) lies in that view and in the volume.
  Affine from_volume{};
  Index3 partner_size{};
  std::vector<Step> steps;
};

struct Plan {
  uint64_t seed = 0;
  uint32_t step = 0, slot = 0;
  std::string split;
  int64_t case_index = 0;
  Index3 volume{};         // shape of the case's volume
  float background = 0.0f; // what lies outside it
  Box crop;                // the slot's crop; of depth 1 for slices
  double position = 0.0;   // of a slice: index / (depth - 1), from 0 to 1
  // All voxels that any view reads with a weight, one shell beyond the volume at most: that shell and whatever lies
  // outside the region is background.
  Box region;
  std::vector<ViewPlan> views;
};

// One block of bytes, little-endian, that begins with a format number: what is saved, and what the operators are sent.
std::vector<uint8_t> encode(const Plan& plan);
Plan decode(const uint8_t* bytes, size_t count);  // throws std::invalid_argument saying what is wrong

}  // namespace voxtrast
