// The instruction sets that hot loops are compiled for, each in a translation unit of its own (`*_avx512.cpp` ...), and
// which of them this processor takes.
#pragma once

namespace voxtrast {

enum class Target { portable, avx2, avx512 };

// The widest that this processor has; the environment variable VOXTRAST_CPU (avx512, avx2 or portable) lowers it.
Target target();

}  // namespace voxtrast
