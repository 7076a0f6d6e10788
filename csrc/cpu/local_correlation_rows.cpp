#include "local_correlation_rows.h"

#include "target.h"

namespace voxtrast {

const CorrelationPath& correlation_path() {
#if defined(__x86_64__)
  if (target() == Target::avx512) return kAvx512Correlation;
  if (target() == Target::avx2) return kAvx2Correlation;
#endif
  return kPortableCorrelation;
}

}  // namespace voxtrast
