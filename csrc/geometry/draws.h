// Numbers drawn one after another from one stream of random.h, in double precision.
#pragma once

#include <cmath>
#include <cstdint>
#include <string_view>

#include "random.h"

namespace voxtrast {

// FNV-1a: what stands for a name in a counter.
constexpr uint32_t name_hash(std::string_view name, uint32_t hash = 2166136261u) {
  for (const char letter : name) hash = (hash ^ static_cast<uint8_t>(letter)) * 16777619u;
  return hash;
}

class Draws {
 public:
  Draws(uint64_t seed, uint32_t stream, uint32_t slot, uint32_t step)
      : seed_(seed), stream_(stream), slot_(slot), step_(step) {}

  uint64_t bits() {
    if (used_ == 4) {
      words_ = philox(seed_, block_++, stream_, slot_, step_);
      used_ = 0;
    }
    const uint64_t low = words_.word[used_], high = words_.word[used_ + 1];
    used_ += 2;
    return high << 32 | low;
  }

  // [0, 1), of 53 bits.
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }
  double uniform(double low, double high) { return low + (high - low) * uniform(); }
  double symmetric(double limit) { return limit * (2.0 * uniform() - 1.0); }
  double log_uniform(double low, double high) { return std::exp(uniform(std::log(low), std::log(high))); }
  bool happens(double probability) { return uniform() < probability; }

  double normal() {
    const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform()));
    return radius * std::cos(6.283185307179586 * uniform());
  }

  // low <= number <= high, all equally probable: the few products that would favour some are drawn again (Lemire, 2019).
  int64_t integer(int64_t low, int64_t high) {
    const uint64_t count = static_cast<uint64_t>(high - low) + 1;
    unsigned __int128 product = static_cast<unsigned __int128>(bits()) * count;
    if (static_cast<uint64_t>(product) < count) {
      const uint64_t surplus = -count % count;
      while (static_cast<uint64_t>(product) < surplus) product = static_cast<unsigned __int128>(bits()) * count;
    }
    return low + static_cast<int64_t>(product >> 64);
  }

 private:
  uint64_t seed_;
  uint32_t stream_, slot_, step_, block_ = 0;
  Random4 words_{};
  int used_ = 4;
};

}  // namespace voxtrast
