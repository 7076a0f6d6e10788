// A view made without DALI and without a planner, for tests and measurements: plain C, called through ctypes.
#include <cstdio>
#include <cstring>
#include <exception>

#include "../cpu/target.h"
#include "permutation.h"
#include "view.h"

namespace voxtrast {

struct StepArguments {
  int32_t kind;
  uint32_t stream;
  const float* numbers;
  const int32_t* boxes;
  int64_t number_count, box_numbers;
};

struct ViewArguments {
  const void* voxels;
  int32_t type, interpolation;
  int64_t lower[3], upper[3], volume[3];
  double background;
  uint64_t seed;
  uint32_t slot, step;
  int64_t size[3];
  double to_volume[12];
  int64_t points[3];
  double spacing[3];
  const float* shift;
  double antialias[3];
  double from_volume[12];
  int64_t partner[3];
  const StepArguments* steps;
  int64_t step_count;
  float *view, *clean, *displacement, *mask;
  char* message;  // of an exception
  int64_t message_bytes;
};

namespace {

template <typename T, size_t N, typename From>
void copy(std::array<T, N>& to, const From (&from)[N]) {
  for (size_t n = 0; n < N; ++n) to[n] = static_cast<T>(from[n]);
}

Plan plan_of(const ViewArguments& a) {
  Plan plan;
  plan.seed = a.seed;
  plan.step = a.step;
  plan.slot = a.slot;
  plan.split = "train";
  plan.background = static_cast<float>(a.background);
  copy(plan.volume, a.volume);
  copy(plan.region.lower, a.lower);
  copy(plan.region.upper, a.upper);
  plan.crop = plan.region;
  ViewPlan view;
  view.name = "view";
  view.box = plan.region;
  copy(view.size, a.size);
  copy(view.to_volume, a.to_volume);
  copy(view.elastic.points, a.points);
  copy(view.elastic.spacing, a.spacing);
  view.elastic.shift.assign(a.shift, a.shift + 3 * a.points[0] * a.points[1] * a.points[2]);
  copy(view.antialias, a.antialias);
  copy(view.from_volume, a.from_volume);
  copy(view.partner_size, a.partner);
  view.clean = a.clean != nullptr;
  view.displacement = a.displacement != nullptr;
  for (int64_t n = 0; n < a.step_count; ++n) {
    const StepArguments& s = a.steps[n];
    view.steps.push_back({static_cast<StepKind>(s.kind), s.stream, {s.numbers, s.numbers + s.number_count},
                          {s.boxes, s.boxes + s.box_numbers}});
  }
  plan.views.push_back(view);
  return plan;
}

}  // namespace
}  // namespace voxtrast

#define VOXTRAST_EXPORT extern "C" __attribute__((visibility("default")))

VOXTRAST_EXPORT int voxtrast_make_view(const voxtrast::ViewArguments* arguments) {
  using namespace voxtrast;
  const ViewArguments& a = *arguments;
  try {
    const Plan plan = plan_of(a);
    const Region region = {a.voxels, static_cast<VoxelType>(a.type), plan.region, plan.volume, plan.background};
    static thread_local ViewWorkspace workspace;
    make_view(region, plan.views[0], {plan.seed, plan.slot, plan.step}, static_cast<Interpolation>(a.interpolation),
              {a.view, a.clean, a.displacement, a.mask}, workspace);
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(a.message, static_cast<size_t>(a.message_bytes), "%s", error.what());
    return 1;
  }
}

// The plan as the operators are sent it: how many bytes there are; as many as fit are written.
VOXTRAST_EXPORT int64_t voxtrast_encode(const voxtrast::ViewArguments* arguments, uint8_t* to, int64_t room) {
  const std::vector<uint8_t> bytes = voxtrast::encode(voxtrast::plan_of(*arguments));
  const auto count = static_cast<int64_t>(bytes.size());
  std::memcpy(to, bytes.data(), static_cast<size_t>(count < room ? count : room));
  return count;
}

// 0 portable, 1 AVX2, 2 AVX-512
VOXTRAST_EXPORT int voxtrast_target() { return static_cast<int>(voxtrast::target()); }

VOXTRAST_EXPORT uint32_t voxtrast_permuted(uint32_t index, uint32_t size, const uint32_t* key) {
  const uint32_t keys[4] = {key[0], key[1], key[2], key[3]};
  return voxtrast::permuted(index, size, voxtrast::half_bits(size), keys);
}
