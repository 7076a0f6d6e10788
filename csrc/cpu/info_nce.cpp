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
                                                    const Tensor& scale, int64_t offset, bool symmetric,
                                                    bool normalize) {
  const Tensor query = torch::stable::contiguous(query_given), key = torch::stable::contiguous(key_given);
  STD_TORCH_CHECK(offset >= 0 && offset + query.size(1) <= key.size(1),
                  "voxtrast: every query needs a key of its own");
  PairwiseOptions options;
  options.scale = *float_data(scale, 1, "scale");
  options.normalize = normalize;
  options.excluded = offset;
  const Pairwise pairs(query, key, options);
  const int64_t rows = pairs.rows, columns = pairs.columns;
  Tensor row = new_doubles(scale, pairs.batch, rows), column = new_doubles(scale, pairs.batch, symmetric ? columns : 0);
  Tensor positive = new_doubles(scale, pairs.batch, rows);
  Tensor loss = torch::stable::new_empty(scale, {pairs.batch, rows});
  double *of_rows = row.mutable_data_ptr<double>(), *of_positives = positive.mutable_data_ptr<double>();
  double* of_columns = symmetric ? column.mutable_data_ptr<double>() : nullptr;
  float* losses = loss.mutable_data_ptr<float>();
  pairs.each_problem([&](Problem& problem) {
    double *back = symmetric ? of_columns + problem.index * columns : nullptr, *forth = of_rows + problem.index * rows;
    double* paired = of_positives + problem.index * rows;
    problem.log_sum_exponentials(forth, back);
    problem.paired(offset, paired);
    for (int64_t n = 0; n < rows; ++n) {
      const double one = softplus(forth[n] - paired[n]);
      const double both = symmetric ? 0.5 * (one + softplus(back[n + offset] - paired[n])) : one;
      losses[problem.index * rows + n] = static_cast<float>(both);
    }
  });
  return {loss, row, column, positive};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(voxtrast, CPU, library) { library.impl("info_nce", TORCH_BOX(&info_nce)); }

}  // namespace voxtrast
