// voxtrast::compose_displacement on the CPU: warp and sum in one pass. Its gradients are those of warp.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "warp.h"

namespace voxtrast {
namespace {

using torch::stable::Tensor;

Tensor compose_displacement(const Tensor& outer_given, const Tensor& inner_given) {
  const Tensor outer = readable_in_pairs(outer_given);
  const Tensor inner = torch::stable::contiguous(inner_given);
  Tensor output = new_result(outer_given);
  with_dimensions(outer_given, "outer", [&](auto dimensions) {
    constexpr int D = decltype(dimensions)::value;
    STD_TORCH_CHECK(outer_given.size(1) == D, "voxtrast: outer must have ", D, " components, got ",
                    outer_given.size(1));
    float_data(outer_given, inner.numel(), "outer");
    sample<float, D, true>(outer, outer_given.sizes(), inner, output.mutable_data_ptr<float>());
  });
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(voxtrast, CPU, library) {
  library.impl("compose_displacement", TORCH_BOX(&compose_displacement));
}

}  // namespace voxtrast
