// voxtrast::local_correlation and its gradients on CUDA. What is computed: kernels/local_correlation.py.
#include "local_correlation.cuh"

#include <limits>
#include <tuple>
#include <vector>

#include "tensors.cuh"

namespace voxtrast {
namespace {

using correlation::Element;
using correlation::Problem;

Element element_of(const Tensor& query) {
  switch (query.scalar_type()) {
    case ScalarType::Float: return Element::kFloat32;
    case ScalarType::BFloat16: return Element::kBfloat16;
    case ScalarType::Half: return Element::kFloat16;
    default: STD_TORCH_CHECK(false, "voxtrast: query: expected float32, bfloat16 or float16"); __builtin_unreachable();
  }
}

Problem describe(const Tensor& query, const Tensor& key, int64_t radius, int64_t units, double scale) {
  STD_TORCH_CHECK(query.dim() == 4 || query.dim() == 5, "voxtrast: query: expected 4 or 5 dimensions, got ",
                  query.dim());
  check_alike(key, "key", query, "query");
  STD_TORCH_CHECK(radius >= 1 && units >= 1 && query.size(1) % units == 0, "voxtrast: radius or units out of range");
  const int dimensions = static_cast<int>(query.dim()) - 2;
  int64_t sizes[3];
  for (int axis = 0; axis < dimensions; ++axis) {
    sizes[axis] = query.size(axis + 2);
    STD_TORCH_CHECK(sizes[axis] <= std::numeric_limits<int>::max() - 4096, "voxtrast: query: an axis is too long");
  }
  return correlation::describe(query.size(0), units, query.size(1) / units, sizes, dimensions, radius,
                               scale, element_of(query));
}

int processors_of(const Tensor& tensor) {
  int processors = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, tensor.get_device_index()));
  return processors;
}

std::vector<int64_t> with_channels(const Tensor& query, int64_t channels) {
  const auto sizes = query.sizes();
  std::vector<int64_t> shape(sizes.begin(), sizes.end());
  shape[1] = channels;
  return shape;
}

std::tuple<Tensor, Tensor, Tensor> local_correlation(const Tensor& query_given, const Tensor& key_given, int64_t radius,
                                                     int64_t units, double scale) {
  const torch::stable::accelerator::DeviceGuard guard(query_given.get_device_index());
  const Tensor query = torch::stable::contiguous(query_given), key = torch::stable::contiguous(key_given);
  const Problem problem = describe(query, key, radius, units, scale);
  const auto new_float = [&](const std::vector<int64_t>& sizes) {
    return torch::stable::new_empty(query, sizes, ScalarType::Float);
  };
  Tensor displacement = new_float(with_channels(query, problem.components));
  Tensor log_sum_exp = new_float(with_channels(query, units));
  Tensor mean = units == 1 ? new_float({0}) : new_float(with_channels(query, units * problem.components));
  if (query.numel() > 0)
    correlation::forward(Launch(query), problem, processors_of(query), query.const_data_ptr(), key.const_data_ptr(),
                         displacement.mutable_data_ptr<float>(), log_sum_exp.mutable_data_ptr<float>(),
                         mean.mutable_data_ptr<float>());
  return {displacement, log_sum_exp, mean};
}

// grad_query and grad_key; an empty tensor stands for one that is not needed.
std::tuple<Tensor, Tensor> local_correlation_backward(const Tensor& grad_given, const Tensor& query_given,
                                                      const Tensor& key_given, const Tensor& log_sum_exp_given,
                                                      const Tensor& mean_given, int64_t radius, int64_t units,
                                                      double scale, bool need_query, bool need_key) {
  const torch::stable::accelerator::DeviceGuard guard(query_given.get_device_index());
  const Tensor query = torch::stable::contiguous(query_given), key = torch::stable::contiguous(key_given);
  const Tensor grad_displacement = torch::stable::contiguous(grad_given);
  const Tensor log_sum_exp = torch::stable::contiguous(log_sum_exp_given), mean = torch::stable::contiguous(mean_given);
  const Problem problem = describe(query, key, radius, units, scale);
  const int64_t count = problem.count * problem.points;
  const correlation::Gradients given = {
      float_data(grad_displacement, count / units * problem.components, query, "grad_displacement"),
      float_data(log_sum_exp, count, query, "log_sum_exp"), float_data(mean, count * problem.components, query, "mean")};
  Tensor grad_query = empty_if(need_query, query), grad_key = empty_if(need_key, key);
  if (query.numel() > 0)
    correlation::backward(Launch(query), problem, processors_of(query), given, query.const_data_ptr(),
                          key.const_data_ptr(), need_query ? grad_query.mutable_data_ptr() : nullptr,
                          need_key ? grad_key.mutable_data_ptr() : nullptr);
  return {grad_query, grad_key};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(voxtrast, CUDA, library) {
  library.impl("local_correlation", TORCH_BOX(&local_correlation));
  library.impl("local_correlation_backward", TORCH_BOX(&local_correlation_backward));
}

}  // namespace voxtrast
