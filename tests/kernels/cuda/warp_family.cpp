// The kernels of the warp family, and how they are launched, on the CPU.
#include "emulation.h"

#include "cuda/vector_regression_loss.cuh"
#include "cuda/warped_cosine_loss.cuh"

namespace {

using namespace voxtrast;

const emulation::Launch launch;

// B, C, then D or H, W of a tensor
struct Shape {
  const int64_t* sizes;
  int64_t axes;

  int64_t batch() const { return sizes[0]; }
  int64_t channels() const { return sizes[1]; }
  template <int D>
  Volume<D> volume() const {
    Volume<D> volume{{}, 1};
    for (int axis = 0; axis < D; ++axis) {
      volume.size[axis] = static_cast<int32_t>(sizes[axis + 2]);
      volume.points *= static_cast<uint32_t>(sizes[axis + 2]);
    }
    return volume;
  }

  // Calls work(T(), volume) with the element type and the number of axes at hand.
  template <class Work>
  const char* with(int64_t type, const Work& work) const {
    return emulation::report([&] {
      const auto typed = [&](auto element) {
        if (axes == 4) return work(element, volume<2>());
        work(element, volume<3>());
      };
      if (type == 0) return typed(float());
      if (type == 1) return typed(__nv_bfloat16());
      typed(__half());
    });
  }
};

template <typename T>
const T* as(const void* data) {
  return static_cast<const T*>(data);
}

template <typename T>
T* as(void* data) {
  return static_cast<T*>(data);
}

}  // namespace

extern "C" {

const char* warp(const void* image, const float* displacement, void* output, const int64_t* sizes, int64_t axes,
                 int64_t type) {
  const Shape shape{sizes, axes};
  return shape.with(type, [&](auto element, const auto& volume) {
    using T = decltype(element);
    run_sample<T, sizeof volume.size / 4, false>(volume, shape.batch(), shape.channels(), as<T>(image), displacement,
                                                 as<T>(output), launch);
  });
}

const char* compose_displacement(const float* outer, const float* inner, float* output, const int64_t* sizes,
                                 int64_t axes) {
  const Shape shape{sizes, axes};
  return shape.with(0, [&](auto, const auto& volume) {
    run_sample<float, sizeof volume.size / 4, true>(volume, shape.batch(), shape.channels(), outer, inner, output,
                                                    launch);
  });
}

const char* differentiate_displacement(const void* gradient, const void* image, const float* displacement,
                                       float* grad_displacement, const int64_t* sizes, int64_t axes, int64_t type) {
  const Shape shape{sizes, axes};
  return shape.with(type, [&](auto element, const auto& volume) {
    using T = decltype(element);
    run_differentiate_displacement(volume, shape.batch(), shape.channels(), as<T>(gradient), as<T>(image),
                                   displacement, grad_displacement, launch);
  });
}

const char* differentiate_image(const void* gradient, const float* displacement, void* grad_image, uint32_t* words,
                                float* sums, const int64_t* sizes, int64_t axes, int64_t type, int64_t deterministic) {
  const Shape shape{sizes, axes};
  return shape.with(type, [&](auto element, const auto& volume) {
    using T = decltype(element);
    const int64_t batch = shape.batch(), channels = shape.channels();
    if (!deterministic)
      return run_scatter(volume, batch, channels, StoredGradient<T>{as<T>(gradient)}, displacement,
                         static_cast<const float*>(nullptr), sums, as<T>(grad_image), launch);
    const auto lists = lists_in(volume, batch, words);
    run_sort_points(lists, batch, displacement, nullptr, launch);
    run_gather(lists, batch, channels, channels, as<T>(gradient), displacement, as<T>(grad_image), launch);
  });
}

// 32-bit words of scratch memory
int64_t count_words(const int64_t* sizes, int64_t axes) {
  const Shape shape{sizes, axes};
  if (axes == 4) return words_of_lists(shape.volume<2>(), shape.batch());
  return words_of_lists(shape.volume<3>(), shape.batch());
}

const char* vector_regression_loss(const float* prediction, const float* target, const float* mask, float* loss,
                                   float* mask_sum, double* partials, int64_t batch, int64_t components,
                                   int64_t points) {
  return emulation::report([=] {
    const Fields fields{batch, components, points, prediction, target, mask};
    run_vector_regression_loss(fields, reinterpret_cast<Partial*>(partials), loss, mask_sum, launch);
  });
}

const char* vector_regression_loss_backward(const float* grad_loss, const float* prediction, const float* target,
                                            const float* mask, const float* mask_sum, float* gradient, int64_t batch,
                                            int64_t components, int64_t points) {
  return emulation::report([=] {
    const Fields fields{batch, components, points, prediction, target, mask};
    run_vector_regression_loss_backward(fields, grad_loss, mask_sum, gradient, launch);
  });
}

int64_t count_partials(int64_t batch, int64_t points) { return partials_of(batch, points); }

const char* warped_cosine_loss(const void* fixed, const void* moving, const float* displacement, const float* mask,
                               float* loss, float* mask_sum, double* partials, const int64_t* sizes, int64_t axes,
                               int64_t type) {
  const Shape shape{sizes, axes};
  return shape.with(type, [&](auto element, const auto& volume) {
    using T = decltype(element);
    const Maps<T, sizeof volume.size / 4> maps{volume, shape.batch(), int32_t(shape.channels()), as<T>(fixed),
                                               as<T>(moving), displacement, mask};
    run_warped_cosine_loss(maps, reinterpret_cast<Partial*>(partials), loss, mask_sum, launch);
  });
}

// Gradients that are not needed are null.
const char* warped_cosine_loss_backward(const float* grad_loss, const void* fixed, const void* moving,
                                        const float* displacement, const float* mask, const float* mask_sum,
                                        void* grad_fixed, void* grad_moving, float* grad_displacement, float* slopes,
                                        uint32_t* words, float* stored, float* sums, const int64_t* sizes, int64_t axes,
                                        int64_t type, int64_t deterministic) {
  const Shape shape{sizes, axes};
  return shape.with(type, [&](auto element, const auto& volume) {
    using T = decltype(element);
    const int64_t batch = shape.batch(), channels = shape.channels();
    const Maps<T, sizeof volume.size / 4> maps{volume, batch, int32_t(channels), as<T>(fixed), as<T>(moving),
                                               displacement, mask};
    auto* pairs = reinterpret_cast<float2*>(slopes);
    run_differentiate_cosines(
        maps, CosineGradients<T>{grad_loss, mask_sum, as<T>(grad_fixed), grad_displacement, pairs}, launch);
    if (grad_moving == nullptr) return;
    if (!deterministic) {
      const CosineSlopes<T> source{maps.fixed, maps.moving, pairs, {}};
      return run_scatter(volume, batch, channels, source, displacement, mask, sums, as<T>(grad_moving), launch);
    }
    const auto lists = lists_in(volume, batch, words);
    run_sort_points(lists, batch, displacement, mask, launch);
    run_gather_cosines(maps, lists, pairs, stored, as<T>(grad_moving), launch);
  });
}
}
