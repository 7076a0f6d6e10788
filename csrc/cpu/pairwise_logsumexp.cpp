// voxtrast::pairwise_logsumexp on the CPU, and the gradients of all operators made of its log-sum-exps. What is
// computed: kernels/pairwise_logsumexp.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <tuple>

#include "interpolation.h"
#include "pairwise.h"

namespace voxtrast {
namespace {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> pairwise_logsumexp(const Tensor& query_given, const Tensor& key_given, const Tensor& scale,
                                              bool same, bool exclude_diagonal, bool columns, bool normalize) {
  const Tensor query = torch::stable::contiguous(query_given), key = torch::stable::contiguous(key_given);
  PairwiseOptions options;
  options.scale = *float_data(scale, 1, "scale");
  options.same = same;
  options.normalize = normalize;
  if (exclude_diagonal) options.excluded = 0;
  const Pairwise pairs(query, key, options);
  Tensor row = new_doubles(scale, pairs.batch, pairs.rows);
  Tensor column = new_doubles(scale, pairs.batch, columns ? pairs.columns : 0);
  double *of_rows = row.mutable_data_ptr<double>(), *of_columns = column.mutable_data_ptr<double>();
  pairs.each_problem([&](Problem& problem) {
    problem.log_sum_exponentials(of_rows + problem.index * pairs.rows,
                                 columns ? of_columns + problem.index * pairs.columns : nullptr);
  });
  return {row, column};
}

// Gradients of query, key and scale. An empty tensor stands for what is absent: lse and gradient of the columns,
// gradient of the rows, positives. `exclude` leaves out the pairs (i, i + offset), which are the positives.
std::tuple<Tensor, Tensor, Tensor> pairwise_backward(const Tensor& query_given, const Tensor& key_given,
                                                     const Tensor& scale, const Tensor& row_lse,
                                                     const Tensor& grad_row, const Tensor& column_lse,
                                                     const Tensor& grad_column, const Tensor& grad_positive,
                                                     int64_t offset, bool same, bool exclude, bool normalize,
                                                     bool need_key) {
  const Tensor query = torch::stable::contiguous(query_given), key = torch::stable::contiguous(key_given);
  const Tensor kept[] = {torch::stable::contiguous(row_lse), torch::stable::contiguous(grad_row),
                         torch::stable::contiguous(column_lse), torch::stable::contiguous(grad_column),
                         torch::stable::contiguous(grad_positive)};
  PairwiseOptions options;
  options.scale = *float_data(scale, 1, "scale");
  options.same = same;
  options.normalize = normalize;
  if (exclude) options.excluded = offset;
  const Pairwise pairs(query, key, options);
  const int64_t rows = pairs.batch * pairs.rows, columns = pairs.batch * pairs.columns;
  const auto gradient = [](const Tensor& tensor, int64_t count, const char* name) {
    return tensor.numel() == 0 ? nullptr : float_data(tensor, count, name);
  };
  const auto lse = [](const Tensor& tensor, int64_t count, const char* name) {
    return tensor.numel() == 0 ? nullptr : double_data(tensor, count, name);
  };
  const SideGradient of_rows{lse(kept[0], rows, "row_lse"), gradient(kept[1], rows, "grad_row")};
  const SideGradient of_columns{lse(kept[2], columns, "column_lse"), gradient(kept[3], columns, "grad_column")};
  const float* positive = gradient(kept[4], rows, "grad_positive");
  need_key = need_key && !same;
  Tensor grad_query = new_gradient(query);
  Tensor grad_key = need_key ? new_gradient(key) : torch::stable::new_empty(key, {0});
  std::vector<double> of_scale(pairs.batch);
  pairs.each_problem([&](Problem& problem) {
    const auto part = [&](const auto* data, int64_t count) {
      return data == nullptr ? nullptr : data + problem.index * count;
    };
    problem.differentiate({part(of_rows.lse, pairs.rows), part(of_rows.gradient, pairs.rows)},
                          {part(of_columns.lse, pairs.columns), part(of_columns.gradient, pairs.columns)},
                          {part(positive, pairs.rows), offset}, need_key);
    of_scale[problem.index] = problem.write(grad_query, need_key ? &grad_key : nullptr);
  });
  return {grad_query, grad_key, sum_to_scalar(of_scale, scale)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(voxtrast, CPU, library) {
  library.impl("pairwise_logsumexp", TORCH_BOX(&pairwise_logsumexp));
  library.impl("pairwise_backward", TORCH_BOX(&pairwise_backward));
}

}  // namespace voxtrast
