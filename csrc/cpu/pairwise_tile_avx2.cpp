// The tile of the pairwise operators for AVX2: 16 registers of 8 floats.
#include "pairwise_tile.h"

#if defined(__x86_64__)
#define VOXTRAST_NAME "avx2"
#define VOXTRAST_KERNELS kAvx2Kernels
#define VOXTRAST_LANES 8
#define VOXTRAST_ROWS 6
#define VOXTRAST_OUT_ROWS 6
#define VOXTRAST_OUT_VECTORS 2

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#include "pairwise_tile.inl"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
