// voxtrast::positional_info_nce and its gradient on the CPU. What is computed: kernels/positional_info_nce.py.
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

// features (B, N, C); first, last (B, N) int64: the positives of i are first .. last without i itself.
std::tuple<Tensor, Tensor> positional_info_nce(const Tensor& features_given, const Tensor& first_given,
                                               const Tensor& last_given, const Tensor& scale) {
  const Tensor features = torch::stable::contiguous(features_given);
  const Tensor first = torch::stable::contiguous(first_given), last = torch::stable::contiguous(last_given);
  const int64_t batch = features.size(0), rows = features.size(1);
  const Pairwise pairs(features, features, true, *float_data(scale, 1, "scale"), 0);
  Tensor lse = new_doubles(scale, batch, rows), loss = torch::stable::new_empty(scale, {batch, rows});
  double* sums = lse.mutable_data_ptr<double>();
  pairs.log_sum_exponentials(sums, nullptr);
  std::vector<double> positive(batch * rows);
  const int64_t* from = whole_data(first, batch * rows, "first");
  const int64_t* to = whole_data(last, batch * rows, "last");
  pairs.mean_over(from, to, positive.data());
  float* losses = loss.mutable_data_ptr<float>();
  for (int64_t item = 0; item < batch * rows; ++item)
    losses[item] = static_cast<float>(to[item] - from[item] > 1 ? sums[item] - positive[item] : 0.0);
  return {loss, lse};
}

// Gradient of the losses of the rows that have positives.
Tensor positional_info_nce_backward(const Tensor& grad_loss_given, const Tensor& features_given,
                                    const Tensor& first_given, const Tensor& last_given, const Tensor& scale,
                                    const Tensor& lse_given) {
  const Tensor features = torch::stable::contiguous(features_given);
  const Tensor first = torch::stable::contiguous(first_given), last = torch::stable::contiguous(last_given);
  const Tensor lse = torch::stable::contiguous(lse_given), grad_loss = torch::stable::contiguous(grad_loss_given);
  const int64_t items = features.size(0) * features.size(1);
  const int64_t* from = whole_data(first, items, "first");
  const int64_t* to = whole_data(last, items, "last");
  const float* given = float_data(grad_loss, items, "grad_loss");
  std::vector<float> gradient(items);
  for (int64_t item = 0; item < items; ++item) gradient[item] = to[item] - from[item] > 1 ? given[item] : 0.0f;
  const Pairwise pairs(features, features, true, *float_data(scale, 1, "scale"), 0);
  Tensor grad_features = torch::stable::new_empty(features, features.sizes());
  pairs.differentiate({double_data(lse, items, "lse"), gradient.data()}, {}, {gradient.data(), 0, from, to},
                      &grad_features, nullptr);
  return grad_features;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(voxtrast, CPU, library) {
  library.impl("positional_info_nce", TORCH_BOX(&positional_info_nce));
  library.impl("positional_info_nce_backward", TORCH_BOX(&positional_info_nce_backward));
}

}  // namespace voxtrast
