// voxtrast::info_nce on the CPU. What is computed: kernels/info_nce.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "interpolation.h"
#include "pairwise.h"

namespace voxtrast {
namespace {

using torch::stable::Tensor;

// log(1 + exp(x))
double softplus(double x) { return std::max(x, 0.0) + std::log1p(std::exp(-std::abs(x))); }

// loss (B, N); log-sum-exps over the negatives alone (B, N) and, where symmetric, (B, M); similarity of the positives.
std::tuple<Tensor, Tensor, Tensor, Tensor> info_nce(const Tensor& query_given, const Tensor& key_given,
                                                    const Tensor& scale, int64_t offset, bool symmetric) {
  const Tensor query = torch::stable::contiguous(query_given), key = torch::stable::contiguous(key_given);
  const int64_t batch = query.size(0), rows = query.size(1), columns = key.size(1);
  STD_TORCH_CHECK(offset >= 0 && offset + rows <= columns, "voxtrast: every query needs a key of its own");
  const Pairwise pairs(query, key, false, *float_data(scale, 1, "scale"), offset);
  Tensor row = new_doubles(scale, batch, rows), column = new_doubles(scale, batch, symmetric ? columns : 0);
  Tensor positive = new_doubles(scale, batch, rows), loss = torch::stable::new_empty(scale, {batch, rows});
  double *of_row = row.mutable_data_ptr<double>(), *paired = positive.mutable_data_ptr<double>();
  double* of_column = symmetric ? column.mutable_data_ptr<double>() : nullptr;
  pairs.log_sum_exponentials(of_row, of_column);
  pairs.paired(offset, paired);
  float* losses = loss.mutable_data_ptr<float>();
  for (int64_t item = 0; item < batch * rows; ++item) {
    const double forth = softplus(of_row[item] - paired[item]);
    const int64_t own = item / rows * columns + item % rows + offset;
    losses[item] = static_cast<float>(symmetric ? 0.5 * (forth + softplus(of_column[own] - paired[item])) : forth);
  }
  return {loss, row, column, positive};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(voxtrast, CPU, library) { library.impl("info_nce", TORCH_BOX(&info_nce)); }

}  // namespace voxtrast
