// Decides everything random about a slot of a step, by arithmetic on (seed, split, step, slot) alone: equal plans for
// any number of ranks and threads and any order of asking.
#pragma once

#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "dealing.h"
#include "draws.h"
#include "steps.h"
#include "view_spec.h"

namespace voxtrast {

struct CaseRow {
  Index3 shape{};
  Intensity intensity;
  int32_t group = 0;
  std::vector<Index3> foreground;  // places, see boxes.h
};

struct PlannerOptions {
  uint64_t seed = 0;
  int64_t global_batch = 1;
  int64_t crops_per_visit = 1;
  std::vector<double> weights{1.0};  // of the groups
  double foreground = 0.0;           // probability, see boxes.h
};

class Planner {
 public:
  // The cases must be usable (see boxes.h). Throws std::invalid_argument for what cannot be planned.
  Planner(ViewSpec spec, std::vector<CaseRow> cases, PlannerOptions options);

  Plan plan(uint32_t step, uint32_t slot, const std::string& split) const;
  // The same draws for another case than the one that was dealt.
  Plan plan_of(int64_t case_index, uint32_t step, uint32_t slot, const std::string& split) const;
  const std::vector<int64_t>& visits_in_a_block() const { return dealing_.visits_in_a_block(); }

 private:
  struct Slot {
    uint64_t seed;
    uint32_t step, slot, split;
    uint32_t stream(const std::string& purpose) const { return name_hash("/" + purpose, split); }
    Draws draws(const std::string& purpose) const { return Draws(seed, stream(purpose), slot, step); }
  };

  void check_streams(const std::string& split) const;
  ViewPlan plan_view(const View& view, const Box& box, const CaseRow& row, const Slot& slot) const;

  ViewSpec spec_;
  std::vector<CaseRow> cases_;
  PlannerOptions options_;
  std::vector<int> order_;  // of the views' boxes
  Dealing dealing_;
  mutable std::mutex mutex_;
  mutable std::set<std::string> checked_;  // splits
};

const char* step_name(StepKind kind);

// What a person reads: one line a fact.
std::string describe(const Plan& plan);

}  // namespace voxtrast
