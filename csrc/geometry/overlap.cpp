#include "overlap.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace voxtrast {

namespace {

int64_t volume_of(const Index3& sides) { return sides[0] * sides[1] * sides[2]; }

double ratio(int64_t shared, int64_t total) {
  return static_cast<double>(shared) / static_cast<double>(total - shared);
}

// Along one axis: for each number of voxels that a box may share with the other, how many of its places share it.
struct AxisOverlaps {
  Starts range;
  int64_t side = 0, other_low = 0, other_high = 0;
  std::vector<int64_t> places;  // by overlap
  std::vector<int64_t> below;   // places with less overlap than this

  AxisOverlaps(int64_t volume, int64_t length, int64_t low, int64_t high)
      : range(starts(volume, length)), side(length), other_low(low), other_high(high),
        places(static_cast<size_t>(std::min(length, high - low)) + 1), below(places.size() + 1) {
    for (int64_t start = range.low; start <= range.high; ++start) ++places[static_cast<size_t>(overlap(start))];
    std::partial_sum(places.begin(), places.end(), below.begin() + 1);
  }
  int64_t overlap(int64_t start) const {
    return std::max<int64_t>(0, std::min(start + side, other_high) - std::max(start, other_low));
  }
  int64_t most() const { return static_cast<int64_t>(places.size()) - 1; }
  int64_t place(int64_t wanted, int64_t number) const {
    for (int64_t start = range.low; start <= range.high; ++start)
      if (overlap(start) == wanted && number-- == 0) return start;
    return range.high;
  }
};

// For a fixed overlap along the first axis: visits the overlaps of the second with the range of those of the third
// that keep the product within bounds, and how many places these are in all.
template <typename Visit>
void for_each_pair(int64_t first, const AxisOverlaps& second, const AxisOverlaps& third, const SharedVoxels& shared,
                   Visit visit) {
  int64_t low = third.most() + 1, high = third.most();
  for (int64_t overlap = 0; overlap <= second.most(); ++overlap) {
    const int64_t product = first * overlap;
    while (low > 0 && product * (low - 1) >= shared.low) --low;
    while (high >= 0 && product * high > shared.high) --high;
    const int64_t places = second.places[static_cast<size_t>(overlap)];
    if (places == 0 || low > high) continue;
    if (!visit(overlap, low, places * (third.below[static_cast<size_t>(high) + 1] - third.below[static_cast<size_t>(low)])))
      return;
  }
}

// Least overlap along one axis when the other box lies where this is largest, and the largest overlap of all.
Starts least_and_most(int64_t volume, int64_t side, int64_t other) {
  const Starts range = starts(volume, side), other_range = starts(volume, other);
  const auto overlap = [&](int64_t start, int64_t low) {
    return std::max<int64_t>(0, std::min(start + side, low + other) - std::max(start, low));
  };
  const int64_t middle = (other_range.low + other_range.high) / 2;
  int64_t least = 0;
  for (int64_t low = middle; low <= std::min(middle + 1, other_range.high); ++low)
    least = std::max(least, std::min(overlap(range.low, low), overlap(range.high, low)));
  return {least, std::min(side, other)};
}

}  // namespace

SharedVoxels shared_voxels(int64_t total, const Range& iou) {
  const double sum = static_cast<double>(total);
  SharedVoxels shared{static_cast<int64_t>(iou.low * sum / (1.0 + iou.low)),
                      static_cast<int64_t>(iou.high * sum / (1.0 + iou.high))};
  // Exactly the numbers whose rounded ratio lies within the range.
  while (shared.low > 0 && ratio(shared.low - 1, total) >= iou.low) --shared.low;
  while (ratio(shared.low, total) < iou.low) ++shared.low;
  while (ratio(shared.high, total) > iou.high) --shared.high;
  while (2 * (shared.high + 1) <= total && ratio(shared.high + 1, total) <= iou.high) ++shared.high;
  return shared;
}

std::optional<Box> draw_overlapping(const Index3& volume, const Index3& sides, const Box& other, const Range& iou,
                                    Draws& draws) {
  const Index3 other_sides = {other.upper[0] - other.lower[0], other.upper[1] - other.lower[1],
                              other.upper[2] - other.lower[2]};
  const SharedVoxels shared = shared_voxels(volume_of(sides) + volume_of(other_sides), iou);
  std::vector<AxisOverlaps> axes;
  for (int axis = 0; axis < 3; ++axis)
    axes.emplace_back(volume[axis], sides[axis], other.lower[axis], other.upper[axis]);
  std::vector<int64_t> places(axes[0].places.size());
  for (int64_t first = 0; first <= axes[0].most(); ++first) {
    const int64_t here = axes[0].places[static_cast<size_t>(first)];
    if (here == 0) continue;
    for_each_pair(first, axes[1], axes[2], shared, [&](int64_t, int64_t, int64_t count) {
      places[static_cast<size_t>(first)] += here * count;
      return true;
    });
  }
  const int64_t total = std::accumulate(places.begin(), places.end(), int64_t{0});
  if (total == 0) return std::nullopt;
  int64_t number = draws.integer(0, total - 1);
  int64_t first = 0;
  while (number >= places[static_cast<size_t>(first)]) number -= places[static_cast<size_t>(first++)];
  const int64_t here = axes[0].places[static_cast<size_t>(first)];
  Index3 lower{axes[0].place(first, number % here), 0, 0};
  number /= here;
  for_each_pair(first, axes[1], axes[2], shared, [&](int64_t second, int64_t low, int64_t count) {
    if (number >= count) {
      number -= count;
      return true;
    }
    const int64_t same = axes[1].places[static_cast<size_t>(second)];
    lower[1] = axes[1].place(second, number % same);
    number = number / same + axes[2].below[static_cast<size_t>(low)];
    const auto above = std::upper_bound(axes[2].below.begin(), axes[2].below.end(), number);
    const int64_t third = above - axes[2].below.begin() - 1;
    lower[2] = axes[2].place(third, number - axes[2].below[static_cast<size_t>(third)]);
    return false;
  });
  return Box{lower, {lower[0] + sides[0], lower[1] + sides[1], lower[2] + sides[2]}};
}

bool always_overlaps(const Index3& volume, const Index3& sides, const Index3& other, const Range& iou, Range& reach) {
  int64_t least = 1, most = 1, face = 0;
  for (int axis = 0; axis < 3; ++axis) {
    const Starts overlaps = least_and_most(volume[axis], sides[axis], other[axis]);
    least *= overlaps.low;
    most *= overlaps.high;
  }
  for (int axis = 0; axis < 3; ++axis)
    if (volume[axis] > 1) face = std::max(face, most / std::min(sides[axis], other[axis]));
  const int64_t total = volume_of(sides) + volume_of(other);
  const SharedVoxels shared = shared_voxels(total, iou);
  reach.low = std::min(reach.low, ratio(least, total));
  reach.high = std::max(reach.high, ratio(most, total));
  if (most < shared.low || least > shared.high) return false;
  // From the least to the most overlap one voxel at a time: no step is longer than a face of the shared box, so that
  // none leaps over a range as wide as that.
  return most <= shared.high || shared.high - shared.low >= face;
}

}  // namespace voxtrast
