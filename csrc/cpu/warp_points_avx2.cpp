// The points of the warp family for AVX2: 16 registers of 8 floats.
#include "warp_points.h"

#if defined(__x86_64__)
#define VOXTRAST_PATH kAvx2Warp

#include "target_avx2.h"
#include "warp_points.inl"
#include "target_end.h"
#endif
