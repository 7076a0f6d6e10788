// Slots as plain numbers, for those who make views without DALI: ten int64 each.
#pragma once

#include <vector>

#include "program.h"

namespace voxtrast {

class SentSlots {
 public:
  SentSlots(int64_t count, const int64_t* numbers) {
    for (int64_t slot = 0; slot < count; ++slot)
      plans_.push_back(decode(reinterpret_cast<const uint8_t*>(numbers[kNumbers * slot + kPlan]),
                              static_cast<size_t>(numbers[kNumbers * slot + kPlanBytes])));
    for (const Plan& plan : plans_) {
      const auto type = static_cast<VoxelType>(numbers[kType]);
      const Region region = {reinterpret_cast<const void*>(numbers[kRegion]), type, plan.region, plan.volume,
                             plan.background};
      const ViewOutput output = {at(numbers[kImage]), at(numbers[kClean]), at(numbers[kDisplacement]),
                                 at(numbers[kMask])};
      slots_.push_back({region, &plan.views.at(static_cast<size_t>(numbers[kView])), {plan.seed, plan.slot, plan.step},
                        static_cast<Interpolation>(numbers[kInterpolation]), output});
      numbers += kNumbers;
    }
  }
  SentSlots(const SentSlots&) = delete;  // slots point at the plans

  const std::vector<ViewSlot>& slots() const { return slots_; }

 private:
  // Addresses of the plan and of device memory; 0 for outputs that are not wanted. kView: which view of the plan.
  enum { kPlan, kPlanBytes, kRegion, kType, kInterpolation, kView, kImage, kClean, kDisplacement, kMask, kNumbers };

  static float* at(int64_t address) { return reinterpret_cast<float*>(address); }

  std::vector<Plan> plans_;
  std::vector<ViewSlot> slots_;
};

// Adds the launches of each kind, in the order of ViewKernel.
inline void count_launches(const ViewProgram& program, int64_t* counts) {
  for (const ViewLaunch& launch : program.launches) ++counts[static_cast<int>(launch.kernel)];
}

}  // namespace voxtrast
