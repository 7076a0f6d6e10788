// The work on rows of a view, compiled once for each instruction set from row_path.inl.
#pragma once

#include <stdint.h>

namespace voxtrast {

// One row of a view along W in a region of voxels: voxel w is read at start + w step + shift[w], in indices of the
// region.
struct SampledRow {
  const void* voxels;
  int32_t size[3];  // of the region; its voxels are fewer than 2^31
  float background;
  double start[3], step[3];
  const float* shift[3];  // (count) each, followed by kRowSlack floats
  int64_t ahead;          // voxels of the region to where the row of the view's next plane is read, about
  int64_t count;
};

// One row of psi = start + w step + linear shift[w], and of its mask: 1 where along each axis
//   low <= psi + w along_row <= high     and     volume_low <= position + w position_step + shift[w] <= volume_high
struct FieldRow {
  double start[3], step[3];
  float linear[3][3];
  double low[3], high[3], along_row[3];
  double position[3], position_step[3], volume_low[3], volume_high[3];
  const float* shift[3];
  int64_t count;
  float* displacement[3];  // null for a component that is not wanted
  float* mask;             // or null
};

// A stream of random words, see random.h.
struct NumberStream {
  uint64_t seed;
  uint32_t stream, slot, step;
};

struct ViewStatistics {
  double sum;
  float low, high;
};

// A permutation of 0 .. size - 1, see permutation.h.
struct PermutationKey {
  uint32_t size, half_bits, word[4];
};

constexpr int64_t kRowSlack = 16;
constexpr int kBezierEntries = 256;

struct RowPath {
  // By VoxelType and Interpolation.
  void (*sample[2][2])(const SampledRow&, float* values);
  void (*field)(const FieldRow&);

  // out[i] = sum over t of weights[t] rows[t][i]
  void (*weighted_sum)(const float* const* rows, const float* weights, int64_t taps, int64_t count, float* out);
  void (*widen)(const uint16_t* halves, int64_t count, float* out);

  void (*gather_statistics)(const float* values, int64_t count, ViewStatistics& statistics);
  void (*add)(float* values, int64_t count, float shift);
  void (*contrast)(float* values, int64_t count, float mean, float factor);
  void (*gamma)(float* values, int64_t count, float low, float high, float exponent, bool inverted);
  void (*bezier)(float* values, int64_t count, float low, float high, const float* table);
  // values = background + (values - background) exp(cubic[0] + cubic[1] x + ..), x = start + i step
  void (*bias)(float* values, int64_t count, float background, const float* cubic, float start, float step);
  // Number n of the stream belongs to voxel n.
  void (*noise)(float* values, int64_t count, const NumberStream&, int64_t first, float std);
  void (*uniform)(float* values, int64_t count, const NumberStream&, int64_t first, float low, float high);
  // What the numbers first .. first + count become.
  void (*permute)(const PermutationKey&, uint32_t first, int64_t count, uint32_t* places);
};

const RowPath& row_path();

extern const RowPath kPortableRows;
#if defined(__x86_64__)
extern const RowPath kAvx2Rows;
extern const RowPath kAvx512Rows;
#endif

}  // namespace voxtrast
