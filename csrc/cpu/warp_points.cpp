#include "warp_points.h"

#include "target.h"

namespace voxtrast {

const WarpPath& warp_path() {
#if defined(__x86_64__)
  if (target() == Target::avx512) return kAvx512Warp;
  if (target() == Target::avx2) return kAvx2Warp;
#endif
  return kPortableWarp;
}

}  // namespace voxtrast
