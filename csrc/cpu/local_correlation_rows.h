// The work of local correlation on a block of neighbouring rows, compiled once for each instruction set from
// local_correlation_rows.inl. What is computed: kernels/local_correlation.py.
//
// Voxels lie in the lanes of a register, along the last axis. A key row that is read serves all queries of the block
// whose window holds it, and so does the row of gradients beside it. Logits of one plane of the window exist at a time.
#pragma once

#include <stdint.h>

namespace voxtrast {

// The same rows of the queries of one unit, and of the keys in reach. Rows are cut into `strips` of `lanes` voxels;
// what lies beyond the last voxel, or the last row, holds zeros.
struct CorrelationRows {
  int64_t strips, channels;
  int64_t radius;
  const float* query;  // (strips, channels, rows, lanes), times scale and log2(e): logits are exponents of 2

  // The padded key at the first plane and row in reach and the first column of the padding:
  // planes of rows of `channels` x `pitch` numbers. In reach are rows + 2 radius of them.
  const float* key;
  float* grad_key;  // the same place in the gradient of the padded key, in units of 1 / log2(e); null: not needed
  int64_t pitch, plane;

  int64_t planes;       // in bounds, of the 2 radius + 1 (of 1 in 2-D)
  int64_t first_plane;  // offset of the first of them
  const float* column_edge;  // (2 radius + 1, strips * lanes): 0 where the key lies inside the volume, -infinity outside
  const float* row_edge;     // the same for the rows in reach

  float* logits;  // memory for (2 radius + 1, rows, 9) registers

  // forward: (strips, 4, rows, lanes) log-sum-exp to base 2 and mean offset along the three axes
  // backward: (strips, 5, rows, lanes) the log-sum-exp, the upstream gradients along the three axes, and their product
  //           with the mean offset
  float* voxels;
  float* grad_query;  // (strips, channels, rows, lanes), without the scale; null: not needed
};

struct CorrelationPath {
  int64_t lanes;
  int64_t (*rows)(int64_t radius);  // of a block
  void (*forward)(const CorrelationRows&);
  void (*backward)(const CorrelationRows&);
};

const CorrelationPath& correlation_path();

extern const CorrelationPath kPortableCorrelation;
#if defined(__x86_64__)
extern const CorrelationPath kAvx2Correlation;
extern const CorrelationPath kAvx512Correlation;
#endif

}  // namespace voxtrast
