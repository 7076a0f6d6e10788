// The points of the warp family for AVX-512: 32 registers of 16 floats.
#include "warp_points.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define VOXTRAST_PATH kAvx512Warp

#include "target_avx512.h"
#include "warp_points.inl"
#include "target_end.h"
#endif
