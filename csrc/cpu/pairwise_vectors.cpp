// The vectors of a problem on their way in and out: converted, ordered, normalised and packed; gradients written back.
#include <algorithm>
#include <cmath>

#include "interpolation.h"
#include "pairwise.h"

namespace voxtrast {
namespace {

using torch::stable::parallel_for;
using torch::stable::Tensor;

// 2^-122 is a normal number, and 2^122 times any number of float32 pairs too: the shift may be half of that.
constexpr double kLargestShift = 61.0;
constexpr float kMinimumNorm = 1e-6f;  // the same number stands in kernels/pairwise_logsumexp.py

template <typename T>
const T* data_of(const Tensor& tensor, int64_t count, const char* name, torch::headeronly::ScalarType type) {
  STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.numel() == count, "voxtrast: ", name, " must hold ", count,
                  " numbers of the type that the operator wants");
  return tensor.const_data_ptr<T>();
}

}  // namespace

Tensor new_gradient(const Tensor& vectors) {
  Tensor result = torch::stable::new_empty(vectors, vectors.sizes());
  with_element_type(result, "gradient", [&](auto element) {
    prefer_large_pages(result.mutable_data_ptr<decltype(element)>(), result.numel() * int64_t(sizeof(element)));
  });
  return result;
}

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

void Problem::load(int64_t problem) {
  index = problem;
  places_ = pairs_.one_tile_ ? order() : nullptr;
  convert(query_);
  if (!pairs_.options_.same) convert(key_);
  exponent_ = exponent(query_.largest_norm * keys().largest_norm);
  if (!pairs_.one_tile_ || !pairs_.options_.same) pack();
  if (pairs_.one_tile_) find_whole();
}

void Problem::pack() {
  const int64_t columns = pairs_.columns, width = pairs_.width_, strip = pairs_.kernels_.strip;
  const int64_t strips = divide_up(columns, strip);
  const float* key = keys().data;
  float* packed = packed_.of(strips * strip * width);
  side_by_side(strips, strip * width / 4, [&](int64_t begin, int64_t end) {
    pairs_.kernels_.pack(key + begin * strip * width, std::min(columns, end * strip) - begin * strip, width,
                         packed + begin * strip * width);
  });
}

const int64_t* Problem::order() const {
  const PairwiseOptions& options = pairs_.options_;
  return options.order == nullptr ? nullptr : options.order + index % options.orders * pairs_.rows;
}

void Problem::convert(Vectors& vectors) const {
  const int64_t count = vectors.count, channels = pairs_.channels_, width = pairs_.width_;
  const bool normalize = pairs_.options_.normalize;
  const int64_t* order = pairs_.one_tile_ ? nullptr : this->order();
  float* norms = vectors.inverse_norms.of(count);
  with_element_type(*vectors.given, "query and key", [&](auto element) {
    using T = decltype(element);
    constexpr bool floats = std::is_same_v<T, float>;
    const T* from = vectors.given->const_data_ptr<T>() + index * count * channels;
    float* own = nullptr;
    vectors.data = nullptr;
    if constexpr (floats)
      if (width == channels && !normalize && order == nullptr) vectors.data = from;
    if (vectors.data == nullptr) vectors.data = own = vectors.memory.of(count * width);
    side_by_side(count, width, [&](int64_t begin, int64_t end) {
      float* target = own == nullptr ? nullptr : own + begin * width;
      if constexpr (floats) {
        const float* source = order == nullptr ? from + begin * channels : from;
        pairs_.kernels_.read(source, order == nullptr ? nullptr : order + begin, end - begin, channels, width, target,
                             norms + begin);
      } else {
        for (int64_t item = begin; item < end; ++item) {
          const T* source = from + (order == nullptr ? item : order[item]) * channels;
          for (int64_t c = 0; c < channels; ++c) own[item * width + c] = static_cast<float>(source[c]);
          std::fill(own + item * width + channels, own + (item + 1) * width, 0.0f);
        }
        pairs_.kernels_.read(target, nullptr, end - begin, width, width, nullptr, norms + begin);
      }
      if (!normalize) return;
      for (int64_t item = begin; item < end; ++item) {
        // Asked this way round, NaN counts as a direction and shows in the sums; an infinite norm hides it.
        norms[item] = norms[item] < kMinimumNorm ? 0.0f : std::isinf(norms[item]) ? NAN : 1.0f / norms[item];
      }
      pairs_.kernels_.scale(norms + begin, end - begin, width, target);
    });
  });
  vectors.largest_norm = 0.0;
  for (int64_t item = 0; item < count; ++item) {
    const bool directed = norms[item] != 0.0f;  // for normalised vectors, whose norms are 0, 1 or NaN
    const double norm = !normalize || std::isnan(norms[item]) ? norms[item] : directed ? 1.0 : 0.0;
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

void Problem::paired(int64_t offset, double* similarity) const {
  const int64_t width = pairs_.width_;
  const float* key = keys().data + offset * width;
  side_by_side(pairs_.rows, width, [&](int64_t begin, int64_t end) {
    pairs_.kernels_.paired(query_.data + begin * width, key + begin * width, end - begin, width, similarity + begin);
    for (int64_t row = begin; row < end; ++row) similarity[row] *= pairs_.options_.scale;
  });
}

void Problem::mean_over(const int64_t* first, const int64_t* last, double* similarity) {
  const int64_t rows = pairs_.rows, width = pairs_.width_;
  if (pairs_.one_tile_) {
    for (int64_t row = 0; row < rows; ++row) {
      const float* own = whole_.known + at(row) * kMatrixRow;
      const int64_t count = last[row] - first[row] - 1;
      double sum = 0.0;
      for (int64_t other = first[row]; other < last[row]; ++other) sum += other == row ? 0.0 : double(own[at(other)]);
      similarity[row] = count > 0 ? pairs_.options_.scale * sum / double(count) : 0.0;
    }
    return;
  }
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

double Problem::write(Tensor& grad_query, Tensor* grad_key) {
  // Every pair once more, without touching one: sum_i <q_i, d / d q_i> is scale times the gradient of the scale. Where
  // a set meets itself, its gradient holds every pair twice.
  if (pairs_.one_tile_)
    pairs_.kernels_.sum_products(whole_, weights_.get(), query_.paired.of(pairs_.rows),
                                 grad_key == nullptr ? nullptr : key_.paired.of(pairs_.columns));
  const double paired = write(query_, grad_query);
  if (grad_key != nullptr) write(key_, *grad_key);
  return unit_ * paired / (pairs_.options_.same ? 2.0 : 1.0);
}

double Problem::write(Vectors& vectors, Tensor& target) {
  const int64_t count = vectors.count, channels = pairs_.channels_, width = pairs_.width_;
  const bool normalize = pairs_.options_.normalize;
  const int64_t* order = pairs_.one_tile_ ? nullptr : this->order();
  const float* inverse_norms = vectors.inverse_norms.get();
  const float factor = static_cast<float>(pairs_.options_.scale * unit_);
  double* paired = vectors.paired.of(count);
  float *along = along_.of(count), *by = by_.of(count), *gradients = vectors.gradients.of(count * width);
  with_element_type(target, "gradient", [&](auto element) {
    using T = decltype(element);
    constexpr bool floats = std::is_same_v<T, float>;
    T* to = target.mutable_data_ptr<T>() + index * count * channels;
    side_by_side(count, width, [&](int64_t begin, int64_t end) {
      const float* vector = vectors.data + begin * width;
      float* gradient = gradients + begin * width;
      if (!pairs_.one_tile_) pairs_.kernels_.paired(vector, gradient, end - begin, width, paired + begin);
      for (int64_t item = begin; item < end; ++item) {
        // Of a normalised vector only what is across it counts.
        along[item] = normalize ? static_cast<float>(paired[item]) : 0.0f;
        by[item] = normalize ? factor * inverse_norms[item] : factor;
      }
      Finish finish{by + begin, along + begin, vector, nullptr, width, gradient};
      if constexpr (floats) {
        finish.order = order == nullptr ? nullptr : order + begin;
        finish.channels = channels;
        finish.to = order == nullptr ? to + begin * channels : to;
      }
      if (!pairs_.one_tile_) {
        pairs_.kernels_.write(gradient, end - begin, width, finish);
      } else if (&vectors == &query_) {
        pairs_.kernels_.write_rows(whole_, weights_.get(), finish);
      } else {
        pairs_.kernels_.write_columns(whole_, weights_.get(), finish);
      }
      if constexpr (!floats)
        for (int64_t item = begin; item < end; ++item) {
          T* result = to + (order == nullptr ? item : order[item]) * channels;
          for (int64_t c = 0; c < channels; ++c) result[c] = static_cast<T>(gradients[item * width + c]);
        }
    });
  });
  double sum = 0.0;
  for (int64_t item = 0; item < count; ++item) sum += paired[item];
  return sum;
}

}  // namespace voxtrast
