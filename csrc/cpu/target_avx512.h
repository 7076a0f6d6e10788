// From here to target_end.h code is compiled for AVX-512. Nothing of the standard library may be used there: an inline
// function of it, compiled for more than the baseline, could be the copy that the linker keeps for everybody.
#include <immintrin.h>

#define VOXTRAST_LANES 16
#define VOXTRAST_AVX512
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512vl,avx512bw,avx2,fma")
#endif
