// What methods/views.py declares, as plain structs: axes are three, a 2-D crop has depth 1, views are named by index.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "plan.h"

namespace voxtrast {

struct Range {
  double low = 0.0, high = 0.0;
};

struct BoxSpec {
  std::vector<Index3> sides;  // or
  std::optional<Range> scale;
  std::optional<Range> aspect;
  int iou_with = -1;
  Range iou;
  std::vector<int> near;
  int64_t margin = 0;
  int inside = -1;
};

struct AffineSpec {
  double rotation_degrees = 0.0;
  Range scale{1.0, 1.0};
  double shear_degrees = 0.0, translation = 0.0, probability = 1.0;
};

struct ElasticSpec {
  double spacing = 1.0;
  Range magnitude;
  double probability = 1.0;
};

struct BoxesSpec {
  int64_t count = 0, least = 0;
  double go_on = 0.0;
  Range side;                        // fraction of the view's side, or
  std::vector<Range> side_voxels;    // one an axis
};

struct StepSpec {
  StepKind kind{};
  std::string name;
  double probability = 1.0;
  Range range;          // of the one number that the step has, where it has one
  double std = 0.0;     // of brightness
  double invert = 0.0;  // probability, of gamma and bezier
  double value = 0.0;   // of the cut-outs
  BoxesSpec boxes;
};

// Alternatives of which one is made at most.
struct OrderEntry {
  std::string name;
  std::vector<StepSpec> alternatives;
};

struct View {
  std::string name;
  Index3 size{};
  std::optional<BoxSpec> box;
  std::optional<AffineSpec> affine;
  std::optional<ElasticSpec> elastic;
  std::array<double, 3> flips{};
  bool quarter_turns = false;
  std::vector<OrderEntry> order;
  bool same_choice = false, clean = false, displacement = false;
  int displacement_to = -1;
};

struct ViewSpec {
  Index3 crop{};
  bool flat = false;  // slices
  std::vector<View> views;
};

}  // namespace voxtrast
