#include "target.h"

#include <cstdlib>
#include <cstring>

namespace voxtrast {
namespace {

Target choose() {
#if defined(__x86_64__)
  const char* wanted = std::getenv("VOXTRAST_CPU");
  const auto allowed = [&](const char* name) { return wanted == nullptr || std::strcmp(wanted, name) == 0; };
  __builtin_cpu_init();
  const bool fma = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool wide = fma && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw");
  if (wide && allowed("avx512")) return Target::avx512;
  if (fma && (allowed("avx512") || allowed("avx2"))) return Target::avx2;
#endif
  return Target::portable;
}

}  // namespace

Target target() {
  static const Target chosen = choose();
  return chosen;
}

}  // namespace voxtrast
