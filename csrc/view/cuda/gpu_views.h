// Views made on a GPU: the program's memory and its launches on a stream.
#pragma once

#include <cuda_runtime_api.h>

#include <memory>
#include <vector>

#include "program.h"

namespace voxtrast {

// Keeps its memory from one call to the next. Not shared by threads; of the device that is current when it is made.
class GpuViews {
 public:
  GpuViews();
  ~GpuViews();

  // Returns before the views are made: they are as soon as the stream has come there. Throws std::invalid_argument as
  // make_program does, std::runtime_error with what CUDA says.
  void make(const std::vector<ViewSlot>& slots, cudaStream_t stream);

 private:
  struct Memory;
  std::unique_ptr<Memory> memory_;
};

}  // namespace voxtrast
