// Random numbers that depend on where they are asked for and on nothing else: Philox4x32-10 (Salmon et al., "Parallel
// random numbers: as easy as 1, 2, 3", 2011), for the host, for its vector loops and for CUDA.
//
//     key = seed         counter = (block, stream, slot, step)
//
// A stream stands for one purpose of one view of one split: a hash of its name. Block b of a field of noise holds the
// numbers of the voxels 4 b .. 4 b + 3 of the view, in C order.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define VOXTRAST_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define VOXTRAST_HOST_DEVICE inline
#endif

namespace voxtrast {

struct Random4 {
  uint32_t word[4];
};

VOXTRAST_HOST_DEVICE Random4 philox(uint64_t seed, uint32_t block, uint32_t stream, uint32_t slot, uint32_t step) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  uint32_t c0 = block, c1 = stream, c2 = slot, c3 = step;
  for (int round = 0; round < 10; ++round) {
    const uint64_t first = uint64_t(0xD2511F53u) * c0, second = uint64_t(0xCD9E8D57u) * c2;
    const uint32_t high0 = static_cast<uint32_t>(first >> 32), high1 = static_cast<uint32_t>(second >> 32);
    c0 = high1 ^ c1 ^ key0;
    c2 = high0 ^ c3 ^ key1;
    c1 = static_cast<uint32_t>(second);
    c3 = static_cast<uint32_t>(first);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// [0, 1), of 24 bits, exact in float32.
VOXTRAST_HOST_DEVICE float uniform(uint32_t word) { return static_cast<float>(word >> 8) * (1.0f / 16777216.0f); }

}  // namespace voxtrast
