// The tile of the pairwise operators for any processor with vectors of 4 floats.
#include "pairwise_tile.h"

#define VOXTRAST_NAME "portable"
#define VOXTRAST_KERNELS kPortableKernels
#define VOXTRAST_LANES 4
#define VOXTRAST_ROWS 4
#define VOXTRAST_OUT_ROWS 4
#define VOXTRAST_OUT_VECTORS 2

#include "pairwise_tile.inl"
