// The work of local correlation on a block of neighbouring rows, compiled once for each instruction set from
// local_correlation_rows.inl. What is computed: kernels/local_correlation.py.
//
// Voxels lie in the lanes of a register, along the last axis. A key row that is read serves all queries of the block
// whose window holds it, and so does the row of gradients beside it. Logits of one plane of the window exist at a time.
#pragma once

#include <stdint.h>

namespace voxtrast {

// Some rows of the queries of one unit, and the keys in reach. Rows are cut into `strips` of `lanes` voxels. A row of
// what belongs to the block alone is `width` = (strips + 2) lanes long: a strip of zeros on either side. Zeros too
// stand beyond the last voxel and the last row of the volume.
struct CorrelationRows {
  int64_t strips, channels;
  int64_t radius;
  const float* query;  // (channels, rows, width), times scale and log2(e): logits are exponents of 2

  // The padded key at the first plane and row in reach and the first column of the padding: (channels, pitch) numbers
  // in a row, `row` from one to the next, `plane` from plane to plane. In reach are rows + 2 radius of each.
  const float* key;
  int64_t pitch, row, plane;

  // The same place in their gradient, (channels, strips * lanes) in a row: no padding of columns. In units of
  // 1 / log2(e); null: not needed.
  float* grad_key;
  int64_t grad_row, grad_plane;

  int64_t planes;       // in bounds, of the 2 radius + 1 (of 1 in 2-D)
  int64_t first_plane;  // offset of the first of them
  const float* column_edge;  // (2 radius + 1, strips * lanes): 0 where the key lies inside the volume, -infinity outside
  const float* row_edge;     // the same for the rows in reach

  float* logits;  // forward: memory for (2 radius + 1, rows, 9) registers
  float* slopes;  // backward: (2 radius + 1, rows, 9, width), zeros beside the row

  // forward: (4, rows, width) log-sum-exp to base 2 and mean offset along the three axes
  // backward: (5, rows, width) the log-sum-exp, the upstream gradients along the three axes, and their product with the
  //           mean offset
  float* voxels;
  float* grad_query;  // (channels, rows, width), without the scale; null: not needed
};

struct CorrelationPath {
  int64_t lanes;
  int64_t (*rows)(int64_t radius);  // of a block
  void (*forward)(const CorrelationRows&);
  void (*backward)(const CorrelationRows&);
  void (*scale_row)(const float* from, int64_t count, float factor, float* to);  // to = factor from
  void (*add_row)(const float* from, int64_t count, float factor, float* to);    // to += factor from
};

const CorrelationPath& correlation_path();

extern const CorrelationPath kPortableCorrelation;
#if defined(__x86_64__)
extern const CorrelationPath kAvx2Correlation;
extern const CorrelationPath kAvx512Correlation;
#endif

}  // namespace voxtrast
