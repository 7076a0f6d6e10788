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

Tensor softplus_sums(const Tensor& query_given, const Tensor& bank_given, const Tensor& scale, const Tensor& shift) {
  const Tensor query = torch::stable::contiguous(query_given), bank = torch::stable::contiguous(bank_given);
  const Pairwise pairs(query, bank, false, *float_data(scale, 1, "scale"), kNoDiagonal);
  Tensor sums = new_doubles(scale, query.size(0), query.size(1));
  pairs.softplus_sums(*double_data(shift, 1, "shift"), sums.mutable_data_ptr<double>());
  return sums;
}

std::tuple<Tensor, Tensor> softplus_sums_backward(const Tensor& grad_given, const Tensor& query_given,
                                                  const Tensor& bank_given, const Tensor& scale, const Tensor& shift,
                                                  bool need_bank) {
  const Tensor query = torch::stable::contiguous(query_given), bank = torch::stable::contiguous(bank_given);
  const Tensor gradient = torch::stable::contiguous(grad_given);
  const Pairwise pairs(query, bank, false, *float_data(scale, 1, "scale"), kNoDiagonal);
  Tensor grad_query = torch::stable::new_empty(query, query.sizes());
  Tensor grad_bank = need_bank ? torch::stable::new_empty(bank, bank.sizes()) : torch::stable::new_empty(bank, {0});
  pairs.differentiate_softplus(*double_data(shift, 1, "shift"),
                               float_data(gradient, query.size(0) * query.size(1), "gradient"), &grad_query,
                               need_bank ? &grad_bank : nullptr);
  return {grad_query, grad_bank};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(voxtrast, CPU, library) {
  library.impl("softplus_sums", TORCH_BOX(&softplus_sums));
  library.impl("softplus_sums_backward", TORCH_BOX(&softplus_sums_backward));
}

}  // namespace voxtrast
