// The end of what target_avx512.h, target_avx2.h or target_portable.h began.
#ifndef VOXTRAST_BASELINE
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
