// The rows of local correlation for AVX-512: 32 registers of 16 floats.
#include "local_correlation_rows.h"

#if defined(__x86_64__)
#define VOXTRAST_PATH kAvx512Correlation
#define VOXTRAST_ROWS_1 4
#define VOXTRAST_ROWS_2 4
#define VOXTRAST_ROWS_3 3
#define VOXTRAST_ROWS_4 2

#include "target_avx512.h"
#include "local_correlation_rows.inl"
#include "target_end.h"
#endif
