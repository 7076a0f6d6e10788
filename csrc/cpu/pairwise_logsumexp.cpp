// voxtrast::pairwise_logsumexp on the CPU, and the gradients of all operators that are made of its log-sum-exps. What is
// computed: kernels/pairwise_logsumexp.py.
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

std::tuple<Tensor, Tensor> pairwise_logsumexp(const Tensor& query_given, const Tensor& key_given, const Tensor& scale,
                                              bool same, bool exclude_diagonal, bool columns) {
  const Tensor query = torch::stable::contiguous(query_given), key = torch::stable::contiguous(key_given);
  const Pairwise pairs(query, key, same, *float_data(scale, 1, "scale"), exclude_diagonal ? 0 : kNoDiagonal);
  Tensor row = new_doubles(scale, query.size(0), query.size(1));
  Tensor column = new_doubles(scale, key.size(0), columns ? key.size(1) : 0);
  pairs.log_sum_exponentials(row.mutable_data_ptr<double>(), columns ? column.mutable_data_ptr<double>() : nullptr);
  return {row, column};
}

// An empty tensor stands for what is absent: lse and gradient of the columns, gradient of the rows, positives. `exclude`
// leaves out the pairs (i, i + offset), which are the positives.
std::tuple<Tensor, Tensor> pairwise_backward(const Tensor& query_given, const Tensor& key_given, const Tensor& scale,
                                             const Tensor& row_lse, const Tensor& grad_row, const Tensor& column_lse,
                                             const Tensor& grad_column, const Tensor& grad_positive, int64_t offset,
                                             bool same, bool exclude, bool need_key) {
  const Tensor query = torch::stable::contiguous(query_given), key = torch::stable::contiguous(key_given);
  const int64_t rows = query.size(0) * query.size(1), columns = key.size(0) * key.size(1);
  const Tensor kept[] = {torch::stable::contiguous(row_lse), torch::stable::contiguous(grad_row),
                         torch::stable::contiguous(column_lse), torch::stable::contiguous(grad_column),
                         torch::stable::contiguous(grad_positive)};
  const auto gradient = [](const Tensor& tensor, int64_t count, const char* name) {
    return tensor.numel() == 0 ? nullptr : float_data(tensor, count, name);
  };
  const auto lse = [](const Tensor& tensor, int64_t count, const char* name) {
    return tensor.numel() == 0 ? nullptr : double_data(tensor, count, name);
  };
  const SideGradient of_rows{lse(kept[0], rows, "row_lse"), gradient(kept[1], rows, "grad_row")};
  const SideGradient of_columns{lse(kept[2], columns, "column_lse"), gradient(kept[3], columns, "grad_column")};
  const Positives positives{gradient(kept[4], rows, "grad_positive"), offset};
  need_key = need_key && !same;
  Tensor grad_query = torch::stable::new_empty(query, query.sizes());
  Tensor grad_key = need_key ? torch::stable::new_empty(key, key.sizes()) : torch::stable::new_empty(key, {0});
  const Pairwise pairs(query, key, same, *float_data(scale, 1, "scale"), exclude ? offset : kNoDiagonal);
  pairs.differentiate(of_rows, of_columns, positives, &grad_query, need_key ? &grad_key : nullptr);
  return {grad_query, grad_key};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(voxtrast, CPU, library) {
  library.impl("pairwise_logsumexp", TORCH_BOX(&pairwise_logsumexp));
  library.impl("pairwise_backward", TORCH_BOX(&pairwise_backward));
}

}  // namespace voxtrast
