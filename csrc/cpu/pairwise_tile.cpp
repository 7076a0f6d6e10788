#include "pairwise_tile.h"

#include "target.h"

namespace voxtrast {

const Kernels& kernels() {
#if defined(__x86_64__)
  if (target() == Target::avx512) return kAvx512Kernels;
  if (target() == Target::avx2) return kAvx2Kernels;
#endif
  return kPortableKernels;
}

}  // namespace voxtrast
