// voxtrast::warped_cosine_loss and its gradients on the CPU. What is computed: kernels/warped_cosine_loss.py.
//
// The warped map exists for one block of points at a time, in the forward and in the backward pass. A point without
// weight is dropped before anything of it is read.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <memory>
#include <tuple>
#include <vector>

#include "reduction.h"
#include "warp.h"

namespace voxtrast {
namespace {

using torch::stable::Tensor;

// Dot product and squared norms of the two vectors of every point of a block.
struct Sums {
  float dot[kBlock], fixed[kBlock], warped[kBlock];
};

template <typename T, int D>
struct Inputs {
  Tensor fixed_map, moving_map, displacement_field, mask_map;
  Volume<D> volume;
  int64_t batch, channels;
  const T *fixed, *moving;
  const float *displacement, *mask;

  Inputs(const Tensor& fixed_given, const Tensor& moving_given, const Tensor& displacement_given,
         const Tensor& mask_given)
      : fixed_map(torch::stable::contiguous(fixed_given)),
        moving_map(readable_in_pairs(moving_given)),
        displacement_field(torch::stable::contiguous(displacement_given)),
        mask_map(torch::stable::contiguous(mask_given)),
        volume(make_volume<D>(fixed_map.sizes())),
        batch(fixed_map.size(0)),
        channels(fixed_map.size(1)) {
    STD_TORCH_CHECK(fixed_map.scalar_type() == moving_map.scalar_type() && fixed_map.numel() == moving_given.numel(),
                    "voxtrast: fixed and moving must have one shape and type");
    fixed = fixed_map.template const_data_ptr<T>();
    moving = moving_map.template const_data_ptr<T>();
    displacement = float_data(displacement_field, batch * D * volume.points, "displacement");
    mask = float_data(mask_map, batch * volume.points, "mask");
  }

  const float* mask_of(int64_t b) const { return mask + b * volume.points; }
  const float* displacement_of(int64_t b) const { return displacement + b * D * volume.points; }

  const T* plane_of_moving(int64_t b, int64_t c) const { return moving + (b * channels + c) * volume.points; }
  const T* next_of_moving(int64_t b, int64_t c) const { return plane_of_moving(b, c + 1 < channels ? c + 1 : c); }

  // Whether any point of a block has weight.
  bool counts(int64_t b, int64_t first) const {
    const float *weight = mask_of(b) + first, *end = mask_of(b) + std::min(first + kBlock, volume.points);
    return std::any_of(weight, end, [](float value) { return value != 0.0f; });
  }

  void locate(int64_t b, int64_t first, Cells<D>& cells) const {
    point_path<D>().locate(volume, displacement_of(b), mask_of(b), whole(volume), first, cells);
  }

  void read_fixed(const Cells<D>& cells, int64_t b, int64_t c, float* to) const {
    const T* from = fixed + (b * channels + c) * volume.points + cells.first;
    warp_path().of[kElement<T>].read(from, mask_of(b) + cells.first, cells.count, to);
  }

  void warp_moving(const Cells<D>& cells, int64_t b, int64_t c, float* to) const {
    point_path<D>().of[kElement<T>].interpolate(volume, cells, plane_of_moving(b, c), next_of_moving(b, c), to);
  }

  // Warps every channel at the points of a block into warped, each `step` floats after the one before, and sums the
  // products over them.
  void multiply(const Cells<D>& cells, int64_t b, float* warped, int64_t step, Sums& sums) const {
    float here[kBlock];
    std::memset(&sums, 0, sizeof(sums));
    for (int64_t c = 0; c < channels; ++c, warped += step) {
      warp_moving(cells, b, c, warped);
      read_fixed(cells, b, c, here);
      warp_path().add_products(here, warped, cells.count, sums.dot, sums.fixed, sums.warped);
    }
  }
};

template <typename T, int D>
void forward(const Inputs<T, D>& in, float* loss, float* mask_sum) {
  const auto work = [&](int64_t b, int64_t first, int64_t last, Partial& partial) {
    Cells<D> cells;
    Sums sums;
    float warped[kBlock], cosine[kBlock];
    for (; first < last; first += kBlock) {
      if (!in.counts(b, first)) continue;
      in.locate(b, first, cells);
      in.multiply(cells, b, warped, 0, sums);
      warp_path().cosines(sums.dot, sums.fixed, sums.warped, cells.count, cosine);
      for (int64_t n = 0; n < cells.count; ++n) {
        const double weight = in.mask_of(b)[first + n];
        partial.lane[n % kLanes] += weight * cosine[n];
        partial.weight_lane[n % kLanes] += weight;
      }
    }
  };
  const auto [sum, total] = reduce(in.batch, in.volume.points, in.channels * 8, work);
  *loss = static_cast<float>(total == 0.0 ? 0.0 : 1.0 - sum / total);
  *mask_sum = static_cast<float>(total);
}
static_assert(kStretch % kBlock == 0, "a stretch of the sum is a whole number of blocks");

// What is needed of the gradients; null for none. slopes: (B, 2, points), `along` and `radial_warped` of every point,
// which the gradient of moving is then spread from.
template <typename T>
struct Gradients {
  T* fixed;
  float *displacement, *slopes;
};

// The gradients at the points of a block. Nobody else writes them.
template <typename T, int D>
class PointGradients {
 public:
  PointGradients(const Inputs<T, D>& in, float factor, const Gradients<T>& to)
      : in_(in), factor_(factor), to_(to), warped_(in.channels * kBlock) {}

  void compute(int64_t b, int64_t first) {
    const int64_t points = in_.volume.points, count = std::min(kBlock, points - first);
    if (!in_.counts(b, first)) return clear(b, first, count);
    in_.locate(b, first, cells_);
    in_.multiply(cells_, b, warped_.data(), kBlock, sums_);
    for (int64_t n = 0; n < count; ++n) here_[n] = factor_ * in_.mask_of(b)[first + n];
    warp_path().slopes(sums_.dot, sums_.fixed, sums_.warped, here_, count, along_, radial_fixed_, radial_warped_);
    if (to_.slopes != nullptr) {
      std::copy(along_, along_ + count, to_.slopes + 2 * b * points + first);
      std::copy(radial_warped_, radial_warped_ + count, to_.slopes + (2 * b + 1) * points + first);
    }
    if (to_.fixed == nullptr && to_.displacement == nullptr) return;
    if (to_.displacement != nullptr) std::memset(product_, 0, sizeof(product_));
    for (int64_t c = 0; c < in_.channels; ++c) pass_on(b, c);
    if (to_.displacement != nullptr)
      point_path<D>().differentiate(in_.volume, in_.displacement_of(b), in_.mask_of(b), cells_, product_,
                                    to_.displacement + b * D * points);
  }

 private:
  void pass_on(int64_t b, int64_t c) {
    const int64_t plane = (b * in_.channels + c) * in_.volume.points;
    const float* warped = warped_.data() + c * kBlock;
    in_.read_fixed(cells_, b, c, here_);
    if (to_.fixed != nullptr)
      warp_path().of[kElement<T>].write_difference(along_, warped, radial_fixed_, here_, cells_.count,
                                                   to_.fixed + plane + cells_.first);
    if (to_.displacement == nullptr) return;
    warp_path().of[kElement<float>].write_difference(along_, here_, radial_warped_, warped, cells_.count, gradient_);
    point_path<D>().of[kElement<T>].collect(in_.volume, cells_, in_.plane_of_moving(b, c), in_.next_of_moving(b, c),
                                            gradient_, product_);
  }

  void clear(int64_t b, int64_t first, int64_t count) {
    const int64_t points = in_.volume.points;
    const auto fill = [&](auto* to, int64_t planes) {
      if (to == nullptr) return;
      for (int64_t plane = b * planes; plane < (b + 1) * planes; ++plane)
        std::fill_n(to + plane * points + first, count, 0.0f);
    };
    fill(to_.fixed, in_.channels);
    fill(to_.displacement, D);
    fill(to_.slopes, 2);
  }

  const Inputs<T, D>& in_;
  const float factor_;
  const Gradients<T> to_;
  Cells<D> cells_;
  Sums sums_;
  Products<D> product_;
  float along_[kBlock], radial_fixed_[kBlock], radial_warped_[kBlock];
  float here_[kBlock], gradient_[kBlock] = {};
  std::vector<float> warped_;
};

template <typename T, int D>
void backward_points(const Inputs<T, D>& in, float factor, const Gradients<T>& to) {
  const int64_t count = blocks(in.volume);
  torch::stable::parallel_for(0, in.batch * count, grain(kBlock * in.channels), [&](int64_t begin, int64_t end) {
    const auto gradients = std::make_unique<PointGradients<T, D>>(in, factor, to);
    for (int64_t item = begin; item < end; ++item) gradients->compute(item / count, item % count * kBlock);
  });
}

template <typename T, int D>
void backward_moving(const Inputs<T, D>& in, const float* slopes, T* grad_moving) {
  const int64_t points = in.volume.points;
  scatter<T, D>(in.volume, in.batch, in.channels, in.displacement, in.mask, grad_moving,
                      [&](const Cells<D>& cells, int64_t b, int64_t c, float* gradient) {
                        float here[kBlock], warped[kBlock];
                        const float* along = slopes + 2 * b * points + cells.first;
                        in.read_fixed(cells, b, c, here);
                        in.warp_moving(cells, b, c, warped);
                        warp_path().of[kElement<float>].write_difference(along, here, along + points, warped,
                                                                         cells.count, gradient);
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
  Tensor grad_fixed = new_result(fixed, need_fixed);
  Tensor grad_moving = new_result(moving, need_moving);
  Tensor grad_displacement = new_result(displacement, need_displacement);
  const float total = *float_data(mask_sum, 1, "mask_sum");
  const float factor = total == 0.0f ? 0.0f : -*float_data(grad_loss, 1, "grad_loss") / total;
  with_dimensions(fixed, "fixed", [&](auto dimensions) {
    constexpr int D = decltype(dimensions)::value;
    with_element_type(fixed, "fixed", [&](auto element) {
      using T = decltype(element);
      const Inputs<T, D> in(fixed, moving, displacement, mask);
      std::vector<float> slopes(need_moving ? 2 * in.batch * in.volume.points : 0);
      backward_points<T, D>(in, factor,
                            {need_fixed ? grad_fixed.mutable_data_ptr<T>() : nullptr,
                             need_displacement ? grad_displacement.mutable_data_ptr<float>() : nullptr,
                             need_moving ? slopes.data() : nullptr});
      if (need_moving) backward_moving(in, slopes.data(), grad_moving.mutable_data_ptr<T>());
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
