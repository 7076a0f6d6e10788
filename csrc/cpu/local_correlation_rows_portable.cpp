// The rows of local correlation for any processor with vectors of 4 floats.
#include "local_correlation_rows.h"

#define VOXTRAST_PATH kPortableCorrelation
#define VOXTRAST_ROWS_1 3
#define VOXTRAST_ROWS_2 2
#define VOXTRAST_ROWS_3 1
#define VOXTRAST_ROWS_4 1

#include "target_portable.h"
#include "local_correlation_rows.inl"
#include "target_end.h"
