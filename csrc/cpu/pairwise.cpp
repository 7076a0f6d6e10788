#include "pairwise.h"

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "interpolation.h"

namespace voxtrast {
namespace {

using torch::stable::parallel_for;
using torch::stable::Tensor;

constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;
// 2^-122 is a normal number, and 2^122 times any number of float32 pairs too: the shift may be half of that.
constexpr double kLargestShift = 61.0;
constexpr int64_t kPanels = 64;          // as many threads find work, in the largest problems
constexpr int64_t kSmall = int64_t(1) << 22;  // multiplications; below it a problem is not worth a second thread

int64_t round_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }
int64_t divide_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit; }

// Vectors of a panel. It depends on the sizes alone: on it depends the order of the sums.
int64_t panel_of(int64_t count, int64_t tile, bool small) {
  if (small) return round_up(count, 32);
  if (count > kPanels * tile) return round_up(divide_up(count, kPanels), tile);
  return std::min(tile, round_up(divide_up(count, kPanels / 4), 32));
}

double dot(const float* one, const float* other, int64_t width) {
  double sum = 0.0;
  for (int64_t c = 0; c < width; ++c) sum += double(one[c]) * double(other[c]);
  return sum;
}

double largest_of(const float* values, int64_t count) {
  double largest = 0.0;
  for (int64_t n = 0; values != nullptr && n < count; ++n) largest = std::max(largest, std::abs(double(values[n])));
  return largest;
}

float* matrix_of_this_thread() {
  thread_local std::vector<float> matrix(kTileRows * kMatrixRow);
  return matrix.data();
}

template <typename T>
const T* data_of(const Tensor& tensor, int64_t count, const char* name, torch::headeronly::ScalarType type) {
  STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.numel() == count, "voxtrast: ", name, " must hold ", count,
                  " numbers of the type that the operator wants");
  return tensor.const_data_ptr<T>();
}

}  // namespace

Tensor new_doubles(const Tensor& like, int64_t first, int64_t second) {
  return torch::stable::new_empty(like, {first, second}, torch::headeronly::ScalarType::Double);
}

const double* double_data(const Tensor& tensor, int64_t count, const char* name) {
  return data_of<double>(tensor, count, name, torch::headeronly::ScalarType::Double);
}

const int64_t* whole_data(const Tensor& tensor, int64_t count, const char* name) {
  return data_of<int64_t>(tensor, count, name, torch::headeronly::ScalarType::Long);
}

Pairwise::Pairwise(const Tensor& query, const Tensor& key, bool same, double scale, int64_t excluded)
    : kernels_(kernels()),
      batch_(query.size(0)),
      rows_(query.size(1)),
      columns_(key.size(1)),
      channels_(query.size(2)),
      width_(round_up(query.size(2), kernels_.lanes)),
      excluded_pair_(excluded),
      same_(same),
      small_(rows_ * columns_ <= kSmall / std::max<int64_t>(1, channels_)),
      scale_(scale),
      no_similarity_(std::copysign(std::numeric_limits<float>::infinity(), -static_cast<float>(scale))) {
  row_panel_ = panel_of(rows_, kTileRows, small_);
  column_panel_ = same ? row_panel_ : panel_of(columns_, kTileColumns, small_);
  query_ = convert(query);
  if (!same) key_ = convert(key);
  const float* keys = same ? query_.data : key_.data;
  const int64_t strips = divide_up(columns_, kernels_.strip), strip = kernels_.strip * width_;
  packed_.resize(batch_ * strips * strip);
  parallel_for(0, batch_ * strips, std::max<int64_t>(1, 65536 / strip), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t problem = item / strips, first = item % strips * kernels_.strip;
      kernels_.pack(keys + (problem * columns_ + first) * width_, std::min(kernels_.strip, columns_ - first), width_,
                    packed_.data() + item * strip);
    }
  });
  exponent_.resize(batch_);
  for (int64_t problem = 0; problem < batch_; ++problem) exponent_[problem] = exponent(problem);
}

Exponent Pairwise::exponent(int64_t problem) const {
  const double scale = scale_ * kLog2E;
  Exponent result;
  result.scale = static_cast<float>(scale);
  result.scale_low = static_cast<float>(scale - static_cast<double>(result.scale));
  const double query = query_.largest_norm[problem];
  const double bound = std::abs(scale) * query * (same_ ? query : double(key_.largest_norm[problem]));
  // One more than enough: norms and similarities are rounded. Not so for NaN, which takes the other path.
  result.shift = bound < kLargestShift - 1.0 ? static_cast<float>(std::ceil(bound * 1.0001) + 1.0) : -1.0f;
  return result;
}

Pairwise::Vectors Pairwise::convert(const Tensor& given) const {
  Vectors result;
  const int64_t count = batch_ * given.size(1), per_problem = given.size(1);
  with_element_type(given, "query and key", [&](auto element) {
    using T = decltype(element);
    const T* from = given.const_data_ptr<T>();
    if constexpr (std::is_same_v<T, float>)
      if (width_ == channels_) result.data = from;
    if (result.data == nullptr) {
      result.own.resize(count * width_);
      result.data = result.own.data();
    }
    std::vector<float> norms(count);
    parallel_for(0, count, grain(width_), [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        if (!result.own.empty()) {
          float* to = result.own.data() + item * width_;
          for (int64_t c = 0; c < channels_; ++c) to[c] = static_cast<float>(from[item * channels_ + c]);
        }
        const float* vector = result.data + item * width_;
        float lanes[4] = {}, sum = 0.0f;  // width_ is a multiple of four
        for (int64_t c = 0; c < width_; c += 4)
          for (int64_t lane = 0; lane < 4; ++lane) lanes[lane] += vector[c + lane] * vector[c + lane];
        for (const float lane : lanes) sum += lane;
        norms[item] = std::sqrt(sum);
      }
    });
    result.largest_norm.resize(batch_);
    for (int64_t item = 0; item < count; ++item) {
      float& largest = result.largest_norm[item / per_problem];
      if (!(norms[item] <= largest)) largest = norms[item] > largest ? norms[item] : NAN;  // NaN stays
    }
  });
  return result;
}

template <typename Work>
void Pairwise::each_problem(const Work& work) const {
  if (batch_ == 1 || (!small_ && batch_ < 2 * kPanels)) {
    for (int64_t problem = 0; problem < batch_; ++problem) work(problem);
    return;
  }
  const int64_t cost = std::max<int64_t>(1, rows_ * columns_ * width_);
  parallel_for(0, batch_, std::max<int64_t>(1, 262144 / cost), [&](int64_t begin, int64_t end) {
    for (int64_t problem = begin; problem < end; ++problem) work(problem);
  });
}

template <typename Work>
void Pairwise::each_tile_of(int64_t problem, int64_t row_panel, int64_t column_panel, const Work& work) const {
  const float* query = query_.data + problem * rows_ * width_;
  const float* key = same_ ? query : key_.data + problem * columns_ * width_;
  const float* packed = packed_.data() + problem * divide_up(columns_, kernels_.strip) * kernels_.strip * width_;
  const int64_t last_row = std::min(rows_, (row_panel + 1) * row_panel_);
  const int64_t last_column = std::min(columns_, (column_panel + 1) * column_panel_);
  for (int64_t column = column_panel * column_panel_; column < last_column; column += kTileColumns) {
    for (int64_t row = row_panel * row_panel_; row < last_row; row += kTileRows) {
      Tile tile;
      tile.query = query + row * width_;
      tile.key = key + column * width_;
      tile.packed = packed + column * width_;
      tile.rows = std::min(kTileRows, last_row - row);
      tile.columns = std::min(kTileColumns, last_column - column);
      tile.width = width_;
      const bool excludes = excluded_pair_ != kNoDiagonal;
      const int64_t own = row - column + (excludes ? excluded_pair_ : 0);  // the entry of the first row
      const bool passes = excludes && own < tile.columns && own + tile.rows > 0;
      tile.diagonal = passes ? own : kNoDiagonal;
      work(tile, row, column);
    }
  }
}

template <typename Work>
void Pairwise::each_tile(int64_t problem, const Work& work) const {
  const int64_t row_panels = divide_up(rows_, row_panel_), column_panels = divide_up(columns_, column_panel_);
  if (!same_) {
    const int64_t rounds = std::max(row_panels, column_panels), meetings = std::min(row_panels, column_panels);
    for (int64_t round = 0; round < rounds; ++round) {
      parallel_for(0, meetings, 1, [&](int64_t begin, int64_t end) {
        for (int64_t panel = begin; panel < end; ++panel) {
          const int64_t other = (panel + round) % rounds;  // of the side with more panels
          const bool fewer_rows = meetings == row_panels;
          each_tile_of(problem, fewer_rows ? panel : other, fewer_rows ? other : panel, work);
        }
      });
    }
    return;
  }
  parallel_for(0, row_panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) each_tile_of(problem, panel, panel, work);
  });
  // The rounds of a tournament: in each of them every panel meets one other. An odd one out rests.
  const int64_t players = row_panels + row_panels % 2;
  for (int64_t round = 0; round + 1 < players; ++round) {
    parallel_for(0, players / 2, 1, [&](int64_t begin, int64_t end) {
      for (int64_t table = begin; table < end; ++table) {
        const int64_t first = table == 0 ? players - 1 : (round + table) % (players - 1);
        const int64_t second = (round + players - 1 - table) % (players - 1);
        const int64_t low = std::min(first, second), high = std::max(first, second);
        if (high < row_panels) each_tile_of(problem, low, high, work);
      }
    });
  }
}

void Pairwise::log_sum_exponentials(double* row_lse, double* column_lse) const {
  each_problem([&](int64_t problem) {
    const Exponent& exponent = exponent_[problem];
    const bool shifted = uses_shift(problem), columns = column_lse != nullptr;
    const float lowest = -std::numeric_limits<float>::infinity();
    std::vector<double> row_sum(rows_), column_sum(columns && !same_ ? columns_ : 0);
    std::vector<float> row_shift(shifted ? 0 : rows_, lowest), column_shift(shifted ? 0 : column_sum.size(), lowest);
    each_tile(problem, [&](const Tile& tile, int64_t row, int64_t column) {
      // A set with itself: what one panel is to the other, the other is to it. Within a panel all pairs are visited.
      double* sums = mirrored(row, column) ? row_sum.data() + column : columns && !same_ ? column_sum.data() + column : nullptr;
      if (shifted) {
        kernels_.sum_exponentials(tile, exponent, row_sum.data() + row, sums);
        return;
      }
      float* shifts = sums == nullptr ? nullptr : (same_ ? row_shift : column_shift).data() + column;
      float* matrix = matrix_of_this_thread();
      kernels_.similarities(tile, no_similarity_, matrix);
      kernels_.sum_online(tile, exponent, matrix, row_shift.data() + row, row_sum.data() + row, shifts, sums);
    });
    const auto finish = [&](int64_t count, const std::vector<double>& sum, const std::vector<float>& shift, double* lse) {
      for (int64_t n = 0; n < count; ++n)
        lse[n] = sum[n] == 0.0 ? lowest : (std::log2(sum[n]) + (shifted ? exponent.shift : shift[n])) * kLn2;
    };
    finish(rows_, row_sum, row_shift, row_lse + problem * rows_);
    if (!columns) return;
    if (same_) {
      std::copy_n(row_lse + problem * rows_, rows_, column_lse + problem * rows_);
    } else {
      finish(columns_, column_sum, column_shift, column_lse + problem * columns_);
    }
  });
}

void Pairwise::paired(int64_t offset, double* similarity) const {
  const float* key = same_ ? query_.data : key_.data;
  parallel_for(0, batch_ * rows_, grain(width_), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const float* other = key + (item / rows_ * columns_ + item % rows_ + offset) * width_;
      similarity[item] = scale_ * dot(query_.data + item * width_, other, width_);
    }
  });
}

void Pairwise::mean_over(const int64_t* first, const int64_t* last, double* similarity) const {
  each_problem([&](int64_t problem) {
    const float* vectors = query_.data + problem * rows_ * width_;
    // sums[i] = the sum of the vectors before i. In float32 differences of such sums are off by percents at N = 10^6.
    std::vector<double> sums((rows_ + 1) * width_);
    for (int64_t row = 0; row < rows_; ++row)
      for (int64_t c = 0; c < width_; ++c)
        sums[(row + 1) * width_ + c] = sums[row * width_ + c] + double(vectors[row * width_ + c]);
    parallel_for(0, rows_, grain(width_), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t item = problem * rows_ + row, from = first[item], to = last[item], count = to - from - 1;
        const float* own = vectors + row * width_;
        double sum = 0.0;
        if (count == 1) {
          // The loss may be next to nothing: rounded as in the tiles, the similarity is the one in the log-sum-exp.
          const float* other = vectors + (from == row ? row + 1 : from) * width_;
          float rounded = 0.0f;
          for (int64_t c = 0; c < width_; ++c) rounded = std::fma(own[c], other[c], rounded);
          sum = rounded;
        } else {
          for (int64_t c = 0; c < width_; ++c)
            sum += (sums[to * width_ + c] - sums[from * width_ + c] - double(own[c])) * double(own[c]);
        }
        similarity[item] = count > 0 ? scale_ * sum / double(count) : 0.0;
      }
    });
  });
}

template <typename Weigh>
void Pairwise::accumulate(double factor, Tensor* grad_query, Tensor* grad_key, const Weigh& weigh) const {
  const bool keys = !same_ && grad_key != nullptr;
  std::vector<float> of_query(grad_query == nullptr ? 0 : batch_ * rows_ * width_);
  std::vector<float> of_key(keys ? batch_ * columns_ * width_ : 0);
  each_problem([&](int64_t problem) {
    float* queries = grad_query == nullptr ? nullptr : of_query.data() + problem * rows_ * width_;
    float* others = keys ? of_key.data() + problem * columns_ * width_ : nullptr;
    const auto weigh_tile = weigh(problem);
    each_tile(problem, [&](const Tile& tile, int64_t row, int64_t column) {
      float* matrix = matrix_of_this_thread();
      weigh_tile(tile, row, column, matrix);
      kernels_.multiply(tile, matrix, queries == nullptr ? nullptr : queries + row * width_,
                        mirrored(row, column) ? queries + column * width_
                        : keys                ? others + column * width_
                                              : nullptr);
    });
  });
  if (grad_query != nullptr) write(of_query, factor, *grad_query);
  if (keys) write(of_key, factor, *grad_key);
}

void Pairwise::differentiate(const SideGradient& row, const SideGradient& column, const Positives& positives,
                             Tensor* grad_query, Tensor* grad_key) const {
  const double largest = std::max({largest_of(row.gradient, batch_ * rows_), largest_of(column.gradient, batch_ * columns_),
                                   largest_of(positives.gradient, batch_ * rows_)});
  const double unit = largest > 0.0 && std::isfinite(largest) ? largest : 1.0;
  accumulate(scale_ * unit, grad_query, grad_key, [&](int64_t problem) {
    const Exponent& exponent = exponent_[problem];
    const bool shifted = uses_shift(problem);
    Factors of_rows = factors(problem, row, rows_, unit), of_columns = factors(problem, column, columns_, unit);
    if (same_) {
      // Each vector is a row in its own right and a column to all others: one symmetric matrix holds both.
      if (row.gradient == nullptr) of_rows.shift = of_columns.shift;
      for (int64_t n = 0; n < rows_; ++n) of_rows.factor[n] += of_columns.factor[n];
      of_columns = of_rows;
    }
    std::vector<float> positive = positive_factors(problem, positives, unit);
    const bool rows = same_ || row.gradient != nullptr, columns = same_ || column.gradient != nullptr;
    return [=, this, of_rows = std::move(of_rows), of_columns = std::move(of_columns), positive = std::move(positive)](
               const Tile& tile, int64_t first_row, int64_t first_column, float* matrix) {
      if (shifted) {
        kernels_.weigh_exponentials(tile, exponent, of_rows.factor.data() + first_row,
                                    of_columns.factor.data() + first_column, matrix);
      } else {
        kernels_.similarities(tile, no_similarity_, matrix);
        kernels_.weigh_online(tile, exponent, matrix, rows ? of_rows.shift.data() + first_row : nullptr,
                              of_rows.factor.data() + first_row,
                              columns ? of_columns.shift.data() + first_column : nullptr,
                              of_columns.factor.data() + first_column);
      }
      if (!positive.empty()) subtract(problem, positives, positive, tile, first_row, first_column, matrix);
    };
  });
}

// factor[n] 2^(dot * scale - shift[n]) is the gradient with respect to the similarity, in units of the largest upstream
// gradient: those are often as small as 1 / N, and may be large.
Pairwise::Factors Pairwise::factors(int64_t problem, const SideGradient& side, int64_t count, double unit) const {
  const bool shifted = uses_shift(problem);
  Factors result;
  result.shift.assign(count, shifted ? exponent_[problem].shift : 0.0f);
  result.factor.assign(count, 0.0f);
  for (int64_t n = 0; side.gradient != nullptr && n < count; ++n) {
    const double lse = side.lse[problem * count + n] * kLog2E;
    if (lse == -std::numeric_limits<double>::infinity()) continue;  // everything was excluded
    if (!shifted) result.shift[n] = static_cast<float>(std::ceil(lse));
    const double gradient = double(side.gradient[problem * count + n]) / unit;
    result.factor[n] = static_cast<float>(gradient * std::exp2(double(result.shift[n]) - lse));
  }
  return result;
}

// What each positive of a row takes off.
std::vector<float> Pairwise::positive_factors(int64_t problem, const Positives& positives, double unit) const {
  std::vector<float> result(positives.gradient == nullptr ? 0 : rows_);
  for (size_t n = 0; n < result.size(); ++n) {
    const int64_t item = problem * rows_ + static_cast<int64_t>(n);
    const int64_t count = positives.first == nullptr ? 1 : positives.last[item] - positives.first[item] - 1;
    result[n] = static_cast<float>(count > 0 ? double(positives.gradient[item]) / unit / double(count) : 0.0);
  }
  return result;
}

void Pairwise::subtract(int64_t problem, const Positives& positives, const std::vector<float>& factor, const Tile& tile,
                        int64_t first_row, int64_t first_column, float* matrix) const {
  for (int64_t n = 0; n < tile.rows; ++n) {
    float* entries = matrix + n * kMatrixRow;
    const int64_t row = first_row + n;
    if (positives.first == nullptr) {
      const int64_t own = row + positives.offset - first_column;
      if (own >= 0 && own < tile.columns) entries[own] -= factor[row];
      continue;
    }
    const int64_t item = problem * rows_ + row, self = row - first_column;
    const int64_t first = std::max<int64_t>(positives.first[item] - first_column, 0);
    const int64_t last = std::min(positives.last[item] - first_column, tile.columns);
    const float* others = factor.data() + first_column;
    for (int64_t column = first; column < last; ++column) entries[column] -= factor[row] + others[column];
    if (self >= first && self < last) entries[self] += factor[row] + others[self];
  }
}

void Pairwise::softplus_sums(double shift, double* row_sum) const {
  const auto [exponent, fraction] = threshold(shift);
  each_problem([&](int64_t problem) {
    double* sums = row_sum + problem * rows_;
    std::fill_n(sums, rows_, 0.0);
    each_tile(problem, [&, exponent = exponent, fraction = fraction](const Tile& tile, int64_t row, int64_t) {
      kernels_.sum_softplus(tile, exponent, fraction, sums + row);
    });
  });
}

void Pairwise::differentiate_softplus(double shift, const float* row, Tensor* grad_query, Tensor* grad_key) const {
  const auto [exponent, fraction] = threshold(shift);
  const double largest = largest_of(row, batch_ * rows_);
  const double unit = largest > 0.0 && std::isfinite(largest) ? largest : 1.0;
  accumulate(scale_ * unit, grad_query, grad_key, [&, exponent = exponent, fraction = fraction](int64_t problem) {
    std::vector<float> factor(rows_);
    for (int64_t n = 0; n < rows_; ++n) factor[n] = static_cast<float>(double(row[problem * rows_ + n]) / unit);
    return [=, this, factor = std::move(factor)](const Tile& tile, int64_t first_row, int64_t, float* matrix) {
      kernels_.weigh_sigmoids(tile, exponent, fraction, factor.data() + first_row, matrix);
    };
  });
}

// The shift of a softplus to base 2: a whole number, and the fraction that is left.
std::pair<Exponent, float> Pairwise::threshold(double shift) const {
  const double scale = scale_ * kLog2E, whole = std::floor(shift * kLog2E);
  Exponent result;
  result.scale = static_cast<float>(scale);
  result.scale_low = static_cast<float>(scale - static_cast<double>(result.scale));
  result.shift = static_cast<float>(whole);
  return {result, static_cast<float>(shift * kLog2E - whole)};
}

void Pairwise::write(const std::vector<float>& gradient, double factor, Tensor& target) const {
  with_element_type(target, "gradient", [&](auto element) {
    using T = decltype(element);
    T* to = target.mutable_data_ptr<T>();
    const float by = static_cast<float>(factor);
    parallel_for(0, static_cast<int64_t>(gradient.size()) / width_, grain(width_),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t item = begin; item < end; ++item)
                     for (int64_t c = 0; c < channels_; ++c)
                       to[item * channels_ + c] = static_cast<T>(by * gradient[item * width_ + c]);
                 });
  });
}

}  // namespace voxtrast
