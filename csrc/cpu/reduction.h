// Weighted sums over the voxels of a batch that do not depend on the number of threads: every stretch of voxels is
// summed by itself in float64, and the stretches are added in their order.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

namespace voxtrast {

constexpr int64_t kStretch = 4096;
constexpr int64_t kLanes = 8;  // independent sums, so that the compiler may use vector registers

struct Partial {
  double lane[kLanes] = {};
  double weight_lane[kLanes] = {};
};

// Adds value(p) for p in first .. last, in a fixed order. The values of a run come first, the sums after: each of the
// two loops is vector code then.
template <typename Value>
void add_to_lanes(double* sums, int64_t first, int64_t last, const Value& value) {
  constexpr int64_t kRun = 256;
  float run[kRun];
  for (; first < last; first += kRun) {
    const int64_t count = std::min(kRun, last - first);
    for (int64_t n = 0; n < count; ++n) run[n] = value(first + n);
    std::fill(run + count, run + kRun, 0.0f);
    for (int64_t n = 0; n < kRun; n += kLanes)
      for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += static_cast<double>(run[n + lane]);
  }
}

// (sum, sum of weights) over batch x points. work(b, first, last, partial) adds the voxels first .. last of item b.
template <typename Work>
std::pair<double, double> reduce(int64_t batch, int64_t points, int64_t cost_of_point, const Work& work) {
  const int64_t stretches = (points + kStretch - 1) / kStretch;
  std::vector<Partial> partials(batch * stretches);
  const int64_t grain = std::max<int64_t>(1, 65536 / (kStretch * std::max<int64_t>(1, cost_of_point)));
  torch::stable::parallel_for(0, batch * stretches, grain, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t first = item % stretches * kStretch;
      work(item / stretches, first, std::min(first + kStretch, points), partials[item]);
    }
  });
  double sum = 0.0, weight = 0.0;
  for (const Partial& partial : partials) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      sum += partial.lane[lane];
      weight += partial.weight_lane[lane];
    }
  }
  return {sum, weight};
}

}  // namespace voxtrast
