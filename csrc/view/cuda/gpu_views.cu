#include "gpu_views.h"

#include <cstring>
#include <stdexcept>
#include <string>

#include "run_program.cuh"

namespace voxtrast {
namespace {

void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("voxtrast_view: ") + what + ": " + cudaGetErrorString(error));
}

struct Launch {
  cudaStream_t stream;

  template <class... Parameters, class... Given>
  void operator()(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Given... given) const {
    constexpr size_t kUnasked = 48 * 1024;
    if (shared_bytes > kUnasked)
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes)),
            "shared memory of a kernel");
    kernel<<<grid, block, shared_bytes, stream>>>(given...);
    check(cudaGetLastError(), "launch of a kernel");
  }
};

// Only ever grows; what frees it waits for whatever still uses it.
struct DeviceBuffer {
  uint8_t* data = nullptr;
  size_t bytes = 0;

  ~DeviceBuffer() { cudaFree(data); }
  uint8_t* at_least(size_t count) {
    if (count <= bytes) return data;
    cudaFree(data);
    data = nullptr;
    bytes = 0;
    const size_t room = count + count / 4;  // regions differ from call to call
    check(cudaMalloc(&data, room), "memory for the views in the making");
    bytes = room;
    return data;
  }
};

// What is sent lies still until the copy is through.
struct PinnedBuffer {
  void* data = nullptr;
  size_t bytes = 0;
  cudaEvent_t copied = nullptr;

  PinnedBuffer() { check(cudaEventCreateWithFlags(&copied, cudaEventDisableTiming), "event"); }
  ~PinnedBuffer() {
    cudaFreeHost(data);
    cudaEventDestroy(copied);
  }
  void send(const std::vector<uint8_t>& block, uint8_t* to, cudaStream_t stream) {
    check(cudaEventSynchronize(copied), "copy of an earlier plan");
    if (block.size() > bytes) {
      cudaFreeHost(data);
      data = nullptr;
      bytes = 0;
      check(cudaHostAlloc(&data, 2 * block.size(), cudaHostAllocDefault), "pinned memory for plans");
      bytes = 2 * block.size();
    }
    std::memcpy(data, block.data(), block.size());
    check(cudaMemcpyAsync(to, data, block.size(), cudaMemcpyHostToDevice, stream), "copy of the plans");
    check(cudaEventRecord(copied, stream), "event");
  }
};

}  // namespace

struct GpuViews::Memory {
  DeviceBuffer scratch, block;
  PinnedBuffer pinned[3];
  int next = 0;
  cudaEvent_t done = nullptr;

  Memory() { check(cudaEventCreateWithFlags(&done, cudaEventDisableTiming), "event"); }
  ~Memory() { cudaEventDestroy(done); }
};

GpuViews::GpuViews() : memory_(std::make_unique<Memory>()) {}
GpuViews::~GpuViews() = default;

void GpuViews::make(const std::vector<ViewSlot>& slots, cudaStream_t stream) {
  Memory& memory = *memory_;
  uint8_t* const scratch = memory.scratch.at_least(scratch_bytes(slots));
  const ViewProgram program = make_program(slots, scratch);
  uint8_t* const block = memory.block.at_least(program.block.size());
  check(cudaStreamWaitEvent(stream, memory.done), "wait for earlier views");  // which may have had another stream
  memory.pinned[memory.next].send(program.block, block, stream);
  memory.next = (memory.next + 1) % 3;
  run_program(program, block, Launch{stream});
  check(cudaEventRecord(memory.done, stream), "event");
}

}  // namespace voxtrast
