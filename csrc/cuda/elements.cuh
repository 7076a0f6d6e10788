// Elements of images and maps: stored in 16 or 32 bits, computed with in float32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace voxtrast {

__host__ __device__ inline float to_float(float value) { return value; }
__host__ __device__ inline float to_float(__half value) { return __half2float(value); }
__host__ __device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__host__ __device__ inline T from_float(float value);
template <>
__host__ __device__ inline float from_float<float>(float value) {
  return value;
}
template <>
__host__ __device__ inline __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__host__ __device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// Of memory that the kernel does not write: such loads may be moved before stores.
template <typename T>
__device__ inline float load(const T* element) {
  return to_float(__ldg(element));
}

}  // namespace voxtrast
