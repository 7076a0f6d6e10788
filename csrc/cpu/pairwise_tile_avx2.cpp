// The tile of the pairwise operators for AVX2: 16 registers of 8 floats.
#include "pairwise_tile.h"

#if defined(__x86_64__)
#define VOXTRAST_KERNELS kAvx2Kernels
#define VOXTRAST_ROWS 6
#define VOXTRAST_OUT_ROWS 6
#define VOXTRAST_OUT_VECTORS 2

#include "target_avx2.h"
#include "pairwise_tile.inl"
#include "target_end.h"
#endif
