// The tile of the pairwise operators for AVX-512: 32 registers of 16 floats.
#include "pairwise_tile.h"

#if defined(__x86_64__)
#define VOXTRAST_KERNELS kAvx512Kernels
#define VOXTRAST_ROWS 8
#define VOXTRAST_OUT_ROWS 6
#define VOXTRAST_OUT_VECTORS 4

#include "target_avx512.h"
#include "pairwise_tile.inl"
#include "target_end.h"
#endif
