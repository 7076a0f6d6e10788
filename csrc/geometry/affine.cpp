#include "affine.h"

#include <cmath>

namespace voxtrast {

namespace {

constexpr double kRadians = 3.14159265358979323846 / 180.0;

Matrix3 rotation(int axis, double degrees) {
  const int first = axis == 0 ? 1 : 0, second = axis == 2 ? 1 : 2;
  const double cosine = std::cos(degrees * kRadians), sine = std::sin(degrees * kRadians);
  Matrix3 turned = kIdentity3;
  turned[first][first] = turned[second][second] = cosine;
  turned[first][second] = -sine;
  turned[second][first] = sine;
  return turned;
}

}  // namespace

Affine inverse(const Affine& map) {
  const auto at = [&](int i, int j) { return map[4 * (i % 3) + j % 3]; };
  Matrix3 linear{};
  double determinant = 0.0;
  for (int j = 0; j < 3; ++j)
    determinant += at(0, j) * (at(1, j + 1) * at(2, j + 2) - at(1, j + 2) * at(2, j + 1));
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 3; ++j)
      linear[i][j] =
          (at(j + 1, i + 1) * at(j + 2, i + 2) - at(j + 1, i + 2) * at(j + 2, i + 1)) / determinant;
  Vector3 offset{};
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 3; ++j) offset[i] -= linear[i][j] * map[4 * j + 3];
  return affine(linear, offset);
}

Affine affine_about_centre(const Index3& size, const AffineNumbers& numbers) {
  Matrix3 linear = kIdentity3;
  for (int axis = 2; axis >= 0; --axis) linear = multiply(rotation(axis, numbers.rotation_degrees[axis]), linear);
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 3; ++j) linear[i][j] *= numbers.scale[i];
  Matrix3 shear = kIdentity3;
  shear[0][1] = std::tan(numbers.shear_degrees[0] * kRadians);
  shear[0][2] = std::tan(numbers.shear_degrees[1] * kRadians);
  shear[1][2] = std::tan(numbers.shear_degrees[2] * kRadians);
  return about(centre_of(size), multiply(shear, linear), numbers.translation);
}

Affine flips_and_turns(const Index3& size, const std::array<int32_t, 3>& flips, int32_t turns) {
  constexpr Matrix3 quarter = {{{1.0, 0.0, 0.0}, {0.0, 0.0, 1.0}, {0.0, -1.0, 0.0}}};
  Matrix3 linear = kIdentity3;
  for (int32_t turn = 0; turn < turns; ++turn) linear = multiply(quarter, linear);
  for (int i = 0; i < 3; ++i)
    for (int j = 0; j < 3; ++j) linear[i][j] *= flips[i] ? -1.0 : 1.0;
  return about(centre_of(size), linear, {});
}

Affine resizing(const Box& box, const Index3& size) {
  Matrix3 linear{};
  Vector3 offset{};
  for (int i = 0; i < 3; ++i) {
    linear[i][i] = static_cast<double>(box.upper[i] - box.lower[i]) / static_cast<double>(size[i]);
    offset[i] = static_cast<double>(box.lower[i]) + 0.5 * linear[i][i] - 0.5;
  }
  return affine(linear, offset);
}

}  // namespace voxtrast
