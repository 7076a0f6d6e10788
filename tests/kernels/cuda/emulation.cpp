// Kernels, right and wrong, by which the tests see that the emulation reports what it should.
#include "emulation.h"

#include "cuda/shared_memory.cuh"

namespace {

using voxtrast::shared_memory;

// values, sums (blocks * threads): every thread gets the sum of its block.
__global__ void sum_block(const float* values, float* sums, int64_t count, bool forget_barrier) {
  float* tile = shared_memory<float>();
  const int64_t position = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  tile[threadIdx.x] = position < count ? values[position] : 0.0f;
  if (!forget_barrier) __syncthreads();
  float sum = 0.0f;
  for (unsigned thread = 0; thread < blockDim.x; ++thread) sum += tile[thread];
  if (position < count) sums[position] = sum;
}

__global__ void sum_warps(const float* values, float* sum) {
  float mine = values[threadIdx.x];
  for (int lanes = 16; lanes > 0; lanes /= 2) mine += __shfl_xor_sync(0xffffffffu, mine, lanes);
  if (threadIdx.x % 32 == 0) atomicAdd(sum, mine);
}

__global__ void miss_barrier(float* values, int way) {
  if (way == 0 && threadIdx.x == 3) return;
  if (way == 1 && threadIdx.x == 3) __syncthreads();
  if (way == 2 && threadIdx.x % 2 == 0) __syncwarp();
  __syncthreads();
  values[threadIdx.x] = 1.0f;
}

__global__ void touch(float* values, int offset) { values[offset] = values[offset] + 1.0f; }
__global__ void touch_shared(float* values, int offset) { values[0] = shared_memory<float>()[offset]; }

}  // namespace

extern "C" {

const char* sum_blocks(const float* values, float* sums, int64_t count, int64_t threads, int64_t forget_barrier) {
  return emulation::report([=] {
    const dim3 grid(static_cast<unsigned>((count + threads - 1) / threads));
    emulation::Launch()(&sum_block, grid, dim3(static_cast<unsigned>(threads)), threads * sizeof(float), values, sums,
                        count, forget_barrier != 0);
  });
}

const char* sum_by_warps(const float* values, float* sum, int64_t count) {
  return emulation::report(
      [=] { emulation::Launch()(&sum_warps, dim3(1), dim3(static_cast<unsigned>(count)), 0, values, sum); });
}

const char* miss_a_barrier(float* values, int64_t way) {
  return emulation::report([=] { emulation::Launch()(&miss_barrier, dim3(1), dim3(32), 0, values, int(way)); });
}

const char* touch_at(float* values, int64_t offset, int64_t in_shared) {
  return emulation::report([=] {
    if (in_shared) return emulation::Launch()(&touch_shared, dim3(1), dim3(1), 16 * sizeof(float), values, int(offset));
    emulation::Launch()(&touch, dim3(1), dim3(1), 0, values, int(offset));
  });
}

const char* launch_with(int64_t blocks_z, int64_t threads, int64_t shared_bytes) {
  return emulation::report([=] {
    emulation::Launch()(&touch, dim3(1, 1, static_cast<unsigned>(blocks_z)), dim3(static_cast<unsigned>(threads)),
                        static_cast<size_t>(shared_bytes), static_cast<float*>(nullptr), 0);
  });
}
}
