// voxtrast::vector_regression_loss and its gradient on CUDA.
#include "vector_regression_loss.cuh"

#include <tuple>

#include "tensors.cuh"

namespace voxtrast {
namespace {

// The tensors, contiguous, and what the kernels see of them.
struct Arguments {
  Tensor prediction, target, mask;
  Fields fields;

  Arguments(const Tensor& prediction_given, const Tensor& target_given, const Tensor& mask_given)
      : prediction(torch::stable::contiguous(prediction_given)),
        target(torch::stable::contiguous(target_given)),
        mask(torch::stable::contiguous(mask_given)) {
    int64_t points = 1;
    for (int64_t axis = 2; axis < prediction.dim(); ++axis) points *= prediction.size(axis);
    const int64_t batch = prediction.size(0), components = prediction.size(1);
    fields = {batch, components, points, float_data(prediction, batch * components * points, prediction, "prediction"),
              float_data(target, prediction.numel(), prediction, "target"),
              float_data(mask, batch * points, prediction, "mask")};
  }
};

std::tuple<Tensor, Tensor> vector_regression_loss(const Tensor& prediction, const Tensor& target, const Tensor& mask) {
  const torch::stable::accelerator::DeviceGuard guard(prediction.get_device_index());
  const Arguments arguments(prediction, target, mask);
  Tensor loss = torch::stable::new_empty(prediction, {});
  Tensor mask_sum = torch::stable::new_empty(prediction, {});
  Tensor partials = scratch(prediction, 2 * partials_of(arguments.fields.batch, arguments.fields.points),
                            ScalarType::Double);
  run_vector_regression_loss(arguments.fields, mutable_data<Partial>(partials), mutable_data<float>(loss),
                             mutable_data<float>(mask_sum), Launch(prediction));
  return {loss, mask_sum};
}

Tensor vector_regression_loss_backward(const Tensor& grad_loss, const Tensor& prediction, const Tensor& target,
                                       const Tensor& mask, const Tensor& mask_sum) {
  const torch::stable::accelerator::DeviceGuard guard(prediction.get_device_index());
  const Arguments arguments(prediction, target, mask);
  Tensor gradient = torch::stable::new_empty(prediction, prediction.sizes());
  run_vector_regression_loss_backward(arguments.fields, float_data(grad_loss, 1, prediction, "grad_loss"),
                                      float_data(mask_sum, 1, prediction, "mask_sum"), mutable_data<float>(gradient),
                                      Launch(prediction));
  return gradient;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(voxtrast, CUDA, library) {
  library.impl("vector_regression_loss", TORCH_BOX(&vector_regression_loss));
  library.impl("vector_regression_loss_backward", TORCH_BOX(&vector_regression_loss_backward));
}

}  // namespace voxtrast
