// The points of the warp family for any processor with vectors of 4 floats.
#include "warp_points.h"

#define VOXTRAST_PATH kPortableWarp

#include "target_portable.h"
#include "warp_points.inl"
#include "target_end.h"
