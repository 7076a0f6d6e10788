#include "dealing.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "draws.h"

namespace voxtrast {

namespace {

std::string stream_of(size_t which, size_t groups) {
  return which == groups ? "order of the groups" : "order of group " + std::to_string(which);
}

// Visits of each group in the shortest block that holds the weights exactly, or nearly in the longest.
std::vector<int64_t> shares_of(const std::vector<double>& weights) {
  const double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
  std::vector<int64_t> shares(weights.size());
  for (int64_t length = static_cast<int64_t>(weights.size()); length <= Dealing::kLongestBlock; ++length) {
    bool exact = true;
    for (size_t group = 0; group < weights.size(); ++group) {
      const double visits = weights[group] / sum * static_cast<double>(length);
      shares[group] = std::max<int64_t>(1, std::llrint(visits));
      exact &= std::abs(visits - static_cast<double>(shares[group])) < 1e-6;
    }
    if (exact) break;
  }
  return shares;
}

std::vector<int64_t> permutation(std::vector<int64_t> items, Draws draws) {
  for (size_t i = items.size(); i > 1; --i)
    std::swap(items[i - 1], items[static_cast<size_t>(draws.integer(0, static_cast<int64_t>(i) - 1))]);
  return items;
}

}  // namespace

Dealing::Dealing(std::vector<int32_t> groups, const std::vector<double>& weights, uint64_t seed,
                 int64_t crops_per_visit)
    : seed_(seed), crops_per_visit_(static_cast<uint64_t>(crops_per_visit)), cases_(weights.size()),
      shares_(shares_of(weights)) {
  for (size_t index = 0; index < groups.size(); ++index)
    cases_.at(static_cast<size_t>(groups[index])).push_back(static_cast<int64_t>(index));
  for (size_t group = 0; group < shares_.size(); ++group)
    block_.insert(block_.end(), static_cast<size_t>(shares_[group]), static_cast<int64_t>(group));
}

std::vector<std::string> Dealing::streams(size_t groups) {
  std::vector<std::string> names;
  for (size_t which = 0; which <= groups; ++which) names.push_back(stream_of(which, groups));
  return names;
}

int64_t Dealing::case_of(uint64_t position, uint32_t split) const {
  uint64_t visit = position / crops_per_visit_;
  size_t group = 0;
  if (cases_.size() > 1) {
    // What the block's order holds: group + groups * how many of its visits came before in the block.
    const uint64_t block = visit / block_.size();
    const int64_t entry = (*order(split, cases_.size(), block))[visit % block_.size()];
    group = static_cast<size_t>(entry) % cases_.size();
    visit = block * static_cast<uint64_t>(shares_[group]) + static_cast<uint64_t>(entry) / cases_.size();
  }
  const uint64_t count = cases_[group].size();
  return (*order(split, group, visit / count))[visit % count];
}

Dealing::Order Dealing::order(uint32_t split, size_t which, uint64_t number) const {
  const std::pair<uint32_t, size_t> key{split, which};
  {
    const std::lock_guard lock(mutex_);
    const auto found = memory_.find(key);
    if (found != memory_.end() && found->second.first == number) return found->second.second;
  }
  const auto computed = std::make_shared<const std::vector<int64_t>>(compute(split, which, number));
  const std::lock_guard lock(mutex_);
  memory_[key] = {number, computed};
  return computed;
}

std::vector<int64_t> Dealing::compute(uint32_t split, size_t which, uint64_t number) const {
  const uint32_t stream = name_hash("/" + stream_of(which, cases_.size()), split);
  const Draws draws(seed_, stream, static_cast<uint32_t>(number), static_cast<uint32_t>(number >> 32));
  if (which < cases_.size()) return permutation(cases_[which], draws);
  std::vector<int64_t> drawn = permutation(block_, draws);
  std::vector<int64_t> before(cases_.size());
  for (int64_t& entry : drawn) entry += static_cast<int64_t>(cases_.size()) * before[static_cast<size_t>(entry)]++;
  return drawn;
}

}  // namespace voxtrast
