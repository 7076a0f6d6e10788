// The steps of a view. Those that change voxels one by one are done to a strip of rows while it is in the cache, as many
// in a row as there are until one needs to know something of the whole view, or moves voxels.
#pragma once

#include "step_rules.h"
#include "workspace.h"

namespace voxtrast {

class StepRunner {
 public:
  // Throws std::invalid_argument for a step that cannot be carried out.
  StepRunner(const ViewPlan& plan, const DrawKey& key, float* view, ViewWorkspace::Buffers& buffers);

  // Steps up to the first that needs more than the strip itself. Every strip of the view must go through, in order.
  void perform_first(const Strip& strip) { perform(strip); }
  void perform_others();

 private:
  struct Operation {
    const Step* step;
    float mean, low, high;  // of the view as the step finds it, where it asks
  };
  // What is known of the view after the steps before `next_`.
  struct Known : Knowledge {
    ViewStatistics of{};
  };

  NumberStream stream(const Step& step) const { return {key_.seed, step.stream, key_.slot, key_.step}; }
  void collect_run();
  void note(const Operation& operation);
  void perform(const Strip& strip);
  void perform_one(const Operation& operation, const Strip& strip, float* values) const;
  void bias_rows(const Step& step, const Strip& strip, float* values) const;
  void learn();
  void perform_whole(const Step& step);
  void low_resolution(float factor);
  void shuffle_pixels(const Step& step);
  void swap_patches(const Step& step);
  void fill_boxes(const Step& step);
  void fill_outside(const Step& step);

  const ViewPlan& plan_;
  const DrawKey key_;
  float* const view_;
  ViewWorkspace::Buffers& buffers_;
  size_t next_ = 0;
  std::vector<Operation> run_;
  bool gathers_ = false;
  ViewStatistics gathered_{};
  Known known_;
};

}  // namespace voxtrast
