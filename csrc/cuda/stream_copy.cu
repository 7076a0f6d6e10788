// voxtrast::stream_copy on CUDA: a plain copy by one grid, 16 bytes a thread and turn. Its time is the bandwidth limit
// that memory-bound kernels are measured against.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>

namespace voxtrast {
namespace {

using torch::stable::Tensor;

constexpr int kThreads = 512;

// source, target (words): 16-byte words; source_tail, target_tail (bytes): what is left over
__global__ void __launch_bounds__(kThreads) copy_words(const uint4* __restrict__ source, uint4* __restrict__ target,
                                                       int64_t words, const uint8_t* __restrict__ source_tail,
                                                       uint8_t* __restrict__ target_tail, int bytes) {
  const int64_t thread = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = int64_t(gridDim.x) * kThreads;
  for (int64_t word = thread; word < words; word += threads) target[word] = source[word];
  if (thread < bytes) target_tail[thread] = source_tail[thread];
}

Tensor stream_copy(const Tensor& source_given) {
  const torch::stable::accelerator::DeviceGuard guard(source_given.get_device_index());
  const Tensor source = torch::stable::contiguous(source_given);
  Tensor target = torch::stable::new_empty(source, source.sizes());
  const int64_t bytes = source.numel() * static_cast<int64_t>(source.element_size());
  if (bytes == 0) return target;
  const auto* from = static_cast<const uint8_t*>(source.const_data_ptr());
  auto* to = static_cast<uint8_t*>(target.mutable_data_ptr());
  // A view may begin anywhere; 16-byte words may not: then the driver copies.
  const bool aligned = reinterpret_cast<uintptr_t>(from) % sizeof(uint4) == 0;
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(source.get_device_index(), &stream));
  if (!aligned) {
    STD_CUDA_CHECK(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(stream)));
    return target;
  }
  int device = 0, processors = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  const int64_t words = bytes / static_cast<int64_t>(sizeof(uint4));
  const int64_t copied = words * static_cast<int64_t>(sizeof(uint4));
  copy_words<<<8 * processors, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      reinterpret_cast<const uint4*>(from), reinterpret_cast<uint4*>(to), words, from + copied, to + copied,
      static_cast<int>(bytes - copied));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return target;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(voxtrast, CUDA, library) { library.impl("stream_copy", TORCH_BOX(&stream_copy)); }

}  // namespace voxtrast
