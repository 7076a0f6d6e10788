// The voxels of a box of a stored volume.
#pragma once

#include <cstdint>

#include "view.h"

namespace voxtrast {

// In the order of STORED_TYPES in engine/data/native.py.
enum class StoredType : int64_t { float16, float32, uint8, int8, uint16, int16, uint32, int32 };

struct StoredVolume {
  int descriptor = -1;  // open, and open for as long as anybody reads
  int64_t offset = 0;   // of the first voxel in the file, in bytes
  StoredType type{};
  Index3 shape{};
};

// Writes the voxels of `box` in C order, as float32 or as they are where that is float16, with `background` outside the
// volume. Reads what it needs with pread: of a mapped file that somebody cuts off meanwhile, the rest of the mapping
// kills the process (SIGBUS). Throws std::runtime_error naming a file that cannot
// be read, ends too early or holds what is no number.
void read_region(const StoredVolume& volume, const Box& box, float background, VoxelType type, void* voxels);

}  // namespace voxtrast
