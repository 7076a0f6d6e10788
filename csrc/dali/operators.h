// What the operators share: their plans, and one task of the thread pool for each slot.
#pragma once

#include <dali/pipeline/operator/operator.h>

#include <vector>

#include "../geometry/plan.h"

namespace voxtrast {

inline std::vector<Plan> decode_plans(const dali::TensorList<dali::CPUBackend>& bytes) {
  DALI_ENFORCE(bytes.type() == DALI_UINT8, "voxtrast: a plan is sent as uint8");
  std::vector<Plan> plans;
  for (int slot = 0; slot < bytes.num_samples(); ++slot)
    plans.push_back(decode(static_cast<const uint8_t*>(bytes.raw_tensor(slot)),
                           static_cast<size_t>(bytes[slot].shape().num_elements())));
  return plans;
}

// Calls work(slot, thread) for all samples of the first input; what they throw leaves DALI as one exception.
template <typename Work>
void for_each_slot(dali::Workspace& workspace, const Work& work) {
  auto& pool = workspace.GetThreadPool();
  const int slots = workspace.GetInputBatchSize(0);
  for (int slot = 0; slot < slots; ++slot)
    pool.AddWork([&work, slot](int thread) { work(slot, thread); }, -slot);  // priorities: in order
  pool.RunAll();
}

}  // namespace voxtrast
