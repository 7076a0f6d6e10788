// The rows of a view for any processor with vectors of 4 floats.
#include "row_path.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#define VOXTRAST_PATH kPortableRows

#include "../cpu/target_portable.h"
#include "row_path.inl"
#include "../cpu/target_end.h"
