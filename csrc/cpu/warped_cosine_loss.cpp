// voxtrast::warped_cosine_loss and its gradients on the CPU. What is computed: kernels/warped_cosine_loss.py.
//
// The warped map exists for one block of points at a time, in the forward and in the backward pass. A point without
// weight is dropped before anything of it is read.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "reduction.h"
#include "warp.h"

namespace voxtrast {
namespace {

using torch::stable::Tensor;

// Shorter vectors have no direction. The same number stands in kernels/warped_cosine_loss.py.
constexpr float kMinimumNorm = 1e-6f;

// Dot product and squared norms of the two vectors of every point of a block.
struct Products {
  float dot[kBlock], fixed[kBlock], warped[kBlock];

  // Cosine, or 0 where a vector has no direction; sets norms to the product of the norms.
  float cosine(int64_t n, float& norms) const {
    constexpr float minimum = kMinimumNorm * kMinimumNorm;
    norms = 0.0f;
    if (fixed[n] < minimum || warped[n] < minimum) return 0.0f;
    norms = std::sqrt(fixed[n]) * std::sqrt(warped[n]);
    return dot[n] / norms;
  }
};

template <typename T, int D>
struct Inputs {
  Tensor fixed_map, moving_map, displacement_field, mask_map;
  Grid<D> grid;
  int64_t batch, channels;
  const T *fixed, *moving;
  const float *displacement, *mask;

  Inputs(const Tensor& fixed_given, const Tensor& moving_given, const Tensor& displacement_given,
         const Tensor& mask_given)
      : fixed_map(torch::stable::contiguous(fixed_given)),
        moving_map(torch::stable::contiguous(moving_given)),
        displacement_field(torch::stable::contiguous(displacement_given)),
        mask_map(torch::stable::contiguous(mask_given)),
        grid(fixed_map.sizes()),
        batch(fixed_map.size(0)),
        channels(fixed_map.size(1)) {
    STD_TORCH_CHECK(fixed_map.scalar_type() == moving_map.scalar_type() && fixed_map.numel() == moving_map.numel(),
                    "voxtrast: fixed and moving must have one shape and type");
    fixed = fixed_map.template const_data_ptr<T>();
    moving = moving_map.template const_data_ptr<T>();
    displacement = float_data(displacement_field, batch * D * grid.points, "displacement");
    mask = float_data(mask_map, batch * grid.points, "mask");
  }

  void prepare(Block<D>& block, int64_t b, int64_t first) const {
    block.take(grid, first, mask + b * grid.points);
    block.locate(grid, displacement + b * D * grid.points);
  }

  // Warps every channel at the points of a block into warped (channels, kBlock), and sums the products over them.
  void multiply(const Block<D>& block, int64_t b, float* warped, Products& products) const {
    std::fill(products.dot, products.dot + kBlock, 0.0f);
    std::fill(products.fixed, products.fixed + kBlock, 0.0f);
    std::fill(products.warped, products.warped + kBlock, 0.0f);
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t plane = (b * channels + c) * grid.points;
      for (int64_t n = 0; n < block.count; ++n) warped[n] = block.interpolate(moving + plane, n);
      for (int64_t n = 0; n < block.count; ++n) {
        const float here = static_cast<float>(fixed[plane + block.position[n]]);
        products.dot[n] += here * warped[n];
        products.fixed[n] += here * here;
        products.warped[n] += warped[n] * warped[n];
      }
      warped += kBlock;
    }
  }
};

template <typename T, int D>
void forward(const Inputs<T, D>& in, float* loss, float* mask_sum) {
  const auto [sum, total] =
      reduce(in.batch, in.grid.points, in.channels * 8, [&](int64_t b, int64_t first, int64_t last, Partial& partial) {
        Block<D> block;
        Products products;
        std::vector<float> warped(in.channels * kBlock);
        for (; first < last; first += kBlock) {
          in.prepare(block, b, first);
          in.multiply(block, b, warped.data(), products);
          for (int64_t n = 0; n < block.count; ++n) {
            float norms;
            const double weight = in.mask[b * in.grid.points + block.position[n]];
            partial.lane[0] += weight * products.cosine(n, norms);
            partial.weight_lane[0] += weight;
          }
        }
      });
  *loss = static_cast<float>(total == 0.0 ? 0.0 : 1.0 - sum / total);
  *mask_sum = static_cast<float>(total);
}
static_assert(kStretch % kBlock == 0, "a stretch of the sum is a whole number of blocks");

// d loss / d fixed = along * warped - radial_fixed * fixed;  d loss / d warped = along * fixed - radial_warped * warped.
struct Slopes {
  float along, radial_fixed, radial_warped;

  Slopes(const Products& products, int64_t n, float gradient) : along(0), radial_fixed(0), radial_warped(0) {
    float norms;
    const float cosine = products.cosine(n, norms);
    if (norms == 0.0f) return;
    along = gradient / norms;
    radial_fixed = gradient * cosine / products.fixed[n];
    radial_warped = gradient * cosine / products.warped[n];
  }
};

// What belongs to a point alone: gradients of fixed and displacement (null: not needed), and the slopes (2, points)
// per item that the gradient of moving is then spread from (null: not needed). Each block has one writer.
template <typename T, int D>
void backward_points(const Inputs<T, D>& in, float factor, T* grad_fixed, float* grad_displacement, float* slopes) {
  const int64_t blocks = in.grid.blocks(), points = in.grid.points;
  torch::stable::parallel_for(0, in.batch * blocks, grain(kBlock * in.channels), [&](int64_t begin, int64_t end) {
    Block<D> block;
    Products products;
    float along[kBlock], radial_fixed[kBlock], radial_warped[kBlock];
    float product[Block<D>::kCorners][kBlock];
    std::vector<float> warped_maps(in.channels * kBlock);
    for (int64_t item = begin; item < end; ++item) {
      const int64_t b = item / blocks;
      in.prepare(block, b, item % blocks * kBlock);
      in.multiply(block, b, warped_maps.data(), products);
      for (int64_t n = 0; n < block.count; ++n) {
        const int64_t p = block.position[n];
        const Slopes slope(products, n, factor * in.mask[b * points + p]);
        along[n] = slope.along;
        radial_fixed[n] = slope.radial_fixed;
        radial_warped[n] = slope.radial_warped;
        if (slopes != nullptr) {
          slopes[2 * b * points + p] = slope.along;
          slopes[(2 * b + 1) * points + p] = slope.radial_warped;
        }
      }
      std::fill(&product[0][0], &product[0][0] + Block<D>::kCorners * kBlock, 0.0f);
      for (int64_t c = 0; c < in.channels; ++c) {
        const int64_t plane = (b * in.channels + c) * points;
        const float* warped = warped_maps.data() + c * kBlock;
        for (int64_t n = 0; n < block.count; ++n) {
          const int64_t p = plane + block.position[n];
          const float fixed = static_cast<float>(in.fixed[p]);
          if (grad_fixed != nullptr) grad_fixed[p] = static_cast<T>(along[n] * warped[n] - radial_fixed[n] * fixed);
          if (grad_displacement != nullptr)
            block.collect(in.moving + plane, n, along[n] * fixed - radial_warped[n] * warped[n], product);
        }
      }
      if (grad_displacement != nullptr) block.differentiate(in.grid, product, grad_displacement + b * D * points);
    }
  });
}

std::tuple<Tensor, Tensor> warped_cosine_loss(const Tensor& fixed, const Tensor& moving, const Tensor& displacement,
                                              const Tensor& mask, bool) {
  Tensor loss = torch::stable::new_empty(mask, {});
  Tensor mask_sum = torch::stable::new_empty(mask, {});
  with_dimensions(fixed, "fixed", [&](auto dimensions) {
    constexpr int D = decltype(dimensions)::value;
    with_element_type(fixed, "fixed", [&](auto element) {
      const Inputs<decltype(element), D> in(fixed, moving, displacement, mask);
      forward(in, loss.mutable_data_ptr<float>(), mask_sum.mutable_data_ptr<float>());
    });
  });
  return {loss, mask_sum};
}

// Gradients of fixed, moving and displacement; an empty tensor stands for one that is not needed.
std::tuple<Tensor, Tensor, Tensor> warped_cosine_loss_backward(const Tensor& grad_loss, const Tensor& fixed,
                                                               const Tensor& moving, const Tensor& displacement,
                                                               const Tensor& mask, const Tensor& mask_sum,
                                                               bool need_fixed, bool need_moving,
                                                               bool need_displacement, bool) {
  const auto zeros = [](const Tensor& like, bool needed) {
    return needed ? torch::stable::new_zeros(like, like.sizes()) : torch::stable::new_empty(like, {0});
  };
  Tensor grad_fixed = zeros(fixed, need_fixed);
  Tensor grad_moving = zeros(moving, need_moving);
  Tensor grad_displacement = zeros(displacement, need_displacement);
  const float total = *float_data(mask_sum, 1, "mask_sum");
  const float factor = total == 0.0f ? 0.0f : -*float_data(grad_loss, 1, "grad_loss") / total;
  with_dimensions(fixed, "fixed", [&](auto dimensions) {
    constexpr int D = decltype(dimensions)::value;
    with_element_type(fixed, "fixed", [&](auto element) {
      using T = decltype(element);
      const Inputs<T, D> in(fixed, moving, displacement, mask);
      const int64_t points = in.grid.points;
      std::vector<float> slopes(need_moving ? 2 * in.batch * points : 0);
      backward_points(in, factor, need_fixed ? grad_fixed.mutable_data_ptr<T>() : nullptr,
                      need_displacement ? grad_displacement.mutable_data_ptr<float>() : nullptr,
                      need_moving ? slopes.data() : nullptr);
      if (!need_moving) return;
      scatter<T, D>(in.grid, in.batch, in.channels, in.displacement, in.mask, grad_moving.mutable_data_ptr<T>(),
                    [&](const Block<D>& block, int64_t b, int64_t c, float* gradient) {
                      const int64_t plane = (b * in.channels + c) * points;
                      const float* along = slopes.data() + 2 * b * points;
                      const float* radial = along + points;
                      for (int64_t n = 0; n < block.count; ++n) {
                        const int64_t p = block.position[n];
                        gradient[n] = along[p] * static_cast<float>(in.fixed[plane + p]) -
                                      radial[p] * block.interpolate(in.moving + plane, n);
                      }
                    });
    });
  });
  return {grad_fixed, grad_moving, grad_displacement};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(voxtrast, CPU, library) {
  library.impl("warped_cosine_loss", TORCH_BOX(&warped_cosine_loss));
  library.impl("warped_cosine_loss_backward", TORCH_BOX(&warped_cosine_loss_backward));
}

}  // namespace voxtrast
