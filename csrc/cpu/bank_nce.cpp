// voxtrast::softplus_sums and its gradients on the CPU: what bank_nce takes of a bank. What is computed:
// kernels/bank_nce.py.
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

PairwiseOptions options_for(const Tensor& scale, bool normalize) {
  PairwiseOptions options;
  options.scale = *float_data(scale, 1, "scale");
  options.normalize = normalize;
  return options;
}

Tensor softplus_sums(const Tensor& query_given, const Tensor& bank_given, const Tensor& scale, const Tensor& shift,
                     bool normalize) {
  const Tensor query = torch::stable::contiguous(query_given), bank = torch::stable::contiguous(bank_given);
  const double by = *double_data(shift, 1, "shift");
  const Pairwise pairs(query, bank, options_for(scale, normalize));
  Tensor sums = new_doubles(scale, pairs.batch, pairs.rows);
  double* found = sums.mutable_data_ptr<double>();
  pairs.each_problem([&](Problem& problem) { problem.softplus_sums(by, found + problem.index * pairs.rows); });
  return sums;
}

// Gradients of query, bank and scale.
std::tuple<Tensor, Tensor, Tensor> softplus_sums_backward(const Tensor& grad_given, const Tensor& query_given,
                                                          const Tensor& bank_given, const Tensor& scale,
                                                          const Tensor& shift, bool normalize, bool need_bank) {
  const Tensor query = torch::stable::contiguous(query_given), bank = torch::stable::contiguous(bank_given);
  const Tensor gradient = torch::stable::contiguous(grad_given);
  const double by = *double_data(shift, 1, "shift");
  const Pairwise pairs(query, bank, options_for(scale, normalize));
  const float* given = float_data(gradient, pairs.batch * pairs.rows, "gradient");
  Tensor grad_query = new_gradient(query);
  Tensor grad_bank = need_bank ? new_gradient(bank) : torch::stable::new_empty(bank, {0});
  std::vector<double> of_scale(pairs.batch);
  pairs.each_problem([&](Problem& problem) {
    problem.differentiate_softplus(by, given + problem.index * pairs.rows, need_bank);
    of_scale[problem.index] = problem.write(grad_query, need_bank ? &grad_bank : nullptr);
  });
  return {grad_query, grad_bank, sum_to_scalar(of_scale, scale)};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(voxtrast, CPU, library) {
  library.impl("softplus_sums", TORCH_BOX(&softplus_sums));
  library.impl("softplus_sums_backward", TORCH_BOX(&softplus_sums_backward));
}

}  // namespace voxtrast
