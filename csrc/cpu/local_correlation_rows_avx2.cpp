// The rows of local correlation for AVX2: 16 registers of 8 floats.
#include "local_correlation_rows.h"

#if defined(__x86_64__)
#define VOXTRAST_PATH kAvx2Correlation
#define VOXTRAST_ROWS_1 3
#define VOXTRAST_ROWS_2 2
#define VOXTRAST_ROWS_3 1
#define VOXTRAST_ROWS_4 1

#include "target_avx2.h"
#include "local_correlation_rows.inl"
#include "target_end.h"
#endif
