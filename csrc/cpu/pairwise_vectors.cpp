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

double dot(const float* one, const float* other, int64_t width) {
  double lanes[4] = {};  // width is a multiple of four
  for (int64_t c = 0; c < width; c += 4)
    for (int64_t lane = 0; lane < 4; ++lane) lanes[lane] += double(one[c + lane]) * double(other[c + lane]);
  return (lanes[0] + lanes[1]) + (lanes[2] + lanes[3]);
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
        // Asked this way round, NaN counts as a direction and shows in the sums; an infinite norm hides it.
        const float inverse = norms[item] < kMinimumNorm ? 0.0f : std::isinf(norms[item]) ? NAN : 1.0f / norms[item];
        for (int64_t c = 0; c < width; ++c) target[c] *= inverse;
        norms[item] = inverse;
      }
    });
  });
  vectors.largest_norm = 0.0;
  for (int64_t item = 0; item < count; ++item) {
    const bool directed = norms[item] != 0.0f;  // for normalised vectors, whose norms are 0, 1 or NaN
    const double norm = !options.normalize || std::isnan(norms[item]) ? norms[item] : directed ? 1.0 : 0.0;
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
