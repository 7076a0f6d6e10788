// Permutations that are computed index by index, for the host and for CUDA: a Feistel network of four rounds over the
// smallest even number of bits (at least 4) that holds all indices; what it sends beyond them is sent on until it comes
// back. The keys of window n of a step are the words of philox(seed, n, stream, slot, step).
#pragma once

#include "../geometry/random.h"

namespace voxtrast {

VOXTRAST_HOST_DEVICE uint32_t half_bits(uint32_t size) {
  uint32_t bits = 2;
  while (bits < 16 && size > 1u << (2 * bits)) ++bits;
  return bits;
}

VOXTRAST_HOST_DEVICE uint32_t feistel_round(uint32_t half, uint32_t key) {
  uint32_t mixed = (half ^ key) * 0x9E3779B1u;
  mixed = (mixed ^ mixed >> 15) * 0x85EBCA77u;
  return mixed >> 16;
}

VOXTRAST_HOST_DEVICE uint32_t permuted(uint32_t index, uint32_t size, uint32_t half, const uint32_t (&key)[4]) {
  const uint32_t mask = (1u << half) - 1;
  do {
    uint32_t left = index >> half, right = index & mask;
    for (int round = 0; round < 4; ++round) {
      const uint32_t next = left ^ (feistel_round(right, key[round]) & mask);
      left = right;
      right = next;
    }
    index = left << half | right;
  } while (index >= size);
  return index;
}

}  // namespace voxtrast
