// The dynamic shared memory of a block, for kernels that the tests run on the CPU as well (tests/kernels/cuda).
#pragma once

#ifdef __CUDACC__
namespace voxtrast {

template <class T>
__device__ T* shared_memory() {
  extern __shared__ uint4 voxtrast_shared_words[];
  return reinterpret_cast<T*>(voxtrast_shared_words);
}

}  // namespace voxtrast
#endif
