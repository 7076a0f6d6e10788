// The rows of a view for AVX-512: 32 registers of 16 floats.
#include "row_path.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define VOXTRAST_PATH kAvx512Rows

#include "../cpu/target_avx512.h"
#include "row_path.inl"
#include "../cpu/target_end.h"
#endif
