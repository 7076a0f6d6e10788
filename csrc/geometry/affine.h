// Affine maps of indices, in double precision; whole and half numbers stay exact.
#pragma once

#include <array>

#include "plan.h"

namespace voxtrast {

using Vector3 = std::array<double, 3>;
using Matrix3 = std::array<Vector3, 3>;

constexpr Matrix3 kIdentity3 = {{{1.0, 0.0, 0.0}, {0.0, 1.0, 0.0}, {0.0, 0.0, 1.0}}};

inline Matrix3 multiply(const Matrix3& outer, const Matrix3& inner) {
  Matrix3 product{};
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 3; ++j)
      for (int k = 0; k < 3; ++k) product[i][j] += outer[i][k] * inner[k][j];
  return product;
}

inline Affine affine(const Matrix3& linear, const Vector3& offset) {
  Affine map{};
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) map[4 * i + j] = linear[i][j];
    map[4 * i + 3] = offset[i];
  }
  return map;
}

// index -> outer(inner(index))
inline Affine compose(const Affine& outer, const Affine& inner) {
  Affine map{};
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 4; ++j) {
      for (int k = 0; k < 3; ++k) map[4 * i + j] += outer[4 * i + k] * inner[4 * k + j];
      if (j == 3) map[4 * i + j] += outer[4 * i + 3];
    }
  return map;
}

inline Vector3 centre_of(const Index3& size) {
  return {(size[0] - 1) / 2.0, (size[1] - 1) / 2.0, (size[2] - 1) / 2.0};
}

// index -> centre + linear (index - centre) + shift
inline Affine about(const Vector3& centre, const Matrix3& linear, const Vector3& shift) {
  Vector3 offset{};
  for (int i = 0; i < 3; ++i) {
    double moved = 0.0;
    for (int j = 0; j < 3; ++j) moved += linear[i][j] * centre[j];
    offset[i] = centre[i] - moved + shift[i];
  }
  return affine(linear, offset);
}

Affine inverse(const Affine& map);

struct AffineNumbers {
  Vector3 rotation_degrees{}, scale{1.0, 1.0, 1.0};
  Vector3 shear_degrees{};  // of the axes (0, 1), (0, 2), (1, 2): the first moves along the second
  Vector3 translation{};
};

// Rotates about the last axis, then the middle one, then the first; then scales, shears and translates; about the
// centre of `size`.
Affine affine_about_centre(const Index3& size, const AffineNumbers& numbers);

// index of the view that was flipped and then turned -> index before: numpy's rot90(flip(view), turns) in (H, W).
Affine flips_and_turns(const Index3& size, const std::array<int32_t, 3>& flips, int32_t turns);

// Index of a view -> index of the volume: the box is resized to `size`, voxel cells aligned.
Affine resizing(const Box& box, const Index3& size);

}  // namespace voxtrast
