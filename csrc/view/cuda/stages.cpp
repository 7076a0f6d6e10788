#include "stages.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "../coarse.h"
#include "../elastic.h"
#include "../smoothing.h"
#include "../step_rules.h"

namespace voxtrast {
namespace {

int64_t count_of(const Index3& size) { return size[0] * size[1] * size[2]; }

Index3 size_of(const Box& box) {
  return {box.upper[0] - box.lower[0], box.upper[1] - box.lower[1], box.upper[2] - box.lower[2]};
}

size_t padded(size_t bytes) { return (bytes + 255) / 256 * 256; }

// Boxes are filled voxel by voxel here; what is left moves voxels.
bool in_a_pass(StepKind kind) {
  return voxel_by_voxel(kind) || kind == StepKind::in_paint || kind == StepKind::out_paint ||
         kind == StepKind::cut_out || kind == StepKind::cut_out_outside;
}

bool takes_a_copy(const ViewPlan& plan) {
  return std::any_of(plan.steps.begin(), plan.steps.end(), [](const Step& step) {
    return step.kind == StepKind::low_resolution || step.kind == StepKind::pixel_shuffle ||
           step.kind == StepKind::patch_swap;
  });
}

class SlotStages {
 public:
  SlotStages(const ViewSlot& slot, uint8_t* scratch, ParameterBlock& block)
      : slot_(slot), plan_(*slot.plan), block_(block), scratch_(slot), voxels_(count_of(plan_.size)) {
    for (const Step& step : plan_.steps) check_step(step, plan_.size);
    smoothed_ = reinterpret_cast<float*>(scratch);
    other_ = reinterpret_cast<float*>(scratch + scratch_.region);
    gathered_ = reinterpret_cast<ViewStatistics*>(scratch + scratch_.region + scratch_.copy);
    learned_ = reinterpret_cast<ViewStatistics*>(scratch + scratch_.bytes() - scratch_.known);
    view_ = slot.output.view;
  }

  std::vector<ViewStage> make() {
    SampleJob job{};
    describe_region(job);
    describe_geometry(job);
    if (slot_.output.with_field()) describe_field(job);
    job.clean = slot_.output.clean;
    job.pass = next_pass();
    job.pass.to = view_;  // with or without a step
    const bool half = scratch_.region == 0 && slot_.region.type == VoxelType::float16;
    add(half ? ViewKernel::sample_float16 : ViewKernel::sample_float32, job, tiles_of(voxels_),
        facts_bytes(job.pass.run) + control_bytes(job));
    finish();
    while (next_ < plan_.steps.size()) {
      if (!in_a_pass(plan_.steps[next_].kind)) move(plan_.steps[next_++]);
      const PassJob pass = next_pass();
      if (pass.run.step_count == 0 && pass.run.gathered == nullptr) continue;
      add_pass(pass);
      finish();
    }
    if (view_ != slot_.output.view) {
      PassJob pass = next_pass();
      pass.to = slot_.output.view;
      add_pass(pass);
    }
    return std::move(stages_);
  }

 private:
  template <typename Job>
  void add(ViewKernel kernel, const Job& job, int64_t blocks, size_t shared_bytes) {
    static_assert(std::is_trivially_copyable_v<Job> && sizeof(Job) % 8 == 0);
    const auto* bytes = reinterpret_cast<const uint8_t*>(&job);
    stages_.push_back({kernel, {bytes, bytes + sizeof job}, blocks, shared_bytes});
  }

  template <typename Job>
  void describe_view(Job& job, const float* from, float* to) const {
    for (int axis = 0; axis < 3; ++axis) job.size[axis] = static_cast<int32_t>(plan_.size[axis]);
    job.voxels = static_cast<uint32_t>(voxels_);
    job.from = from;
    job.to = to;
  }

  static size_t facts_bytes(const Run& run) {
    return std::max((run.step_count * sizeof(StepFacts) + 15) / 16 * 16, kViewThreads / 32 * sizeof(ViewStatistics));
  }

  // The steps from `next_` on that one pass can carry out, as StepRunner has it. Whatever it writes goes to the output.
  PassJob next_pass() {
    PassJob job{};
    describe_view(job, view_, slot_.output.view);
    job.run.seed = slot_.key.seed;
    job.run.slot = slot_.key.slot;
    job.run.step = slot_.key.step;
    job.run.known = known_.mean || known_.range ? learned_ : nullptr;
    std::vector<StepRecord> records;
    const std::vector<Step>& steps = plan_.steps;
    for (; next_ < steps.size() && in_a_pass(steps[next_].kind) && known_.suffices(steps[next_]); ++next_) {
      const Step& step = steps[next_];
      records.push_back({step.kind, step.stream, block_.add(step.numbers), block_.add(step.boxes),
                         static_cast<int32_t>(step.boxes.size() / 6)});
      known_.note(step);
    }
    job.run.steps = block_.add(records);
    job.run.step_count = static_cast<int32_t>(records.size());
    const bool gathers = next_ < steps.size() && in_a_pass(steps[next_].kind);
    job.run.gathered = gathers ? gathered_ : nullptr;
    gathers_ = gathers;
    if (records.empty()) job.to = nullptr;
    else if (view_ != job.to) std::swap(view_, other_);
    return job;
  }

  void add_pass(const PassJob& job) { add(ViewKernel::pass, job, tiles_of(voxels_), facts_bytes(job.run)); }

  // What the last pass has gathered becomes what the next one knows; nothing outlives a step that moves voxels.
  void finish() {
    known_ = {gathers_, gathers_};
    if (gathers_) add(ViewKernel::finish_statistics, FinishJob{gathered_, learned_, tiles_of(voxels_)}, 1,
                      kViewThreads / 32 * sizeof(ViewStatistics));
  }

  void describe_region(SampleJob& job) {
    const Region& region = slot_.region;
    const Index3 size = size_of(region.box);
    job.region = region.voxels;
    job.background = region.background;
    job.nearest = slot_.interpolation == Interpolation::nearest;
    for (int axis = 0; axis < 3; ++axis) {
      job.region_size[axis] = static_cast<int32_t>(size[axis]);
      job.lower[axis] = static_cast<double>(region.box.lower[axis]);
      job.step[axis] = static_cast<float>(plan_.to_volume[4 * axis + 2]);
    }
    if (scratch_.region == 0) return;
    smooth(region.voxels, region.type, smoothed_, size, plan_.antialias);
    job.region = smoothed_;
  }

  void describe_geometry(SampleJob& job) {
    std::copy(plan_.to_volume.begin(), plan_.to_volume.end(), job.to_volume);
    const double* const row = job.to_volume;
    const bool deformed = plan_.elastic.points[0] > 0;
    job.straight = !deformed && row[2] == 0 && row[6] == 0 && std::fabs(row[10]) == 1;
    if (!deformed) return;
    check_elastic(plan_.elastic, plan_.size);
    job.shift = block_.add(plan_.elastic.shift);
    for (int axis = 0; axis < 3; ++axis) {
      job.points[axis] = static_cast<int32_t>(plan_.elastic.points[axis]);
      std::vector<SplineCell> cells;
      for (int64_t n = 0; n < plan_.size[axis]; ++n) cells.push_back(spline_cell(plan_.elastic, axis, n));
      job.cells[axis] = block_.add(cells);
    }
  }

  size_t control_bytes(const SampleJob& job) const {
    if (job.points[0] == 0) return 0;
    const int64_t rows = std::min(plan_.size[0] * plan_.size[1], (kTile + plan_.size[2] - 2) / plan_.size[2] + 1);
    const size_t bytes = static_cast<size_t>(rows) * 3 * job.points[2] * sizeof(float);
    if (bytes + facts_bytes(job.pass.run) > kMostSharedBytes)
      throw std::invalid_argument("an elastic deformation has " + std::to_string(job.points[2]) +
                                  " control points along the last axis of " + std::to_string(plan_.size[2]) +
                                  " voxels, more than a GPU has room for: set them further apart");
    return bytes;
  }

  void describe_field(SampleJob& job) const {
    const bool flat = plan_.size[0] == 1;
    const Affine psi = field_affine(plan_);
    std::copy(psi.begin(), psi.end(), job.psi);
    job.with_field = 1;
    job.mask = slot_.output.mask;
    for (int axis = 0; axis < 3; ++axis) {
      for (int other = 0; other < 3; ++other)
        job.linear[3 * axis + other] = static_cast<float>(plan_.from_volume[4 * axis + other]);
      job.psi_step[axis] = static_cast<float>(psi[4 * axis + 2]);
      const bool asked = !(flat && axis == 0);
      job.partner_low[axis] = asked ? 0.0f : -static_cast<float>(kFarthest);
      job.partner_high[axis] = static_cast<float>(asked ? static_cast<double>(plan_.partner_size[axis] - 1) : kFarthest);
      job.volume_low[axis] = -kBorder;
      job.volume_high[axis] = static_cast<double>(slot_.region.volume[axis] - 1) + kBorder;
      const int component = flat ? axis - 1 : axis;
      if (slot_.output.displacement != nullptr && component >= 0)
        job.displacement[axis] = slot_.output.displacement + component * voxels_;
    }
  }

  void move(const Step& step) {
    if (step.kind == StepKind::blur) {
      const float sigma = step.numbers[0];
      return smooth(view_, VoxelType::float32, view_, plan_.size, {sigma, sigma, sigma});
    }
    if (step.kind == StepKind::low_resolution) lower_resolution(step.numbers[0]);
    else move_boxes(step);
    std::swap(view_, other_);
  }

  // Axis by axis in the CPU's order; an axis of one voxel stays as it is.
  void smooth(const void* from, VoxelType type, float* to, const Index3& size, const std::array<float, 3>& sigma) {
    const size_t before = stages_.size();
    for (const int axis : {1, 2, 0}) {
      const std::vector<float> weights = gaussian_weights(sigma[axis]);
      if (weights.size() == 1 || size[axis] == 1) continue;
      add_smoothing(from, type, to, size, axis, weights);
      from = to;
      type = VoxelType::float32;
    }
    // Something has to write the copy that is sampled.
    if (stages_.size() == before && from != to) add_smoothing(from, type, to, size, 2, {1.0f});
  }

  void add_smoothing(const void* from, VoxelType type, float* to, const Index3& size, int axis,
                     const std::vector<float>& weights) {
    const int64_t length = size[axis], most = static_cast<int64_t>(kMostSharedBytes / sizeof(float));
    if (length > most)
      throw std::invalid_argument("an axis of " + std::to_string(length) + " voxels is to be smoothed; a GPU has room "
                                  "for " + std::to_string(most) + ": take a smaller crop, or no blur");
    const int64_t plane = size[1] * size[2];
    SmoothJob job{};
    job.from = from;
    job.to = to;
    job.half = type == VoxelType::float16;
    job.length = static_cast<int32_t>(length);
    job.along = static_cast<int32_t>(axis == 2 ? 1 : axis == 1 ? size[2] : plane);
    job.lines = static_cast<int32_t>(axis == 2 ? size[0] * size[1] : axis == 1 ? size[2] : plane);
    job.across = static_cast<int32_t>(axis == 2 ? size[2] : 1);
    job.groups = static_cast<int32_t>(axis == 1 ? size[0] : 1);
    job.group_stride = plane;
    job.together = kSmoothedTogether;
    while (job.together > 1 && job.together * length * sizeof(float) > kMostSharedBytes / 2) job.together /= 2;
    job.radius = static_cast<int32_t>(weights.size() / 2);
    job.weights = block_.add(weights);
    const int64_t parts = (job.lines + job.together - 1) / job.together;
    add(ViewKernel::smooth, job, job.groups * parts, job.together * length * sizeof(float));
  }

  void lower_resolution(float factor) {
    LowResolutionJob job{};
    describe_view(job, view_, other_);
    for (int axis = 0; axis < 3; ++axis) {
      const Coarse coarse(plan_.size[axis], factor);
      std::vector<CoarseCell> cells;
      for (int64_t n = 0; n < plan_.size[axis]; ++n)
        cells.push_back({static_cast<int32_t>(coarse.nearest[coarse.lower[n]]),
                         static_cast<int32_t>(coarse.nearest[coarse.upper(n)]), coarse.fraction[n]});
      job.cells[axis] = block_.add(cells);
    }
    add(ViewKernel::lower_resolution, job, tiles_of(voxels_), 0);
  }

  void move_boxes(const Step& step) {
    BoxesJob job{};
    describe_view(job, view_, other_);
    job.seed = slot_.key.seed;
    job.slot = slot_.key.slot;
    job.step = slot_.key.step;
    job.stream = step.stream;
    job.boxes = block_.add(step.boxes);
    job.box_count = static_cast<int32_t>(step.boxes.size() / 6);
    if (step.kind == StepKind::patch_swap) return add(ViewKernel::swap_patches, job, tiles_of(voxels_), 0);
    add(ViewKernel::clear_windows, job, tiles_of(voxels_), 0);
    if (job.box_count > 0) add(ViewKernel::mark_windows, job, job.box_count, 0);
    add(ViewKernel::shuffle_pixels, job, tiles_of(voxels_), 0);
  }

  const ViewSlot& slot_;
  const ViewPlan& plan_;
  ParameterBlock& block_;
  const ViewScratch scratch_;
  const int64_t voxels_;
  float *smoothed_, *view_, *other_;  // `other_`: room for another copy of the view, where a step moves voxels
  ViewStatistics *gathered_, *learned_;
  std::vector<ViewStage> stages_;
  size_t next_ = 0;  // step
  Knowledge known_;  // of the view before it
  bool gathers_ = false;
};

}  // namespace

Offset ParameterBlock::add(const void* data, size_t bytes) {
  const size_t at = (bytes_.size() + 7) / 8 * 8;
  if (at + bytes > UINT32_MAX) throw std::invalid_argument("the plans of a batch take 4 GB or more: send fewer slots");
  bytes_.resize(at + bytes);
  if (bytes > 0) std::memcpy(bytes_.data() + at, data, bytes);
  return static_cast<Offset>(at);
}

ViewScratch::ViewScratch(const ViewSlot& slot) {
  const ViewPlan& plan = *slot.plan;
  const size_t voxels = static_cast<size_t>(count_of(plan.size));
  const bool smoothed = plan.antialias != std::array<float, 3>{};
  region = smoothed ? padded(sizeof(float) * static_cast<size_t>(count_of(size_of(slot.region.box)))) : 0;
  copy = takes_a_copy(plan) ? padded(sizeof(float) * voxels) : 0;
  gathered = padded(sizeof(ViewStatistics) * static_cast<size_t>(tiles_of(static_cast<int64_t>(voxels))));
  known = padded(sizeof(ViewStatistics));
}

std::vector<ViewStage> stages_of(const ViewSlot& slot, uint8_t* scratch, ParameterBlock& block) {
  return SlotStages(slot, scratch, block).make();
}

}  // namespace voxtrast
