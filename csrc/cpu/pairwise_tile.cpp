// Which of the compiled paths of the pairwise operators this processor takes.
#include "pairwise_tile.h"

#include <cstdlib>
#include <cstring>

namespace voxtrast {
namespace {

const Kernels& choose() {
#if defined(__x86_64__)
  const char* wanted = std::getenv("VOXTRAST_CPU");
  const auto allowed = [&](const Kernels& path) { return wanted == nullptr || std::strcmp(wanted, path.name) == 0; };
  __builtin_cpu_init();
  const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool wide = fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  if (wide && allowed(kAvx512Kernels)) return kAvx512Kernels;
  if (fma && (wanted == nullptr || !std::strcmp(wanted, kAvx512Kernels.name) || allowed(kAvx2Kernels)))
    return kAvx2Kernels;
#endif
  return kPortableKernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace voxtrast
