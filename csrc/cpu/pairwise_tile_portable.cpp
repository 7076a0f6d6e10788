// The tile of the pairwise operators for any processor with vectors of 4 floats.
#include "pairwise_tile.h"

#define VOXTRAST_KERNELS kPortableKernels
#define VOXTRAST_ROWS 4
#define VOXTRAST_OUT_ROWS 4
#define VOXTRAST_OUT_VECTORS 2

#include "target_portable.h"
#include "pairwise_tile.inl"
#include "target_end.h"
