#include "row_path.h"

#include "../cpu/target.h"

namespace voxtrast {

const RowPath& row_path() {
#if defined(__x86_64__)
  if (target() == Target::avx512) return kAvx512Rows;
  if (target() == Target::avx2) return kAvx2Rows;
#endif
  return kPortableRows;
}

}  // namespace voxtrast
