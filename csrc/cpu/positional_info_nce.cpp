// voxtrast::positional_info_nce and its gradients on the CPU. What is computed: kernels/positional_info_nce.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>
#include <vector>

#include "interpolation.h"
#include "pairwise.h"

namespace voxtrast {
namespace {

using torch::stable::Tensor;

// order, first, last (P, N) int64, P = 1 for all problems or B: vector i in the order of the positions is the one at
// order[i], and its positives are first[i] .. last[i] in that order, without i itself.
struct Positions {
  Tensor order_held, first_held, last_held;
  int64_t problems, rows;
  const int64_t *order, *first, *last;

  Positions(const Tensor& order_given, const Tensor& first_given, const Tensor& last_given)
      : order_held(torch::stable::contiguous(order_given)),
        first_held(torch::stable::contiguous(first_given)),
        last_held(torch::stable::contiguous(last_given)),
        problems(order_held.size(0)),
        rows(order_held.size(1)) {
    order = whole_data(order_held, problems * rows, "order");
    first = whole_data(first_held, problems * rows, "first");
    last = whole_data(last_held, problems * rows, "last");
  }

  int64_t of(int64_t problem) const { return problem % problems * rows; }
};

PairwiseOptions options_for(const Positions& positions, const Tensor& scale, bool normalize) {
  PairwiseOptions options;
  options.scale = *float_data(scale, 1, "scale");
  options.same = true;
  options.normalize = normalize;
  options.excluded = 0;
  options.order = positions.order;
  options.orders = positions.problems;
  return options;
}

// loss (B, N) in the order of the features, 0 where there is no positive; lse (B, N) in the order of the positions.
std::tuple<Tensor, Tensor> positional_info_nce(const Tensor& features_given, const Tensor& order, const Tensor& first,
                                               const Tensor& last, const Tensor& scale, bool normalize) {
  const Tensor features = torch::stable::contiguous(features_given);
  const Positions positions(order, first, last);
  const Pairwise pairs(features, features, options_for(positions, scale, normalize));
  const int64_t rows = pairs.rows;
  Tensor lse = new_doubles(scale, pairs.batch, rows), loss = torch::stable::new_empty(scale, {pairs.batch, rows});
  double* sums = lse.mutable_data_ptr<double>();
  float* losses = loss.mutable_data_ptr<float>();
  pairs.each_problem([&](Problem& problem) {
    const int64_t start = positions.of(problem.index);
    const int64_t *from = positions.first + start, *to = positions.last + start, *place = positions.order + start;
    double* sum = sums + problem.index * rows;
    std::vector<double> positive(rows);
    problem.log_sum_exponentials(sum, nullptr);
    problem.mean_over(from, to, positive.data());
    for (int64_t n = 0; n < rows; ++n)
      losses[problem.index * rows + place[n]] = static_cast<float>(to[n] - from[n] > 1 ? sum[n] - positive[n] : 0.0);
  });
  return {loss, lse};
}

// Gradients of features and scale.
std::tuple<Tensor, Tensor> positional_info_nce_backward(const Tensor& grad_loss_given, const Tensor& features_given,
                                                        const Tensor& order, const Tensor& first, const Tensor& last,
                                                        const Tensor& scale, const Tensor& lse_given, bool normalize) {
  const Tensor features = torch::stable::contiguous(features_given);
  const Tensor lse = torch::stable::contiguous(lse_given), grad_loss = torch::stable::contiguous(grad_loss_given);
  const Positions positions(order, first, last);
  const Pairwise pairs(features, features, options_for(positions, scale, normalize));
  const int64_t rows = pairs.rows;
  const float* given = float_data(grad_loss, pairs.batch * rows, "grad_loss");
  const double* sums = double_data(lse, pairs.batch * rows, "lse");
  Tensor grad_features = new_gradient(features);
  std::vector<double> of_scale(pairs.batch);
  pairs.each_problem([&](Problem& problem) {
    const int64_t start = positions.of(problem.index);
    const int64_t *from = positions.first + start, *to = positions.last + start, *place = positions.order + start;
    std::vector<float> gradient(rows);
    for (int64_t n = 0; n < rows; ++n)
      gradient[n] = to[n] - from[n] > 1 ? given[problem.index * rows + place[n]] : 0.0f;
    problem.differentiate({sums + problem.index * rows, gradient.data()}, {}, {gradient.data(), 0, from, to}, false);
    of_scale[problem.index] = problem.write(grad_features, nullptr);
  });
  return {grad_features, sum_to_scalar(of_scale, scale)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(voxtrast, CPU, library) {
  library.impl("positional_info_nce", TORCH_BOX(&positional_info_nce));
  library.impl("positional_info_nce_backward", TORCH_BOX(&positional_info_nce_backward));
}

}  // namespace voxtrast
