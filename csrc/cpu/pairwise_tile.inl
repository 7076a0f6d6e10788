// The work on one tile, written with the vector types of GCC and Clang. Included by pairwise_tile_*.cpp, which set
//   VOXTRAST_ROWS       rows of a block of similarities: ROWS x 2 vectors of sums stay in registers
//   VOXTRAST_OUT_ROWS, VOXTRAST_OUT_VECTORS    the same for the blocks of gradients
//   VOXTRAST_KERNELS    the name of what is defined at the end
// and the instruction set (target_*.h, which say what may stand here).

#include "registers.inl"
#include "powers.inl"

namespace voxtrast {
namespace {

constexpr int kVectors = 2;
constexpr int64_t kStrip = kVectors * kLanes;

}  // namespace
}  // namespace voxtrast

#include "pairwise_exponentials.inl"
#include "pairwise_vectors.inl"

namespace voxtrast {
namespace {

constexpr int kRows = VOXTRAST_ROWS;
constexpr int kOutRows = VOXTRAST_OUT_ROWS;
constexpr int kOutVectors = VOXTRAST_OUT_VECTORS;

// sum[r][v] = sum over k of left(k, r) * right(k, v); left by elements, right by whole vectors.
template <int R, int V>
VOXTRAST_INLINE void multiply_block(const float* left, int64_t left_step, int64_t left_row, const float* right,
                                    int64_t right_step, int64_t depth, Vector (&sum)[R][V]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) sum[r][v] = Vector{};
  for (int64_t k = 0; k < depth; ++k) {
    Vector columns[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) columns[v] = load(right + k * right_step + v * kLanes);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vector row = splat(left[k * left_step + r * left_row]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[r][v] = row * columns[v] + sum[r][v];
    }
  }
}

// Calls work.run<R>() for a block of R rows, R <= kRows.
template <int R, typename Work>
VOXTRAST_INLINE void with_rows(int64_t rows, const Work& work) {
  if (rows == R) {
    work.template run<R>();
  } else if constexpr (R > 1) {
    with_rows<R - 1>(rows, work);
  }
}

// The similarities of a block of R queries and a strip of keys.
template <int R>
VOXTRAST_INLINE void similarities(const Tile& tile, int64_t row, int64_t column, Vector (&dot)[R][kVectors]) {
  if (tile.known != nullptr) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) dot[r][v] = load(tile.known + (row + r) * kMatrixRow + column + v * kLanes);
    return;
  }
  multiply_block<R, kVectors>(tile.query + row * tile.width, 1, tile.width, tile.packed + column * tile.width, kStrip,
                              tile.width, dot);
}

// Whether the diagonal passes through a block.
VOXTRAST_INLINE bool on_diagonal(const Tile& tile, int64_t row, int64_t rows, int64_t column) {
  if (tile.diagonal == kNoDiagonal) return false;
  const int64_t first = row + tile.diagonal, last = first + rows - 1;
  return last >= column && first < column + kStrip;
}

template <typename Function>
struct SumBlock {
  const Tile& tile;
  const Function& function;
  int64_t row, column;
  float* row_lanes;                 // (rows, kLanes) sums so far
  Vector (&column_lanes)[kVectors];

  template <int R>
  VOXTRAST_INLINE void run() const {
    Vector e[R][kVectors];
    similarities<R>(tile, row, column, e);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) e[r][v] = function(e[r][v]);
    const int64_t columns = smaller(kStrip, tile.columns - column);
    if (columns < kStrip || on_diagonal(tile, row, R, column)) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        const Integers place = lane_numbers() + v * kLanes;
        const Integers beyond = place >= static_cast<int>(columns);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          const int own = tile.diagonal == kNoDiagonal ? -1 : static_cast<int>(row + r + tile.diagonal - column);
          e[r][v] = (beyond | (place == own)) ? Vector{} : e[r][v];
        }
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      float* lanes = row_lanes + (row + r) * kLanes;
      Vector sum = load(lanes);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        sum += e[r][v];
        column_lanes[v] += e[r][v];
      }
      store(lanes, sum);
    }
  }
};

template <typename Function>
VOXTRAST_INLINE void sum(const Tile& tile, const Function& function, double* row_sum, double* column_sum) {
  alignas(64) float row_lanes[kTileRows * kLanes];
  for (int64_t n = 0; n < tile.rows * kLanes; ++n) row_lanes[n] = 0.0f;
  for (int64_t column = 0; column < tile.columns; column += kStrip) {
    Vector column_lanes[kVectors] = {};
    for (int64_t row = 0; row < tile.rows; row += kRows)
      with_rows<kRows>(smaller(kRows, tile.rows - row),
                       SumBlock<Function>{tile, function, row, column, row_lanes, column_lanes});
    if (column_sum != nullptr)
      for (int64_t n = 0; n < smaller(kStrip, tile.columns - column); ++n)
        column_sum[column + n] += static_cast<double>(column_lanes[n / kLanes][n % kLanes]);
  }
  for (int64_t row = 0; row < tile.rows; ++row)
    row_sum[row] += static_cast<double>(total(load(row_lanes + row * kLanes)));
}

void sum_exponentials(const Tile& tile, const Exponent& exponent, double* row_sum, double* column_sum) {
  sum(tile, Exponential{exponent}, row_sum, column_sum);
}

Softplus softplus_of(const Exponent& exponent, float fraction) {
  const double up = __builtin_exp2(fraction), down = 1.0 / up;
  const float high = static_cast<float>(up), low = static_cast<float>(down);
  return {exponent, fraction, high, static_cast<float>(up - high), low, static_cast<float>(down - low)};
}

void sum_softplus(const Tile& tile, const Exponent& exponent, float fraction, double* row_sum) {
  sum(tile, softplus_of(exponent, fraction), row_sum, nullptr);
}

template <typename Function>
struct WeighBlock {
  const Tile& tile;
  const Function& function;
  int64_t row, column;
  const float* row_factor;
  const Vector (&column_factor)[kVectors];
  float* matrix;

  template <int R>
  VOXTRAST_INLINE void run() const {
    Vector e[R][kVectors];
    similarities<R>(tile, row, column, e);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        store(matrix + (row + r) * kMatrixRow + column + v * kLanes,
              function(e[r][v]) * (column_factor[v] + row_factor[row + r]));
  }
};

void fill_diagonal(const Tile& tile, float* matrix, float value) {
  if (tile.diagonal == kNoDiagonal) return;
  for (int64_t row = 0; row < tile.rows; ++row) {
    const int64_t own = row + tile.diagonal;
    if (own >= 0 && own < tile.columns) matrix[row * kMatrixRow + own] = value;
  }
}

template <typename Function>
VOXTRAST_INLINE void weigh(const Tile& tile, const Function& function, const float* row_factor,
                           const float* column_factor, float* matrix) {
  for (int64_t column = 0; column < tile.columns; column += kStrip) {
    float padded[kStrip] = {};
    for (int64_t n = 0; column_factor != nullptr && n < smaller(kStrip, tile.columns - column); ++n)
      padded[n] = column_factor[column + n];
    Vector factor[kVectors];
    for (int v = 0; v < kVectors; ++v) factor[v] = load(padded + v * kLanes);
    for (int64_t row = 0; row < tile.rows; row += kRows)
      with_rows<kRows>(smaller(kRows, tile.rows - row),
                       WeighBlock<Function>{tile, function, row, column, row_factor, factor, matrix});
  }
  fill_diagonal(tile, matrix, 0.0f);
}

void weigh_exponentials(const Tile& tile, const Exponent& exponent, const float* row_factor,
                        const float* column_factor, float* matrix) {
  weigh(tile, Exponential{exponent}, row_factor, column_factor, matrix);
}

void weigh_sigmoids(const Tile& tile, const Exponent& exponent, float fraction, const float* row_factor,
                    float* matrix) {
  weigh(tile, Sigmoid{softplus_of(exponent, fraction)}, row_factor, nullptr, matrix);
}

struct SimilarityBlock {
  const Tile& tile;
  int64_t row, column;
  float* matrix;

  template <int R>
  VOXTRAST_INLINE void run() const {
    Vector dot[R][kVectors];
    similarities<R>(tile, row, column, dot);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) store(matrix + (row + r) * kMatrixRow + column + v * kLanes, dot[r][v]);
  }
};

void similarities(const Tile& tile, float excluded, float* matrix) {
  for (int64_t column = 0; column < tile.columns; column += kStrip)
    for (int64_t row = 0; row < tile.rows; row += kRows)
      with_rows<kRows>(smaller(kRows, tile.rows - row), SimilarityBlock{tile, row, column, matrix});
  fill_diagonal(tile, matrix, excluded);
  // What lies beyond the last column takes part in no sum.
  for (int64_t row = 0; row < tile.rows; ++row)
    for (int64_t column = tile.columns; column % kStrip != 0; ++column) matrix[row * kMatrixRow + column] = excluded;
}

// The larger one; NaN where one of them is.
VOXTRAST_INLINE Vector larger(Vector one, Vector other) { return (one < other) | (other != other) ? other : one; }

void sum_online(const Tile& tile, const Exponent& exponent, const float* matrix, float* row_shift, double* row_sum,
                float* column_shift, double* column_sum) {
  const float lowest = -__builtin_inff();
  const int64_t padded = (tile.columns + kLanes - 1) / kLanes * kLanes;
  for (int64_t row = 0; row < tile.rows; ++row) {
    const float* entries = matrix + row * kMatrixRow;
    Vector most = splat(lowest);
    for (int64_t column = 0; column < padded; column += kLanes)
      most = larger(most, load(entries + column) * exponent.scale);
    float shift = row_shift[row];
    for (int lane = 0; lane < kLanes; ++lane)
      if (shift == shift && !(most[lane] <= shift)) shift = __builtin_ceilf(most[lane]);
    if (shift == lowest) continue;  // nothing but excluded entries so far
    Vector sum = {};
    for (int64_t column = 0; column < padded; column += kLanes)
      sum += exponential_or_zero(load(entries + column), exponent, splat(shift));
    row_sum[row] = row_sum[row] * __builtin_exp2(static_cast<double>(row_shift[row]) - shift) + total(sum);
    row_shift[row] = shift;
  }
  if (column_sum == nullptr) return;
  for (int64_t column = 0; column < tile.columns; column += kLanes) {
    const int64_t columns = smaller(kLanes, tile.columns - column);
    Vector most = splat(lowest);
    for (int64_t row = 0; row < tile.rows; ++row)
      most = larger(most, load(matrix + row * kMatrixRow + column) * exponent.scale);
    Vector shift = {};
    for (int64_t n = 0; n < columns; ++n) {
      const float before = column_shift[column + n];
      const float after = before == before && !(most[n] <= before) ? __builtin_ceilf(most[n]) : before;
      column_sum[column + n] *= after == before ? 1.0 : __builtin_exp2(static_cast<double>(before) - after);
      column_shift[column + n] = after;
      shift[n] = after == lowest ? 0.0f : after;
    }
    Vector sum = {};
    for (int64_t row = 0; row < tile.rows; ++row)
      sum += exponential_or_zero(load(matrix + row * kMatrixRow + column), exponent, shift);
    for (int64_t n = 0; n < columns; ++n) column_sum[column + n] += static_cast<double>(sum[n]);
  }
}

void weigh_online(const Tile& tile, const Exponent& exponent, float* matrix, const float* row_shift,
                  const float* row_factor, const float* column_shift, const float* column_factor) {
  for (int64_t column = 0; column < tile.columns; column += kLanes) {
    const int64_t columns = smaller(kLanes, tile.columns - column);
    Vector shift = {}, factor = {};
    for (int64_t n = 0; column_shift != nullptr && n < columns; ++n) {
      shift[n] = column_shift[column + n];
      factor[n] = column_factor[column + n];
    }
    for (int64_t row = 0; row < tile.rows; ++row) {
      float* entries = matrix + row * kMatrixRow + column;
      const Vector dot = load(entries);
      Vector weight = {};
      if (row_shift != nullptr) weight += exponential_or_zero(dot, exponent, splat(row_shift[row])) * row_factor[row];
      if (column_shift != nullptr) weight += exponential_or_zero(dot, exponent, shift) * factor;
      store(entries, weight);
    }
  }
}

// What becomes of the products of a matrix and vectors: added to gradients (rows, width), or finished.
struct Add {
  float* gradients;
  VOXTRAST_INLINE void operator()(int64_t row, int64_t channel, int64_t width, Vector sum) const {
    float* to = gradients + row * width + channel;
    store(to, load(to) + sum);
  }
  VOXTRAST_INLINE void prepare(int64_t row, int64_t channel) const {}
};

struct Write {
  const Finish finish;  // a copy, which stays in registers: what is written could be anything
  VOXTRAST_INLINE void operator()(int64_t row, int64_t channel, int64_t width, Vector sum) const {
    finish_part(finish, row, channel, width, sum);
  }
  // What is written later comes into the cache while the products are computed.
  VOXTRAST_INLINE void prepare(int64_t row, int64_t channel) const {
    const int64_t place = finish.order == nullptr ? row : finish.order[row];
    __builtin_prefetch(finish.to + place * finish.channels + channel, 1, 3);
  }
};

// left, by elements, times right (depth, width)
template <typename Output>
struct Product {
  const float* left;
  int64_t left_step, left_row;
  const float* right;
  int64_t depth, width, rows;
  const Output output;
};

// The product of a block of R rows and V vectors.
template <int V, typename Output>
struct ProductBlock {
  const Product<Output>& of;
  int64_t row, channel;

  template <int R>
  VOXTRAST_INLINE void run() const {
    Vector sum[R][V];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) of.output.prepare(row + r, channel + v * kLanes);
    multiply_block<R, V>(of.left + row * of.left_row, of.left_step, of.left_row, of.right + channel, of.width, of.depth,
                         sum);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) of.output(row + r, channel + v * kLanes, of.width, sum[r][v]);
  }
};

template <typename Output>
void compute(const Product<Output> product) {
  for (int64_t row = 0; row < product.rows; row += kOutRows) {
    const int64_t rows = smaller(kOutRows, product.rows - row);
    int64_t channel = 0;
    for (; channel + kOutVectors * kLanes <= product.width; channel += kOutVectors * kLanes)
      with_rows<kOutRows>(rows, ProductBlock<kOutVectors, Output>{product, row, channel});
    for (; channel < product.width; channel += kLanes)
      with_rows<kOutRows>(rows, ProductBlock<1, Output>{product, row, channel});
  }
}

template <typename Output>
void multiply_rows(const Tile& tile, const float* matrix, const Output& output) {
  compute(Product<Output>{matrix, 1, kMatrixRow, tile.key, tile.columns, tile.width, tile.rows, output});
}

template <typename Output>
void multiply_columns(const Tile& tile, const float* matrix, const Output& output) {
  compute(Product<Output>{matrix, kMatrixRow, 1, tile.query, tile.rows, tile.width, tile.columns, output});
}

void multiply(const Tile& tile, const float* matrix, float* grad_query, float* grad_key) {
  if (grad_query != nullptr) multiply_rows(tile, matrix, Add{grad_query});
  if (grad_key != nullptr) multiply_columns(tile, matrix, Add{grad_key});
}

void sum_products(const Tile& tile, const float* matrix, double* row_sum, double* column_sum) {
  constexpr int kHalf = kLanes / 2;
  const int64_t parts = (tile.columns + kHalf - 1) / kHalf;
  Doubles columns[kTileColumns / kHalf] = {};
  for (int64_t row = 0; row < tile.rows; ++row) {
    Doubles sum = {};
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t entry = row * kMatrixRow + part * kHalf;
      const Doubles products = load_doubles(matrix + entry) * load_doubles(tile.known + entry);
      sum += products;
      if (column_sum != nullptr) columns[part] += products;
    }
    row_sum[row] = total(sum);
  }
  for (int64_t column = 0; column_sum != nullptr && column < tile.columns; ++column)
    column_sum[column] = columns[column / kHalf][column % kHalf];
}

void write_rows(const Tile& tile, const float* matrix, const Finish& finish) {
  multiply_rows(tile, matrix, Write{finish});
}

void write_columns(const Tile& tile, const float* matrix, const Finish& finish) {
  multiply_columns(tile, matrix, Write{finish});
}

}  // namespace

const Kernels VOXTRAST_KERNELS = {
    kLanes,        kStrip,
    read,          scale,            paired,             write,        pack,
    products,      sum_exponentials, weigh_exponentials, similarities, sum_online,
    weigh_online,  sum_softplus,     weigh_sigmoids,     multiply,     sum_products,
    write_rows,    write_columns};

}  // namespace voxtrast
