// What the compiled paths of the pairwise operators offer: packing, and the work on one tile of the matrix of
// similarities, which never exists as a whole. One implementation (pairwise_tile.inl) is compiled once for each
// instruction set; `kernels()` chooses among them when the library is first used.
//
// Exponentials are taken to base 2 with shifts that are whole numbers. The argument is then reduced in one fused
// multiply-add, and 2^(scale * s - shift) is within 2e-7 relative of its true value for a given float32 s.
#pragma once

#include <stdint.h>

namespace voxtrast {

constexpr int64_t kNoDiagonal = INT64_MIN;
// Largest tile; the matrix of a tile and its panels of vectors stay in the second-level cache.
constexpr int64_t kTileRows = 128;
constexpr int64_t kTileColumns = 256;
// Floats from one row of a tile's matrix to the next; not a power of two, whose rows would share sets of the cache.
constexpr int64_t kMatrixRow = kTileColumns + 16;

// Everything on the scale of base 2: exponent = dot * scale - shift.
struct Exponent {
  float scale;      // rounded to float32 ...
  float scale_low;  // ... and what that left over
  float shift;      // a whole number
};

// A tile of similarities: `rows` queries against `columns` keys of `width` channels, zero-padded to whole vectors.
struct Tile {
  const float* query;   // (rows, width)
  const float* key;     // (columns, width)
  const float* packed;  // the same keys, (strips, width, strip)
  const float* known;   // their dot products (rows, kMatrixRow) where somebody has computed them: packed is not read
  int64_t rows, columns, width;
  int64_t diagonal;  // the entry (i, i + diagonal) is excluded; kNoDiagonal for none
};

// How gradients of vectors are finished: to (count, channels), each at its place in the order where there is one, is
// factor (gradient - along vector).
struct Finish {
  const float *factor, *along;  // (count)
  const float* vectors;         // (count, width)
  const int64_t* order;         // null: as they stand
  int64_t channels;
  float* to;
};

struct Kernels {
  int64_t lanes;  // floats of a vector: `width` is a multiple of it
  int64_t strip;  // keys of a packed strip

  // to (count, width) = the vectors (count, channels), in that order where there is one, padded with zeros, and their
  // lengths. `to` may be `from`; where it is null the lengths alone are computed.
  void (*read)(const float* from, const int64_t* order, int64_t count, int64_t channels, int64_t width, float* to,
               float* norm);

  // vectors (count, width): each times its factor.
  void (*scale)(const float* factor, int64_t count, int64_t width, float* vectors);

  // result[i] = <one[i], other[i]>, summed in float64
  void (*paired)(const float* one, const float* other, int64_t count, int64_t width, double* result);

  void (*write)(const float* gradients, int64_t count, int64_t width, const Finish& finish);

  // packed (strips, width, strip), zeros where `columns` ends within a strip.
  void (*pack)(const float* key, int64_t columns, int64_t width, float* packed);

  // matrix (count, kMatrixRow) of the dot products of a set of at most kTileRows vectors with itself, and zeros beyond
  // its last column
  void (*products)(const float* vectors, int64_t count, int64_t width, float* matrix);

  // row_sum[i] += sum_j 2^exponent, and column_sum[j] += sum_i 2^exponent unless it is null.
  void (*sum_exponentials)(const Tile&, const Exponent&, double* row_sum, double* column_sum);

  // matrix (kTileRows, kMatrixRow) of 2^exponent (row_factor[i] + column_factor[j]); the excluded entry is 0.
  void (*weigh_exponentials)(const Tile&, const Exponent&, const float* row_factor, const float* column_factor,
                             float* matrix);

  // matrix (kTileRows, kMatrixRow) of dot products; `excluded` for the excluded entry and beyond the last column.
  void (*similarities)(const Tile&, float excluded, float* matrix);

  // The online form of sum_exponentials, from a matrix of similarities: for every row and, unless they are null, for
  // every column the shift so far (a whole number, or -infinity) and the sum of 2^(exponent) with it.
  void (*sum_online)(const Tile&, const Exponent&, const float* matrix, float* row_shift, double* row_sum,
                     float* column_shift, double* column_sum);

  // In place: matrix of similarities to 2^(exponent with row_shift[i]) row_factor[i] + the same for the columns. Rows
  // or columns may be null. No exponent may be above 1.
  void (*weigh_online)(const Tile&, const Exponent&, float* matrix, const float* row_shift, const float* row_factor,
                       const float* column_shift, const float* column_factor);

  // row_sum[i] += sum_j log(1 + 2^(exponent - fraction)), and the matrix of their derivatives
  // row_factor[i] / (1 + 2^(fraction - exponent)).
  void (*sum_softplus)(const Tile&, const Exponent&, float fraction, double* row_sum);
  void (*weigh_sigmoids)(const Tile&, const Exponent&, float fraction, const float* row_factor, float* matrix);

  // grad_query (rows, width) += matrix key;  grad_key (columns, width) += transposed matrix query.
  // Either gradient may be null.
  void (*multiply)(const Tile&, const float* matrix, float* grad_query, float* grad_key);

  // For a tile that is a whole problem, with known products. row_sum[i] = sum_j matrix_ij product_ij, and the same for
  // the columns unless column_sum is null; then matrix key or transposed matrix query, finished and written at once.
  void (*sum_products)(const Tile&, const float* matrix, double* row_sum, double* column_sum);
  void (*write_rows)(const Tile&, const float* matrix, const Finish& finish);
  void (*write_columns)(const Tile&, const float* matrix, const Finish& finish);
};

// Those for the instruction set that this processor takes.
const Kernels& kernels();

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace voxtrast
