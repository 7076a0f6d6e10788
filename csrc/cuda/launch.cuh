// Starts kernels on the current stream of a tensor's device.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

namespace voxtrast {

// What the planners of the kernels call; the tests put an emulation in its place.
class Launch {
 public:
  explicit Launch(const torch::stable::Tensor& tensor) {
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <class... Parameters, class... Given>
  void operator()(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Given... given) const {
    if (shared_bytes > kUnasked)
      STD_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(shared_bytes)));
    kernel<<<grid, block, shared_bytes, stream_>>>(given...);
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  }

 private:
  static constexpr size_t kUnasked = 48 * 1024;
  cudaStream_t stream_ = nullptr;
};

}  // namespace voxtrast
