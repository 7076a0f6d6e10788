#include "view.h"

#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "elastic.h"
#include "smoothing.h"
#include "steps.h"

namespace voxtrast {
namespace {

Index3 region_size(const Region& region) {
  Index3 size;
  for (int axis = 0; axis < 3; ++axis) size[axis] = region.box.upper[axis] - region.box.lower[axis];
  return size;
}

void check_size(const Index3& size, const char* what) {
  double count = 1;
  for (const int64_t side : size) {
    if (side < 1) throw std::invalid_argument(std::string(what) + " has an axis of " + std::to_string(side) + " voxels");
    count *= static_cast<double>(side);
  }
  if (count >= 2147483648.0) throw std::invalid_argument(std::string(what) + " has 2^31 voxels or more");
}

// Coordinates of the corners of a view under an affine are those farthest from 0.
void check_affine(const Affine& affine, const Index3& size, const char* what) {
  for (int axis = 0; axis < 3; ++axis) {
    double reach = std::fabs(affine[4 * axis + 3]);
    for (int other = 0; other < 3; ++other)
      reach += std::fabs(affine[4 * axis + other]) * static_cast<double>(size[other]);
    if (!(reach < kFarthest)) throw std::invalid_argument(std::string(what) + " leads 2^29 voxels away or farther");
  }
}

double apply_row(const Affine& affine, int axis, double d, double h, double w) {
  return affine[4 * axis] * d + affine[4 * axis + 1] * h + affine[4 * axis + 2] * w + affine[4 * axis + 3];
}

// The region as it is sampled: its own voxels, or a smoothed copy.
SampledRow sampled_region(const Region& region, const ViewPlan& plan, VoxelType& type, ViewWorkspace::Buffers& buffers) {
  const Index3 size = region_size(region);
  SampledRow row{};
  row.voxels = region.voxels;
  row.background = region.background;
  row.count = plan.size[2];
  type = region.type;
  for (int axis = 0; axis < 3; ++axis) {
    row.size[axis] = static_cast<int32_t>(size[axis]);
    row.step[axis] = plan.to_volume[4 * axis + 2];
    row.ahead = row.ahead * size[axis] + std::llround(plan.to_volume[4 * axis]);
  }
  if (plan.antialias == std::array<float, 3>{}) return row;
  float* copy = at_least(buffers.region, voxels(size));
  if (type == VoxelType::float16) row_path().widen(static_cast<const uint16_t*>(region.voxels), voxels(size), copy);
  else std::memcpy(copy, region.voxels, sizeof(float) * voxels(size));
  smooth(copy, size, plan.antialias, buffers);
  row.voxels = copy;
  type = VoxelType::float32;
  return row;
}

// Whether each voxel of a row is one of the region's, one after the other, forwards or backwards.
bool is_straight(const SampledRow& row, bool deformed) {
  if (deformed || row.step[0] != 0 || row.step[1] != 0 || std::fabs(row.step[2]) != 1) return false;
  return std::floor(row.start[0]) == row.start[0] && std::floor(row.start[1]) == row.start[1] &&
         std::floor(row.start[2]) == row.start[2];
}

void copy_straight(const SampledRow& row, VoxelType type, float* to) {
  const auto d = static_cast<int64_t>(row.start[0]), h = static_cast<int64_t>(row.start[1]);
  const bool forwards = row.step[2] > 0;
  // Of the region, in its order.
  const int64_t first = static_cast<int64_t>(row.start[2]) - (forwards ? 0 : row.count - 1);
  const bool in_plane = d >= 0 && d < row.size[0] && h >= 0 && h < row.size[1];
  const int64_t begin = std::clamp<int64_t>(-first, 0, row.count);
  const int64_t end = in_plane ? std::clamp<int64_t>(row.size[2] - first, begin, row.count) : begin;
  std::fill(to, to + begin, row.background);
  std::fill(to + end, to + row.count, row.background);
  const int64_t place = (d * row.size[1] + h) * row.size[2] + first + begin;
  if (end > begin && type == VoxelType::float16)
    row_path().widen(static_cast<const uint16_t*>(row.voxels) + place, end - begin, to + begin);
  else if (end > begin)
    std::memcpy(to + begin, static_cast<const float*>(row.voxels) + place, sizeof(float) * (end - begin));
  if (!forwards) std::reverse(to, to + row.count);
}

// What all rows of the field share.
class Field {
 public:
  Field(const Region& region, const ViewPlan& plan, const ViewOutput& output)
      : plan_(plan), output_(output), psi_(field_affine(plan)) {
    const Affine &to = plan.to_volume, &from = plan.from_volume;
    row_.count = plan.size[2];
    for (int axis = 0; axis < 3; ++axis) {
      for (int other = 0; other < 3; ++other) row_.linear[axis][other] = static_cast<float>(from[4 * axis + other]);
      row_.step[axis] = psi_[4 * axis + 2];
      row_.along_row[axis] = axis == 2;
      row_.position_step[axis] = to[4 * axis + 2];
      row_.volume_low[axis] = -kBorder;
      row_.volume_high[axis] = static_cast<double>(region.volume[axis] - 1) + kBorder;
    }
  }

  void make_row(int64_t d, int64_t h, const float* const (&shift)[3]) {
    const int64_t first = (d * plan_.size[1] + h) * plan_.size[2];
    const bool flat = plan_.size[0] == 1;
    const double index[3] = {static_cast<double>(d), static_cast<double>(h), 0.0};
    for (int axis = 0; axis < 3; ++axis) {
      row_.shift[axis] = shift[axis];
      row_.start[axis] = apply_row(psi_, axis, index[0], index[1], 0.0);
      row_.position[axis] = apply_row(plan_.to_volume, axis, index[0], index[1], 0.0);
      const bool asked = !(flat && axis == 0);
      row_.low[axis] = asked ? -index[axis] - kBorder : -kFarthest;
      row_.high[axis] = asked ? static_cast<double>(plan_.partner_size[axis] - 1) - index[axis] + kBorder : kFarthest;
      const int component = flat ? axis - 1 : axis;
      const bool wanted = output_.displacement != nullptr && component >= 0;
      row_.displacement[axis] = wanted ? output_.displacement + component * voxels(plan_.size) + first : nullptr;
    }
    row_.mask = output_.mask == nullptr ? nullptr : output_.mask + first;
    row_path().field(row_);
  }

 private:
  const ViewPlan& plan_;
  const ViewOutput& output_;
  const Affine psi_;
  FieldRow row_{};
};

}  // namespace

Affine field_affine(const ViewPlan& plan) {
  const Affine &to = plan.to_volume, &from = plan.from_volume;
  Affine psi{};
  for (int axis = 0; axis < 3; ++axis)
    for (int column = 0; column < 4; ++column) {
      double product = column == 3 ? from[4 * axis + 3] : -(axis == column);
      for (int k = 0; k < 3; ++k) product += from[4 * axis + k] * to[4 * k + column];
      psi[4 * axis + column] = product;
    }
  return psi;
}

void check_view(const Region& region, const ViewPlan& plan, const ViewOutput& output) {
  if (output.view == nullptr) throw std::invalid_argument("a view needs an output");
  check_size(plan.size, "the view");
  check_size(region_size(region), "the region");
  check_affine(plan.to_volume, plan.size, "to_volume");
  if (!output.with_field()) return;
  check_size(region.volume, "the volume");
  check_size(plan.partner_size, "the partner of a view with a displacement");
  check_affine(plan.from_volume, region.volume, "from_volume");
}

ViewWorkspace::ViewWorkspace() : buffers_(std::make_unique<Buffers>()) {}
ViewWorkspace::~ViewWorkspace() = default;

void make_view(const Region& region, const ViewPlan& plan, const DrawKey& key, Interpolation interpolation,
               const ViewOutput& output, ViewWorkspace& workspace) {
  check_view(region, plan, output);
  ViewWorkspace::Buffers& buffers = workspace.buffers();
  StepRunner steps(plan, key, output.view, buffers);
  ElasticRows elastic(plan.elastic, plan.size, buffers);
  Field field(region, plan, output);
  VoxelType type;
  SampledRow row = sampled_region(region, plan, type, buffers);
  const auto sample = row_path().sample[static_cast<int>(type)][static_cast<int>(interpolation)];

  int64_t plane = -1;
  for_each_strip(plan.size, [&](const Strip& strip) {
    if (strip.plane != plane) elastic.set_plane(plane = strip.plane);
    for (int64_t h = strip.row; h < strip.row + strip.rows; ++h) {
      elastic.row(h, row.shift);
      for (int axis = 0; axis < 3; ++axis)
        row.start[axis] = apply_row(plan.to_volume, axis, static_cast<double>(plane), static_cast<double>(h), 0.0) -
                          static_cast<double>(region.box.lower[axis]);
      float* values = output.view + (plane * plan.size[1] + h) * plan.size[2];
      if (is_straight(row, plan.elastic.points[0] > 0)) copy_straight(row, type, values);
      else sample(row, values);
      if (output.with_field()) field.make_row(plane, h, row.shift);
    }
    if (output.clean != nullptr)
      std::memcpy(output.clean + strip.first, output.view + strip.first, sizeof(float) * strip.count);
    steps.perform_first(strip);
  });
  steps.perform_others();
}

}  // namespace voxtrast
