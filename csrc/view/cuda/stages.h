// What one slot asks of the device, stage by stage.
#pragma once

#include <type_traits>
#include <vector>

#include "program.h"

namespace voxtrast {

// The bytes that the kernels read, in the making.
class ParameterBlock {
 public:
  Offset add(const void* data, size_t bytes);
  template <typename T>
  Offset add(const std::vector<T>& table) {
    static_assert(std::is_trivially_copyable_v<T>);
    return add(table.data(), table.size() * sizeof(T));
  }
  std::vector<uint8_t> take() { return std::move(bytes_); }

 private:
  std::vector<uint8_t> bytes_;
};

struct ViewStage {
  ViewKernel kernel;
  std::vector<uint8_t> job;
  int64_t blocks;
  size_t shared_bytes;
};

// The device memory of a slot: what it needs, part by part.
struct ViewScratch {
  explicit ViewScratch(const ViewSlot& slot);
  size_t region, copy, gathered, known;  // bytes: the region smoothed; the view once more; see Run
  size_t bytes() const { return region + copy + gathered + known; }
};

// Throws as make_program does.
std::vector<ViewStage> stages_of(const ViewSlot& slot, uint8_t* scratch, ParameterBlock& block);

}  // namespace voxtrast
