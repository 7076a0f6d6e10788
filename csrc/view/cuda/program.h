// The views of the slots of one call as a few launches. Written on the host from the plans; no CUDA is needed for it.
//
// Each slot is a row of stages, as its steps ask for them: the region smoothed, the view sampled together with the first
// of its steps, statistics, further steps, moves. Stages of one kind that slots have come to are one launch; passes over
// the views wait until no slot can do anything else, so that slots with different steps meet there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "../view.h"
#include "jobs.h"

namespace voxtrast {

// Voxels and outputs are in device memory; the plan is on the host, and need not outlive the program's making.
struct ViewSlot {
  Region region;
  const ViewPlan* plan;
  DrawKey key;
  Interpolation interpolation;
  ViewOutput output;
};

// In the order in which a launch is chosen where slots have come to different kinds.
enum class ViewKernel {
  smooth,
  sample_float32,
  sample_float16,
  finish_statistics,
  clear_windows,
  mark_windows,
  shuffle_pixels,
  swap_patches,
  lower_resolution,
  pass
};

struct ViewLaunch {
  ViewKernel kernel;
  Offset jobs;  // in the block, one behind the other
  uint32_t slots;
  int64_t blocks;  // of the slot with most of them
  size_t shared_bytes;
};

struct ViewProgram {
  std::vector<uint8_t> block;  // to be copied to the device, aligned to 16 bytes
  std::vector<ViewLaunch> launches;
};

// Bytes of device memory that the views take while they are made. Throws as make_program does.
size_t scratch_bytes(const std::vector<ViewSlot>& slots);

// Throws std::invalid_argument as make_view does, and for what a GPU has no room for.
ViewProgram make_program(const std::vector<ViewSlot>& slots, void* scratch);

}  // namespace voxtrast
