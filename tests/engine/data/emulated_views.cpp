// The kernels of csrc/view/cuda and the programs that launch them, on the CPU.
#include "emulation.h"

#include "view/cuda/program.cpp"
#include "view/cuda/run_program.cuh"
#include "view/cuda/stages.cpp"

namespace {

using namespace voxtrast;

// A slot: the plan and its bytes, the region, its type, the interpolation, the outputs (0 for what is not wanted).
enum { kPlan, kPlanBytes, kRegion, kType, kInterpolation, kView, kClean, kDisplacement, kMask, kNumbers };

float* output(int64_t address) { return reinterpret_cast<float*>(address); }

std::vector<ViewSlot> slots_of(const std::vector<Plan>& plans, const int64_t* numbers) {
  std::vector<ViewSlot> slots;
  for (const Plan& plan : plans) {
    const Region region = {reinterpret_cast<const void*>(numbers[kRegion]), static_cast<VoxelType>(numbers[kType]),
                           plan.region, plan.volume, plan.background};
    slots.push_back({region, &plan.views[0], {plan.seed, plan.slot, plan.step},
                     static_cast<Interpolation>(numbers[kInterpolation]),
                     {output(numbers[kView]), output(numbers[kClean]), output(numbers[kDisplacement]),
                      output(numbers[kMask])}});
    numbers += kNumbers;
  }
  return slots;
}

// Memory of the device for the time of a call.
struct Lent : emulation::Guarded {
  explicit Lent(size_t bytes) : Guarded(bytes, 16) {}
  ~Lent() { release(); }
};

}  // namespace

extern "C" {

// Counts the launches of each kind, in the order of ViewKernel.
const char* make_views(int64_t count, const int64_t* numbers, int64_t* launches) {
  return emulation::report([=] {
    std::vector<Plan> plans;
    for (int64_t slot = 0; slot < count; ++slot) {
      const int64_t* own = numbers + kNumbers * slot;
      plans.push_back(decode(reinterpret_cast<const uint8_t*>(own[kPlan]), static_cast<size_t>(own[kPlanBytes])));
    }
    const std::vector<ViewSlot> slots = slots_of(plans, numbers);
    const Lent scratch(scratch_bytes(slots));
    const ViewProgram program = make_program(slots, scratch.begin);
    const Lent block(program.block.size());
    memcpy(block.begin, program.block.data(), program.block.size());
    for (const ViewLaunch& launch : program.launches) ++launches[static_cast<int>(launch.kernel)];
    run_program(program, block.begin, emulation::Launch());
  });
}
}
