// From here to target_end.h code is compiled for any processor, with vectors of 4 floats.
#define VOXTRAST_LANES 4
#define VOXTRAST_BASELINE
