// The rows of a view for AVX2: 16 registers of 8 floats.
#include "row_path.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define VOXTRAST_PATH kAvx2Rows

#include "../cpu/target_avx2.h"
#include "row_path.inl"
#include "../cpu/target_end.h"
#endif
