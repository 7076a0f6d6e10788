// The launches of a program, one after the other on one stream.
#pragma once

#include "moves.cuh"
#include "program.h"
#include "sample.cuh"
#include "smooth.cuh"

namespace voxtrast {

typedef void (*ViewKernelFunction)(const uint8_t* block, Offset jobs);

inline ViewKernelFunction function_of(ViewKernel kernel) {
  switch (kernel) {
    case ViewKernel::smooth: return &smooth_lines;
    case ViewKernel::sample_float32: return &sample_views<float>;
    case ViewKernel::sample_float16: return &sample_views<__half>;
    case ViewKernel::finish_statistics: return &finish_statistics;
    case ViewKernel::clear_windows: return &clear_windows;
    case ViewKernel::mark_windows: return &mark_windows;
    case ViewKernel::shuffle_pixels: return &shuffle_pixels;
    case ViewKernel::swap_patches: return &swap_patches;
    case ViewKernel::lower_resolution: return &lower_resolution;
    case ViewKernel::pass: return &pass_over_views;
  }
  return nullptr;
}

// `block`: the program's, on the device.
template <typename Launch>
void run_program(const ViewProgram& program, const uint8_t* block, const Launch& launch) {
  for (const ViewLaunch& each : program.launches)
    launch(function_of(each.kernel), dim3(static_cast<unsigned>(each.blocks), each.slots), dim3(kViewThreads),
           each.shared_bytes, block, each.jobs);
}

}  // namespace voxtrast
