// What the kernels of views are told: one record for each slot that a launch works on, in one block of bytes that the
// host packs and the device reads. Tables are named by their offset in that block.
#pragma once

#include <cstdint>

#include "../../geometry/plan.h"
#include "../row_path.h"

namespace voxtrast {

constexpr int kViewThreads = 256;
constexpr int kQuad = 4;  // voxels a thread: those of one block of random numbers
constexpr int kTile = kViewThreads * kQuad;
constexpr int kSmoothedTogether = 32;  // lines side by side
constexpr size_t kMostSharedBytes = 96 * 1024;  // what every GPU from 8.0 on gives to a block that asks

typedef uint32_t Offset;

inline int64_t tiles_of(int64_t voxels) { return (voxels + kTile - 1) / kTile; }

struct StepRecord {
  StepKind kind;
  uint32_t stream;
  Offset numbers, boxes;
  int32_t box_count;
};

// What a step that asks for statistics works with.
struct StepFacts {
  float mean, low, high;
};

// Steps that change voxels one by one, done in one pass, and what is gathered of the voxels behind them.
struct Run {
  uint64_t seed;
  uint32_t slot, step;
  Offset steps;
  int32_t step_count;
  const ViewStatistics* known;  // of the view before the steps; null where none of them asks
  ViewStatistics* gathered;     // (tiles); null where nobody asks
};

struct alignas(8) PassJob {
  int32_t size[3];
  uint32_t voxels;
  const float* from;
  float* to;  // null where the pass only gathers
  Run run;
};

struct alignas(8) SampleJob {
  PassJob pass;         // what happens to the voxels once they are sampled
  const void* region;   // float32, or float16 where the kernel is that of half a number
  int32_t region_size[3];
  float background;
  double to_volume[12], lower[3];  // of the view; of the region in the volume
  float step[3];                   // along a row of the view
  int32_t nearest, straight;       // straight: rows along those of the region, without a deformation
  int32_t points[3];               // control points; 0 where there is no deformation
  Offset shift, cells[3];          // cells: (size[axis]) SplineCell
  float* clean;
  float* displacement[3];
  float* mask;
  int32_t with_field;
  float linear[9], psi_step[3], partner_low[3], partner_high[3];  // indices of the partner's first and last voxels
  double psi[12], volume_low[3], volume_high[3];
};

struct alignas(8) FinishJob {
  const ViewStatistics* gathered;
  ViewStatistics* known;
  int64_t count;
};

// Lines of a volume along one axis: line n of group g begins at g * group_stride + n * across.
struct alignas(8) SmoothJob {
  const void* from;
  float* to;  // may be `from`: a block keeps its lines to itself
  int64_t group_stride;
  int32_t length, along, lines, across, groups, together;
  int32_t half, radius;
  Offset weights;
};

// One axis read from a coarser grid: between two voxels of the view.
struct CoarseCell {
  int32_t low, high;
  float fraction;
};

struct alignas(8) LowResolutionJob {
  int32_t size[3];
  uint32_t voxels;
  const float* from;
  float* to;
  Offset cells[3];  // (size[axis]) CoarseCell
};

// Boxes that move voxels: windows that are shuffled inside, or pairs that change places. Shuffling, `to` first holds
// the number of the last window over each voxel, counted from 1.
struct alignas(8) BoxesJob {
  int32_t size[3];
  uint32_t voxels;
  const float* from;
  float* to;
  uint64_t seed;
  uint32_t slot, step, stream;
  Offset boxes;
  int32_t box_count;
};

}  // namespace voxtrast
