#include "program.h"

#include <algorithm>

#include "stages.h"

namespace voxtrast {
namespace {

// Stages that one launch can do, in the order of the slots.
void add_launch(ViewProgram& program, ParameterBlock& block, ViewKernel kernel,
                const std::vector<const ViewStage*>& stages) {
  ViewLaunch launch = {kernel, 0, static_cast<uint32_t>(stages.size()), 0, 0};
  for (const ViewStage* stage : stages) {
    const Offset at = block.add(stage->job.data(), stage->job.size());
    if (stage == stages.front()) launch.jobs = at;
    launch.blocks = std::max(launch.blocks, stage->blocks);
    launch.shared_bytes = std::max(launch.shared_bytes, stage->shared_bytes);
  }
  program.launches.push_back(launch);
}

}  // namespace

size_t scratch_bytes(const std::vector<ViewSlot>& slots) {
  size_t bytes = 0;
  for (const ViewSlot& slot : slots) {
    check_view(slot.region, *slot.plan, slot.output);
    bytes += ViewScratch(slot).bytes();
  }
  return bytes;
}

ViewProgram make_program(const std::vector<ViewSlot>& slots, void* scratch) {
  ParameterBlock block;
  std::vector<std::vector<ViewStage>> stages;
  auto* free = static_cast<uint8_t*>(scratch);
  for (const ViewSlot& slot : slots) {
    stages.push_back(stages_of(slot, free, block));
    free += ViewScratch(slot).bytes();
  }
  ViewProgram program;
  std::vector<size_t> next(slots.size(), 0);
  while (true) {
    const ViewKernel* first = nullptr;
    for (size_t slot = 0; slot < slots.size(); ++slot)
      if (next[slot] < stages[slot].size() && (first == nullptr || stages[slot][next[slot]].kernel < *first))
        first = &stages[slot][next[slot]].kernel;
    if (first == nullptr) break;
    std::vector<const ViewStage*> together;
    for (size_t slot = 0; slot < slots.size(); ++slot)
      if (next[slot] < stages[slot].size() && stages[slot][next[slot]].kernel == *first)
        together.push_back(&stages[slot][next[slot]++]);
    add_launch(program, block, *first, together);
  }
  program.block = block.take();
  return program;
}

}  // namespace voxtrast
