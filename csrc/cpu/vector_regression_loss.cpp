// voxtrast::vector_regression_loss and its gradient on the CPU. What is computed: kernels/vector_regression_loss.py.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <tuple>

#include "interpolation.h"
#include "reduction.h"

namespace voxtrast {
namespace {

using torch::stable::Tensor;

struct Shape {
  int64_t batch, components, points;

  explicit Shape(const Tensor& prediction) : batch(prediction.size(0)), components(prediction.size(1)), points(1) {
    for (int64_t axis = 2; axis < prediction.dim(); ++axis) points *= prediction.size(axis);
  }
};

std::tuple<Tensor, Tensor> vector_regression_loss(const Tensor& prediction_given, const Tensor& target_given,
                                                  const Tensor& mask_given) {
  const Tensor prediction = torch::stable::contiguous(prediction_given);
  const Tensor target = torch::stable::contiguous(target_given);
  const Tensor mask = torch::stable::contiguous(mask_given);
  const Shape shape(prediction);
  const float* predicted = float_data(prediction, shape.batch * shape.components * shape.points, "prediction");
  const float* wanted = float_data(target, prediction.numel(), "target");
  const float* weights = float_data(mask, shape.batch * shape.points, "mask");

  const auto work = [&](int64_t b, int64_t first, int64_t last, Partial& partial) {
    const float* weight = weights + b * shape.points;
    for (int64_t c = 0; c < shape.components; ++c) {
      const float* here = predicted + (b * shape.components + c) * shape.points;
      const float* there = wanted + (b * shape.components + c) * shape.points;
      add_to_lanes(partial.lane, first, last, [=](int64_t p) {
        // A voxel without weight is not looked at: it may hold a NaN.
        const float error = weight[p] * std::fabs(here[p] - there[p]);
        return weight[p] != 0.0f ? error : 0.0f;
      });
    }
    add_to_lanes(partial.weight_lane, first, last, [=](int64_t p) { return weight[p]; });
  };
  const auto [sum, total] = reduce(shape.batch, shape.points, shape.components, work);
  Tensor loss = torch::stable::new_empty(prediction, {});
  Tensor mask_sum = torch::stable::new_empty(prediction, {});
  *loss.mutable_data_ptr<float>() = static_cast<float>(total == 0.0 ? 0.0 : sum / total);
  *mask_sum.mutable_data_ptr<float>() = static_cast<float>(total);
  return {loss, mask_sum};
}

// Gradient of the prediction; that of the target is its negative.
Tensor vector_regression_loss_backward(const Tensor& grad_loss, const Tensor& prediction_given,
                                       const Tensor& target_given, const Tensor& mask_given, const Tensor& mask_sum) {
  const Tensor prediction = torch::stable::contiguous(prediction_given);
  const Tensor target = torch::stable::contiguous(target_given);
  const Tensor mask = torch::stable::contiguous(mask_given);
  const Shape shape(prediction);
  const float* predicted = float_data(prediction, shape.batch * shape.components * shape.points, "prediction");
  const float* wanted = float_data(target, prediction.numel(), "target");
  const float* weights = float_data(mask, shape.batch * shape.points, "mask");
  const float total = *float_data(mask_sum, 1, "mask_sum");
  const float factor = total == 0.0f ? 0.0f : *float_data(grad_loss, 1, "grad_loss") / total;
  Tensor gradient = torch::stable::new_empty(prediction, prediction.sizes());
  float* output = gradient.mutable_data_ptr<float>();
  const int64_t stretches = (shape.points + kStretch - 1) / kStretch;
  const int64_t items = shape.batch * shape.components * stretches;
  torch::stable::parallel_for(0, items, grain(kStretch / 8), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t plane = item / stretches;
      const int64_t first = item % stretches * kStretch, last = std::min(first + kStretch, shape.points);
      const float* weight = weights + plane / shape.components * shape.points;
      const float* here = predicted + plane * shape.points;
      const float* there = wanted + plane * shape.points;
      float* result = output + plane * shape.points;
      for (int64_t p = first; p < last; ++p) {
        const float difference = here[p] - there[p];
        const float sign = difference > 0.0f ? 1.0f : difference < 0.0f ? -1.0f : difference;  // NaN stays NaN
        const float slope = factor * weight[p] * sign;
        result[p] = weight[p] != 0.0f ? slope : 0.0f;
      }
    }
  });
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(voxtrast, CPU, library) {
  library.impl("vector_regression_loss", TORCH_BOX(&vector_regression_loss));
  library.impl("vector_regression_loss_backward", TORCH_BOX(&vector_regression_loss_backward));
}

}  // namespace voxtrast
