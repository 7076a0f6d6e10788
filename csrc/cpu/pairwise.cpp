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
constexpr int64_t kPanels = 64;  // as many threads find work, in the largest problems
constexpr float kMinimumNorm = 1e-6f;    // the same number stands in kernels/info_nce.py
constexpr int64_t kSmall = int64_t(1) << 22;  // multiplications: below it a problem is not worth a second thread

int64_t round_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; }
int64_t divide_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit; }

// Vectors of a panel. It depends on the sizes alone: on it depends the order of the sums.
int64_t panel_of(int64_t count, int64_t tile, bool small) {
  if (small) return round_up(count, 32);
  if (count > kPanels * tile) return round_up(divide_up(count, kPanels), tile);
  return std::min(tile, round_up(divide_up(count, kPanels / 4), 32));
}

double dot(const float* one, const float* other, int64_t width) {
  double lanes[4] = {};  // width is a multiple of four
  for (int64_t c = 0; c < width; c += 4)
    for (int64_t lane = 0; lane < 4; ++lane) lanes[lane] += double(one[c + lane]) * double(other[c + lane]);
  return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
}

bool is_finite(const float* values, int64_t count) {
  bool finite = true;
  for (int64_t n = 0; n < count; ++n) finite &= std::isfinite(values[n]);
  return finite;
}

double largest_of(const float* values, int64_t count) {
  double largest = 0.0;
  for (int64_t n = 0; values != nullptr && n < count; ++n) largest = std::max(largest, std::abs(double(values[n])));
  return largest;
}

// Half of the second-level cache of most processors.
float* matrix_of_this_thread() {
  thread_local Buffer<float> matrix;
  return matrix.of(kTileRows * kMatrixRow);
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

Tensor sum_to_scalar(const std::vector<double>& numbers, const Tensor& like) {
  double sum = 0.0;
  for (const double number : numbers) sum += number;
  Tensor result = torch::stable::new_empty(like, {1});
  *result.mutable_data_ptr<float>() = static_cast<float>(sum);
  return result;
}

const double* double_data(const Tensor& tensor, int64_t count, const char* name) {
  return data_of<double>(tensor, count, name, torch::headeronly::ScalarType::Double);
}

const int64_t* whole_data(const Tensor& tensor, int64_t count, const char* name) {
  return data_of<int64_t>(tensor, count, name, torch::headeronly::ScalarType::Long);
}

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

void Problem::load(int64_t problem) {
  index = problem;
  convert(query_);
  if (!pairs_.options_.same) convert(key_);
  const int64_t columns = pairs_.columns, width = pairs_.width_, strip = pairs_.kernels_.strip;
  const int64_t strips = divide_up(columns, strip);
  float* packed = packed_.of(strips * strip * width);
  const float* key = keys().data;
  parallel_for(0, strips, 1 + 65536 / (strip * width), [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * strip; first < std::min(columns, end * strip); first += strip)
      pairs_.kernels_.pack(key + first * width, std::min(strip, columns - first), width, packed + first * width);
  });
  exponent_ = exponent(query_.largest_norm * keys().largest_norm);
}

void Problem::convert(Vectors& vectors) const {
  const int64_t count = vectors.count, channels = pairs_.channels_, width = pairs_.width_;
  const PairwiseOptions& options = pairs_.options_;
  const int64_t* order = options.order == nullptr ? nullptr : options.order + index % options.orders * count;
  float* norms = vectors.inverse_norms.of(count);
  with_element_type(*vectors.given, "query and key", [&](auto element) {
    using T = decltype(element);
    const T* from = vectors.given->const_data_ptr<T>() + index * count * channels;
    float* own = nullptr;
    vectors.data = nullptr;
    if constexpr (std::is_same_v<T, float>)
      if (width == channels && !options.normalize && order == nullptr) vectors.data = from;
    if (vectors.data == nullptr) vectors.data = own = vectors.memory.of(count * width);
    parallel_for(0, count, grain(width), [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const T* source = from + (order == nullptr ? item : order[item]) * channels;
        float* target = own + item * width;
        if (own != nullptr) {
          for (int64_t c = 0; c < channels; ++c) target[c] = static_cast<float>(source[c]);
          for (int64_t c = channels; c < width; ++c) target[c] = 0.0f;
        }
        const float* vector = vectors.data + item * width;
        float lanes[4] = {}, sum = 0.0f;  // width is a multiple of four
        for (int64_t c = 0; c < width; c += 4)
          for (int64_t lane = 0; lane < 4; ++lane) lanes[lane] += vector[c + lane] * vector[c + lane];
        for (const float lane : lanes) sum += lane;
        norms[item] = std::sqrt(sum);
        if (!options.normalize) continue;
        // Asked this way round, NaN counts as a direction and shows in the sums.
        const float inverse = norms[item] < kMinimumNorm ? 0.0f : 1.0f / norms[item];
        for (int64_t c = 0; c < width; ++c) target[c] *= inverse;
        norms[item] = inverse;
      }
    });
  });
  vectors.largest_norm = 0.0;
  for (int64_t item = 0; item < count; ++item) {
    // Unit vectors are all alike; of what is NaN, or was divided by an infinity, nothing is known.
    const double norm = !options.normalize ? norms[item] : norms[item] > 0.0f ? 1.0 : norms[item] == 0.0f ? 0.0 : NAN;
    const bool infinite = options.normalize && norms[item] == 0.0f && !is_finite(vectors.data + item * width, width);
    if (infinite) vectors.largest_norm = NAN;
    if (!(norm <= vectors.largest_norm)) vectors.largest_norm = norm > vectors.largest_norm ? norm : NAN;
  }
}

Exponent Problem::exponent(double largest_norms) const {
  const double scale = pairs_.options_.scale * kLog2E;
  Exponent result;
  result.scale = static_cast<float>(scale);
  result.scale_low = static_cast<float>(scale - static_cast<double>(result.scale));
  const double bound = std::abs(scale) * largest_norms;
  // One more than enough: norms and similarities are rounded. Not so for NaN, which takes the other path.
  result.shift = bound < kLargestShift - 1.0 ? static_cast<float>(std::ceil(bound * 1.0001) + 1.0) : -1.0f;
  return result;
}

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

bool Problem::mirrored(int64_t row, int64_t column) const {
  return pairs_.options_.same && row / pairs_.row_panel_ != column / pairs_.row_panel_;
}

void Problem::log_sum_exponentials(double* row_lse, double* column_lse) {
  const bool same = pairs_.options_.same, shifted = exponent_.shift >= 0.0f, columns = column_lse != nullptr;
  const float lowest = -std::numeric_limits<float>::infinity();
  const float none = std::copysign(lowest, -exponent_.scale);  // the similarity whose exponential is zero
  std::vector<double> row_sum(pairs_.rows), column_sum(columns && !same ? pairs_.columns : 0);
  std::vector<float> row_shift(shifted ? 0 : row_sum.size(), lowest);
  std::vector<float> column_shift(shifted ? 0 : column_sum.size(), lowest);
  each_tile([&](const Tile& tile, int64_t row, int64_t column) {
    // A set with itself: what one panel is to the other, the other is to it. Within a panel all pairs are visited.
    double* sums = mirrored(row, column) ? row_sum.data() + column : nullptr;
    if (columns && !same) sums = column_sum.data() + column;
    if (shifted) {
      pairs_.kernels_.sum_exponentials(tile, exponent_, row_sum.data() + row, sums);
      return;
    }
    float* shifts = sums == nullptr ? nullptr : (same ? row_shift : column_shift).data() + column;
    float* matrix = matrix_of_this_thread();
    pairs_.kernels_.similarities(tile, none, matrix);
    pairs_.kernels_.sum_online(tile, exponent_, matrix, row_shift.data() + row, row_sum.data() + row, shifts, sums);
  });
  const auto finish = [&](const std::vector<double>& sum, const std::vector<float>& shift, double* lse) {
    for (size_t n = 0; n < sum.size(); ++n)
      lse[n] = sum[n] == 0.0 ? lowest : (std::log2(sum[n]) + (shifted ? exponent_.shift : shift[n])) * kLn2;
  };
  finish(row_sum, row_shift, row_lse);
  if (columns && same) std::copy_n(row_lse, pairs_.rows, column_lse);
  if (columns && !same) finish(column_sum, column_shift, column_lse);
}

void Problem::paired(int64_t offset, double* similarity) const {
  const int64_t width = pairs_.width_;
  const float* key = keys().data + offset * width;
  parallel_for(0, pairs_.rows, grain(width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      similarity[row] = pairs_.options_.scale * dot(query_.data + row * width, key + row * width, width);
  });
}

void Problem::mean_over(const int64_t* first, const int64_t* last, double* similarity) {
  const int64_t rows = pairs_.rows, width = pairs_.width_;
  const float* vectors = query_.data;
  // sums[i] = the sum of the vectors before i. In float32 differences of such sums are off by percents at N = 10^6.
  std::vector<double> sums((rows + 1) * width);
  for (int64_t item = 0; item < rows * width; ++item) sums[item + width] = sums[item] + double(vectors[item]);
  parallel_for(0, rows, grain(width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t from = first[row], to = last[row], count = to - from - 1;
      const float* own = vectors + row * width;
      double sum = 0.0;
      if (count == 1) {
        // The loss may be next to nothing: rounded as in the tiles, the similarity is the one in the log-sum-exp.
        const float* other = vectors + (from == row ? row + 1 : from) * width;
        float rounded = 0.0f;
        for (int64_t c = 0; c < width; ++c) rounded = std::fma(own[c], other[c], rounded);
        sum = rounded;
      } else if (count > 1) {
        for (int64_t c = 0; c < width; ++c)
          sum += (sums[to * width + c] - sums[from * width + c] - double(own[c])) * double(own[c]);
      }
      similarity[row] = count > 0 ? pairs_.options_.scale * sum / double(count) : 0.0;
    }
  });
}

template <typename Weigh>
void Problem::accumulate(bool need_key, const Weigh& weigh) {
  const int64_t width = pairs_.width_;
  const bool same = pairs_.options_.same;
  for (Vectors* vectors : {&query_, &key_}) {
    const bool wanted = vectors == &query_ || (need_key && !same);
    vectors->gradient = wanted ? vectors->gradients.of(vectors->count * width) : nullptr;
    if (wanted)
      parallel_for(0, vectors->count, grain(width / 4), [&](int64_t begin, int64_t end) {
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
  Factors of_rows = factors(row, pairs_.rows), of_columns = factors(column, pairs_.columns);
  if (same) {
    // Each vector is a row in its own right and a column to all others: one symmetric matrix holds both.
    if (row.gradient == nullptr) of_rows.shift = of_columns.shift;
    for (int64_t n = 0; n < pairs_.rows; ++n) of_rows.factor[n] += of_columns.factor[n];
    of_columns = of_rows;
  }
  const std::vector<float> positive = positive_factors(positives);
  const bool rows = same || row.gradient != nullptr, columns = same || column.gradient != nullptr;
  accumulate(need_key, [&](const Tile& tile, int64_t first_row, int64_t first_column, float* matrix) {
    const float* row_factor = of_rows.factor.data() + first_row;
    const float* column_factor = of_columns.factor.data() + first_column;
    if (shifted) {
      pairs_.kernels_.weigh_exponentials(tile, exponent_, row_factor, column_factor, matrix);
    } else {
      pairs_.kernels_.similarities(tile, none, matrix);
      pairs_.kernels_.weigh_online(tile, exponent_, matrix, rows ? of_rows.shift.data() + first_row : nullptr,
                                   row_factor, columns ? of_columns.shift.data() + first_column : nullptr,
                                   column_factor);
    }
    if (!positive.empty()) subtract(positives, positive, tile, first_row, first_column, matrix);
  });
}

// factor[n] 2^(dot * scale - shift[n]) is the gradient with respect to the similarity, in units of unit_.
Problem::Factors Problem::factors(const SideGradient& side, int64_t count) const {
  const bool shifted = exponent_.shift >= 0.0f;
  Factors result;
  result.shift.assign(count, shifted ? exponent_.shift : 0.0f);
  result.factor.assign(count, 0.0f);
  for (int64_t n = 0; side.gradient != nullptr && n < count; ++n) {
    const double lse = side.lse[n] * kLog2E;
    if (lse == -std::numeric_limits<double>::infinity()) continue;  // everything was excluded
    if (!shifted) result.shift[n] = static_cast<float>(std::ceil(lse));
    const double gradient = double(side.gradient[n]) / unit_;
    result.factor[n] = static_cast<float>(gradient * std::exp2(double(result.shift[n]) - lse));
  }
  return result;
}

// What each positive of a row takes off.
std::vector<float> Problem::positive_factors(const Positives& positives) const {
  std::vector<float> result(positives.gradient == nullptr ? 0 : pairs_.rows);
  for (size_t n = 0; n < result.size(); ++n) {
    const int64_t count = positives.first == nullptr ? 1 : positives.last[n] - positives.first[n] - 1;
    result[n] = static_cast<float>(count > 0 ? double(positives.gradient[n]) / unit_ / double(count) : 0.0);
  }
  return result;
}

void Problem::subtract(const Positives& positives, const std::vector<float>& factor, const Tile& tile,
                       int64_t first_row, int64_t first_column, float* matrix) const {
  for (int64_t n = 0; n < tile.rows; ++n) {
    float* entries = matrix + n * kMatrixRow;
    const int64_t row = first_row + n;
    if (positives.first == nullptr) {
      const int64_t own = row + positives.offset - first_column;
      if (own >= 0 && own < tile.columns) entries[own] -= factor[row];
      continue;
    }
    const int64_t self = row - first_column;
    const int64_t first = std::max<int64_t>(positives.first[row] - first_column, 0);
    const int64_t last = std::min(positives.last[row] - first_column, tile.columns);
    const float* others = factor.data() + first_column;
    for (int64_t column = first; column < last; ++column) entries[column] -= factor[row] + others[column];
    if (self >= first && self < last) entries[self] += factor[row] + others[self];
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

double Problem::write(Tensor& grad_query, Tensor* grad_key) const {
  // Every pair once more, without touching one: sum_i <q_i, d / d q_i> is scale times the gradient of the scale. Where
  // a set meets itself, its gradient holds every pair twice.
  const double paired = write(query_, grad_query);
  if (grad_key != nullptr) write(key_, *grad_key);
  return unit_ * paired / (pairs_.options_.same ? 2.0 : 1.0);
}

double Problem::write(const Vectors& vectors, Tensor& target) const {
  const int64_t count = vectors.count, channels = pairs_.channels_, width = pairs_.width_;
  const PairwiseOptions& options = pairs_.options_;
  const int64_t* order = options.order == nullptr ? nullptr : options.order + index % options.orders * count;
  const float* inverse_norms = vectors.inverse_norms.get();
  const float factor = static_cast<float>(options.scale * unit_);
  std::vector<double> products(count);
  with_element_type(target, "gradient", [&](auto element) {
    using T = decltype(element);
    T* to = target.mutable_data_ptr<T>() + index * count * channels;
    parallel_for(0, count, grain(width), [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const float* gradient = vectors.gradient + item * width;
        const float* vector = vectors.data + item * width;
        T* result = to + (order == nullptr ? item : order[item]) * channels;
        products[item] = dot(vector, gradient, width);
        // Of a normalised vector only what is across it counts.
        const float along = options.normalize ? static_cast<float>(products[item]) : 0.0f;
        const float by = options.normalize ? factor * inverse_norms[item] : factor;
        for (int64_t c = 0; c < channels; ++c) result[c] = static_cast<T>(by * (gradient[c] - along * vector[c]));
      }
    });
  });
  double sum = 0.0;
  for (const double product : products) sum += product;
  return sum;
}

}  // namespace voxtrast
