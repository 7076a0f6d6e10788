// Where the boxes of a slot's views lie. Every draw is bounded: a box under a condition is drawn from the places that
// fulfil it, which are counted, not searched for by trial.
#pragma once

#include <string>
#include <vector>

#include "draws.h"
#include "view_spec.h"

namespace voxtrast {

// The first voxels, from low to high, that a box of one axis may have in a volume: anywhere inside, or centred if the
// volume is the smaller one.
struct Starts {
  int64_t low = 0, high = 0;
};

inline Starts starts(int64_t volume, int64_t side) {
  return side > volume ? Starts{-((side - volume) / 2), -((side - volume) / 2)} : Starts{0, volume - side};
}

// Voxels of a volume that show something, and how many boxes of those that are free to lie anywhere are drawn around
// one of them: it lies in the middle half of the box along every axis, as far as the box stays in the volume.
struct Foreground {
  const std::vector<Index3>& places;
  double probability;
};

Box draw_crop(const Index3& volume, const Index3& sides, const Foreground& foreground, Draws& draws);

// Views in an order in which every box comes after those that it refers to. Throws std::invalid_argument on a cycle.
std::vector<int> box_order(const ViewSpec& spec);

// Why no slot can be taken from a volume of this shape, or nothing. What passes can always be drawn.
std::string unusable(const ViewSpec& spec, const Index3& volume);

// The box of a view; `boxes` holds those that it refers to. `crop` is the slot's.
Box draw_box(const ViewSpec& spec, int view, const Index3& volume, const Box& crop, const std::vector<Box>& boxes,
             const Foreground& foreground, Draws& draws);

}  // namespace voxtrast
