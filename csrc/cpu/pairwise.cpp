// The sums over all pairs, tile by tile, and the matrices of their gradients.
#include "pairwise.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "interpolation.h"

namespace voxtrast {
namespace {

using torch::stable::parallel_for;
using torch::stable::Tensor;

constexpr double kLn2 = 0.6931471805599453;
constexpr int64_t kPanels = 64;  // as many threads find work, in the largest problems
constexpr int64_t kSmall = int64_t(1) << 22;  // multiplications: below it a problem is not worth a second thread

int64_t round_up(int64_t count, int64_t unit) { return divide_up(count, unit) * unit; }

// Vectors of a panel. It depends on the sizes alone: on it depends the order of the sums.
int64_t panel_of(int64_t count, int64_t tile, bool small) {
  if (small) return round_up(count, 32);
  if (count > kPanels * tile) return round_up(divide_up(count, kPanels), tile);
  return std::min(tile, round_up(divide_up(count, kPanels / 4), 32));
}

double largest_of(const float* values, int64_t count) {
  double largest = 0.0;
  for (int64_t n = 0; values != nullptr && n < count; ++n) largest = std::max(largest, std::abs(double(values[n])));
  return largest;
}

// 139 kB: stays in the second-level cache.
float* matrix_of_this_thread() {
  thread_local Buffer<float> matrix;
  return matrix.of(kTileRows * kMatrixRow);
}

}  // namespace

Pairwise::Pairwise(const Tensor& query, const Tensor& key, const PairwiseOptions& options)
    : batch(query.size(0)),
      rows(query.size(1)),
      columns(key.size(1)),
      kernels_(kernels()),
      query_(query),
      key_(key),
      options_(options),
      channels_(query.size(2)),
      width_(round_up(query.size(2), kernels_.lanes)),
      small_(rows * columns <= kSmall / std::max<int64_t>(1, query.size(2))) {
  one_tile_ = small_ && rows <= kTileRows && columns <= kTileColumns;
  row_panel_ = panel_of(rows, kTileRows, small_);
  column_panel_ = options.same ? row_panel_ : panel_of(columns, kTileColumns, small_);
}

Problem::Problem(const Pairwise& pairs) : pairs_(pairs) {
  query_.given = &pairs.query_;
  query_.count = pairs.rows;
  key_.given = &pairs.key_;
  key_.count = pairs.columns;
}

Problem::Vectors& Problem::keys() { return pairs_.options_.same ? query_ : key_; }
const Problem::Vectors& Problem::keys() const { return pairs_.options_.same ? query_ : key_; }

template <typename Work>
void Problem::each_tile_of(int64_t row_panel, int64_t column_panel, const Work& work) const {
  const int64_t width = pairs_.width_, excluded = pairs_.options_.excluded;
  const int64_t last_row = std::min(pairs_.rows, (row_panel + 1) * pairs_.row_panel_);
  const int64_t last_column = std::min(pairs_.columns, (column_panel + 1) * pairs_.column_panel_);
  const float* packed = packed_.get();
  for (int64_t column = column_panel * pairs_.column_panel_; column < last_column; column += kTileColumns) {
    for (int64_t row = row_panel * pairs_.row_panel_; row < last_row; row += kTileRows) {
      Tile tile;
      tile.query = query_.data + row * width;
      tile.key = keys().data + column * width;
      tile.packed = packed + column * width;
      tile.known = nullptr;
      tile.rows = std::min(kTileRows, last_row - row);
      tile.columns = std::min(kTileColumns, last_column - column);
      tile.width = width;
      tile.diagonal = kNoDiagonal;
      if (excluded != kNoDiagonal) {
        const int64_t own = row - column + excluded;  // the entry of the first row
        if (own < tile.columns && own + tile.rows > 0) tile.diagonal = own;
      }
      work(tile, row, column);
    }
  }
}

template <typename Work>
void Problem::each_tile(const Work& work) const {
  const int64_t row_panels = divide_up(pairs_.rows, pairs_.row_panel_);
  const int64_t column_panels = divide_up(pairs_.columns, pairs_.column_panel_);
  if (pairs_.one_tile_) {
    work(whole_, 0, 0);
    return;
  }
  if (row_panels == 1 && column_panels == 1) {
    each_tile_of(0, 0, work);
    return;
  }
  if (!pairs_.options_.same) {
    const int64_t rounds = std::max(row_panels, column_panels), meetings = std::min(row_panels, column_panels);
    for (int64_t round = 0; round < rounds; ++round) {
      parallel_for(0, meetings, 1, [&](int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; ++panel) {
          const int64_t other = (panel + round) % rounds;  // of the side with more panels
          const bool fewer_rows = meetings == row_panels;
          each_tile_of(fewer_rows ? panel : other, fewer_rows ? other : panel, work);
        }
      });
    }
    return;
  }
  parallel_for(0, row_panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) each_tile_of(panel, panel, work);
  });
  // The rounds of a tournament: in each of them every panel meets one other. An odd one out rests.
  const int64_t players = row_panels + row_panels % 2;
  for (int64_t round = 0; round + 1 < players; ++round) {
    parallel_for(0, players / 2, 1, [&](int64_t begin, int64_t end) {
      for (int64_t table = begin; table < end; ++table) {
        const int64_t first = table == 0 ? players - 1 : (round + table) % (players - 1);
        const int64_t second = (round + players - 1 - table) % (players - 1);
        const int64_t low = std::min(first, second), high = std::max(first, second);
        if (high < row_panels) each_tile_of(low, high, work);
      }
    });
  }
}

// All dot products of the one tile are kept: they are read several times.
void Problem::find_whole() {
  float* products = products_.of(round_up(pairs_.rows, 8) * kMatrixRow);  // in blocks of rows
  each_tile_of(0, 0, [&](Tile tile, int64_t, int64_t) {
    whole_ = tile;
    tile.diagonal = kNoDiagonal;
    if (pairs_.options_.same) {
      pairs_.kernels_.products(tile.key, tile.columns, tile.width, products);
    } else {
      pairs_.kernels_.similarities(tile, 0.0f, products);
    }
  });
  whole_.known = products;
}

bool Problem::mirrored(int64_t row, int64_t column) const {
  return pairs_.options_.same && row / pairs_.row_panel_ != column / pairs_.row_panel_;
}

void Problem::log_sum_exponentials(double* row_lse, double* column_lse) {
  const bool same = pairs_.options_.same, shifted = exponent_.shift >= 0.0f, columns = column_lse != nullptr;
  const float lowest = -std::numeric_limits<float>::infinity();
  const float none = std::copysign(lowest, -exponent_.scale);  // the similarity whose exponential is zero
  double* row_sum = sums_.of(pairs_.rows);
  std::fill_n(row_sum, pairs_.rows, 0.0);
  double* column_sum = columns && !same ? column_sums_.of(pairs_.columns) : nullptr;
  if (column_sum != nullptr) std::fill_n(column_sum, pairs_.columns, 0.0);
  float* row_shift = shifts_.of(pairs_.rows);
  float* column_shift = column_sum == nullptr ? row_shift : column_shifts_.of(pairs_.columns);
  if (!shifted) {
    std::fill_n(row_shift, pairs_.rows, lowest);
    if (column_sum != nullptr) std::fill_n(column_shift, pairs_.columns, lowest);
  }
  each_tile([&](const Tile& tile, int64_t row, int64_t column) {
    // A set with itself: what one panel is to the other, the other is to it. Within a panel all pairs are visited.
    double* sums = mirrored(row, column) ? row_sum + column : nullptr;
    if (column_sum != nullptr) sums = column_sum + column;
    if (shifted) {
      pairs_.kernels_.sum_exponentials(tile, exponent_, row_sum + row, sums);
      return;
    }
    float* shifts = sums == nullptr ? nullptr : column_shift + column;
    float* matrix = matrix_of_this_thread();
    pairs_.kernels_.similarities(tile, none, matrix);
    pairs_.kernels_.sum_online(tile, exponent_, matrix, row_shift + row, row_sum + row, shifts, sums);
  });
  const auto finish = [&](int64_t count, const double* sum, const float* shift, double* lse) {
    for (int64_t n = 0; n < count; ++n) {
      const int64_t own = at(n);
      lse[n] = sum[own] == 0.0 ? lowest : (std::log2(sum[own]) + (shifted ? exponent_.shift : shift[own])) * kLn2;
    }
  };
  finish(pairs_.rows, row_sum, row_shift, row_lse);
  if (columns && same) std::copy_n(row_lse, pairs_.rows, column_lse);
  if (column_sum != nullptr) finish(pairs_.columns, column_sum, column_shift, column_lse);
}

template <typename Weigh>
void Problem::accumulate(bool need_key, const Weigh& weigh) {
  const int64_t width = pairs_.width_;
  const bool same = pairs_.options_.same;
  if (pairs_.one_tile_) {  // which `write` multiplies
    weigh(whole_, 0, 0, weights_.of(pairs_.rows * kMatrixRow));
    return;
  }
  for (Vectors* vectors : {&query_, &key_}) {
    const bool wanted = vectors == &query_ || (need_key && !same);
    vectors->gradient = wanted ? vectors->gradients.of(vectors->count * width) : nullptr;
    if (wanted)
      side_by_side(vectors->count, width / 4, [&](int64_t begin, int64_t end) {
        std::fill(vectors->gradient + begin * width, vectors->gradient + end * width, 0.0f);
      });
  }
  each_tile([&](const Tile& tile, int64_t row, int64_t column) {
    float* matrix = matrix_of_this_thread();
    weigh(tile, row, column, matrix);
    float* others = mirrored(row, column) ? query_.gradient : key_.gradient;
    pairs_.kernels_.multiply(tile, matrix, query_.gradient + row * width,
                             others == nullptr ? nullptr : others + column * width);
  });
}

void Problem::differentiate(const SideGradient& row, const SideGradient& column, const Positives& positives,
                            bool need_key) {
  // Upstream gradients are often as small as 1 / N, and may be large.
  unit_ = std::max({largest_of(row.gradient, pairs_.rows), largest_of(column.gradient, pairs_.columns),
                    largest_of(positives.gradient, pairs_.rows)});
  if (!(unit_ > 0.0 && std::isfinite(unit_))) unit_ = 1.0;
  const bool same = pairs_.options_.same, shifted = exponent_.shift >= 0.0f;
  const float none = std::copysign(std::numeric_limits<float>::infinity(), -exponent_.scale);
  find_factors(row, pairs_.rows, row_factors_);
  find_factors(column, pairs_.columns, column_factors_);
  float *row_factor = row_factors_.factor.of(pairs_.rows), *column_factor = column_factors_.factor.of(pairs_.columns);
  const float *row_shift = row_factors_.shift.get(), *column_shift = column_factors_.shift.get();
  if (same) {
    // Each vector is a row in its own right and a column to all others: one symmetric matrix holds both.
    if (row.gradient == nullptr) row_shift = column_shift;
    for (int64_t n = 0; n < pairs_.rows; ++n) row_factor[n] += column_factor[n];
    column_shift = row_shift;
    column_factor = row_factor;
  }
  const float* positive = positive_factors(positives);
  const bool rows = same || row.gradient != nullptr, columns = same || column.gradient != nullptr;
  accumulate(need_key, [&](const Tile& tile, int64_t first_row, int64_t first_column, float* matrix) {
    if (shifted) {
      pairs_.kernels_.weigh_exponentials(tile, exponent_, row_factor + first_row, column_factor + first_column, matrix);
    } else {
      pairs_.kernels_.similarities(tile, none, matrix);
      pairs_.kernels_.weigh_online(tile, exponent_, matrix, rows ? row_shift + first_row : nullptr,
                                   row_factor + first_row, columns ? column_shift + first_column : nullptr,
                                   column_factor + first_column);
    }
    if (positive != nullptr) subtract(positives, positive, tile, first_row, first_column, matrix);
  });
}

// factor[n] 2^(dot * scale - shift[n]) is the gradient with respect to the similarity, in units of unit_.
void Problem::find_factors(const SideGradient& side, int64_t count, Factors& result) const {
  const bool shifted = exponent_.shift >= 0.0f;
  float *shifts = result.shift.of(count), *factors = result.factor.of(count);
  std::fill_n(shifts, count, shifted ? exponent_.shift : 0.0f);
  std::fill_n(factors, count, 0.0f);
  for (int64_t n = 0; side.gradient != nullptr && n < count; ++n) {
    const double lse = side.lse[n] * kLog2E;
    if (lse == -std::numeric_limits<double>::infinity()) continue;  // everything was excluded
    const int64_t own = at(n);
    if (!shifted) shifts[own] = static_cast<float>(std::ceil(lse));
    factors[own] = static_cast<float>(double(side.gradient[n]) / unit_ * std::exp2(double(shifts[own]) - lse));
  }
}

const float* Problem::positive_factors(const Positives& positives) {
  if (positives.gradient == nullptr) return nullptr;
  float* result = positive_.of(pairs_.rows);
  for (int64_t n = 0; n < pairs_.rows; ++n) {
    const int64_t count = positives.first == nullptr ? 1 : positives.last[n] - positives.first[n] - 1;
    result[at(n)] = static_cast<float>(count > 0 ? double(positives.gradient[n]) / unit_ / double(count) : 0.0);
  }
  return result;
}

void Problem::subtract(const Positives& positives, const float* factor, const Tile& tile, int64_t first_row,
                       int64_t first_column, float* matrix) const {
  for (int64_t n = 0; n < tile.rows; ++n) {
    const int64_t row = first_row + n;
    float* entries = matrix + (at(row) - first_row) * kMatrixRow - first_column;
    const float own = factor[at(row)];
    if (positives.first == nullptr) {
      const int64_t other = row + positives.offset;
      if (other >= first_column && other < first_column + tile.columns) entries[other] -= own;
      continue;
    }
    const int64_t first = std::max(positives.first[row], first_column);
    const int64_t last = std::min(positives.last[row], first_column + tile.columns);
    for (int64_t other = first; other < last; ++other) entries[at(other)] -= own + factor[at(other)];
    if (row >= first && row < last) entries[at(row)] += own + factor[at(row)];
  }
}

void Problem::softplus_sums(double shift, double* row_sum) {
  const auto [exponent, fraction] = threshold(shift);
  std::fill_n(row_sum, pairs_.rows, 0.0);
  each_tile([&, exponent = exponent, fraction = fraction](const Tile& tile, int64_t row, int64_t) {
    pairs_.kernels_.sum_softplus(tile, exponent, fraction, row_sum + row);
  });
}

void Problem::differentiate_softplus(double shift, const float* row, bool need_key) {
  const auto [exponent, fraction] = threshold(shift);
  unit_ = largest_of(row, pairs_.rows);
  if (!(unit_ > 0.0 && std::isfinite(unit_))) unit_ = 1.0;
  std::vector<float> factor(pairs_.rows);
  for (int64_t n = 0; n < pairs_.rows; ++n) factor[n] = static_cast<float>(double(row[n]) / unit_);
  accumulate(need_key, [&, exponent = exponent, fraction = fraction](const Tile& tile, int64_t first_row, int64_t,
                                                                     float* matrix) {
    pairs_.kernels_.weigh_sigmoids(tile, exponent, fraction, factor.data() + first_row, matrix);
  });
}

// The shift of a softplus to base 2: a whole number, and the fraction that is left.
std::pair<Exponent, float> Problem::threshold(double shift) const {
  const double whole = std::floor(shift * kLog2E);
  Exponent result = exponent_;
  result.shift = static_cast<float>(whole);
  return {result, static_cast<float>(shift * kLog2E - whole)};
}

}  // namespace voxtrast
