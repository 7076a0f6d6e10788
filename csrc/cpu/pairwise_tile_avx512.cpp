// The tile of the pairwise operators for AVX-512: 32 registers of 16 floats.
#include "pairwise_tile.h"

#if defined(__x86_64__)
#define VOXTRAST_NAME "avx512"
#define VOXTRAST_KERNELS kAvx512Kernels
#define VOXTRAST_LANES 16
#define VOXTRAST_ROWS 8
#define VOXTRAST_OUT_ROWS 6
#define VOXTRAST_OUT_VECTORS 4

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")
#endif
#include "pairwise_tile.inl"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif
