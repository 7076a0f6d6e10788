// Which case a place of the endless sequence of slots is dealt: arithmetic on the place, with no state but a memory of
// the permutations that were computed last.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace voxtrast {

// Consecutive slots in runs of `crops_per_visit` take the same case. Each group of cases walks through permutations of
// its own, epoch after epoch. With several groups, the visits of a block are dealt in fixed numbers to the groups, in
// an order that is drawn for each block: the numbers are the weights where a block of at most kLongestBlock visits has
// room for them exactly, and the nearest otherwise.
class Dealing {
 public:
  static constexpr int64_t kLongestBlock = 1024;

  // groups: of each case, from 0 on, each with a case at least. weights: positive, one a group.
  Dealing(std::vector<int32_t> groups, const std::vector<double>& weights, uint64_t seed, int64_t crops_per_visit);

  int64_t case_of(uint64_t position, uint32_t split) const;
  const std::vector<int64_t>& visits_in_a_block() const { return shares_; }
  static std::vector<std::string> streams(size_t groups);

 private:
  using Order = std::shared_ptr<const std::vector<int64_t>>;

  Order order(uint32_t split, size_t which, uint64_t number) const;
  std::vector<int64_t> compute(uint32_t split, size_t which, uint64_t number) const;

  uint64_t seed_;
  uint64_t crops_per_visit_;
  std::vector<std::vector<int64_t>> cases_;  // of each group
  std::vector<int64_t> shares_;              // visits of each group in a block
  std::vector<int64_t> block_;               // the groups of a block, in order
  mutable std::mutex mutex_;
  mutable std::map<std::pair<uint32_t, size_t>, std::pair<uint64_t, Order>> memory_;
};

}  // namespace voxtrast
