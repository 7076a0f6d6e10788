// The work on a block of points, written with the vector types of GCC and Clang. Included by warp_points_*.cpp, which
// set VOXTRAST_PATH, the name of what is defined at the end, and the instruction set (target_*.h, which say what may
// stand here).

#include "registers.inl"
#include "elements.inl"
#include "warp_cells.inl"

namespace voxtrast {
namespace {

// Values of the points n .. n + kLanes. A corner without weight is not read into the sum: it may hold an infinity.
template <typename E, int D>
VOXTRAST_INLINE Vector interpolate_lanes(const Volume<D>& volume, const Cells<D>& cells,
                                         const typename E::Storage* plane, int64_t n) {
  Vector sum[2] = {splat(-0.0f), splat(-0.0f)};
#pragma GCC unroll 4
  for (int row = 0; row < 1 << (D - 1); ++row) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const int64_t place = n + half * kPairs;
      const Vector weight = load(cells.weight[row] + 2 * place);
      const Vector value = load_pairs<E>(plane + volume.step[row], cells.base + place, AllPairs{});
      sum[half] = weight * (weight != 0.0f ? value : splat(-0.0f)) + sum[half];
    }
  }
  return unpair<0>(sum[0], sum[1], AllLanes{}) + unpair<1>(sum[0], sum[1], AllLanes{}) + load(cells.start + n);
}

template <typename E, int D>
void interpolate(const Volume<D>& volume, const Cells<D>& cells, const void* plane, const void* next, float* values) {
  const auto* from = static_cast<const typename E::Storage*>(plane);
  const auto* soon = static_cast<const typename E::Storage*>(next);
  for (int64_t n = 0; n < cells.count; n += kLanes) {
    if (!cells.wanted[n / kLanes]) continue;
    prefetch<E>(volume, soon, cells.base + n);
    store(values + n, interpolate_lanes<E>(volume, cells, from, n));
  }
}

template <typename E, int D>
void sample(const Volume<D>& volume, const Cells<D>& cells, const void* plane, const void* next, const float* added,
            void* values) {
  const auto* from = static_cast<const typename E::Storage*>(plane);
  const auto* soon = static_cast<const typename E::Storage*>(next);
  auto* to = static_cast<typename E::Storage*>(values);
  for (int64_t n = 0; n < cells.count; n += kLanes) {
    prefetch<E>(volume, soon, cells.base + n);
    Vector value = interpolate_lanes<E>(volume, cells, from, n);
    if (added != nullptr) value += load_up_to<Float32>(added, n, cells.count);
    store_up_to<E>(to, n, cells.count, value);
  }
}

template <typename E, int D>
void collect(const Volume<D>& volume, const Cells<D>& cells, const void* plane, const void* next, const float* gradient,
             Products<D>& product) {
  const auto* from = static_cast<const typename E::Storage*>(plane);
  const auto* soon = static_cast<const typename E::Storage*>(next);
  for (int64_t n = 0; n < cells.count; n += kLanes) {
    prefetch<E>(volume, soon, cells.base + n);
    const Vector factor = load(gradient + n);
    const Vector factors[2] = {first_pairs(factor, factor, AllLanes{}), last_pairs(factor, factor, AllLanes{})};
#pragma GCC unroll 4
    for (int row = 0; row < 1 << (D - 1); ++row) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const int64_t place = n + half * kPairs;
        float* sum = product[row] + 2 * place;
        const Vector value = load_pairs<E>(from + volume.step[row], cells.base + place, AllPairs{});
        store(sum, factors[half] * value + load(sum));
      }
    }
  }
}

template <int D>
void spread(const Volume<D>& volume, const Cells<D>& cells, const Slab& slab, const float* gradient, float* sums,
            const float* next) {
  constexpr int kRows = 1 << (D - 1);
  typedef float Pair __attribute__((vector_size(8), aligned(4), may_alias));
  alignas(64) float share[kRows][2 * kLanes];
  const int64_t begin = (slab.begin - 1) * volume.stride[0];
  const uint64_t count = (slab.end - slab.begin + 1) * volume.stride[0];
  for (int64_t n = 0; n < cells.count; n += kLanes) {
    if (!cells.wanted[n / kLanes]) continue;
    const Vector factor = load(gradient + n);
    const Vector factors[2] = {first_pairs(factor, factor, AllLanes{}), last_pairs(factor, factor, AllLanes{})};
#pragma GCC unroll 4
    for (int row = 0; row < kRows; ++row) {
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const Vector weight = load(cells.weight[row] + 2 * n + half * kLanes);
        store(share[row] + half * kLanes, weight * (weight != 0.0f ? factors[half] : Vector{}));
      }
    }
    for (int lane = 0; lane < kLanes; ++lane) {
      const uint64_t place = static_cast<uint64_t>(cells.base[n + lane] - begin);
      if (place >= count) continue;
      float* at = sums + 2 * place;
      if (lane % kPrefetched == 0)
#pragma GCC unroll 4
        for (int row = 0; row < kRows; ++row) __builtin_prefetch(next + 2 * place + 2 * volume.step[row], 1);
#pragma GCC unroll 4
      for (int row = 0; row < kRows; ++row)
        *reinterpret_cast<Pair*>(at + 2 * volume.step[row]) += *reinterpret_cast<const Pair*>(share[row] + 2 * lane);
    }
  }
}

template <int D>
void differentiate(const Volume<D>& volume, const float* displacement, const float* mask, const Cells<D>& cells,
                   const Products<D>& product, float* gradient) {
  for (int64_t n = 0; n < cells.count; n += kLanes) {
    Located<D> at;
    const Integers wanted = live(mask == nullptr ? nullptr : mask + cells.first, n, cells.count);
#pragma GCC unroll 3
    for (int axis = 0; axis < D; ++axis) locate_along(volume, displacement, wanted, cells, axis, n, at);
    Vector sum[D] = {};
#pragma GCC unroll 4
    for (int row = 0; row < 1 << (D - 1); ++row) {
      const Vector first = load(product[row] + 2 * n), last = load(product[row] + 2 * n + kLanes);
      const Vector corner[2] = {unpair<0>(first, last, AllLanes{}), unpair<1>(first, last, AllLanes{})};
#pragma GCC unroll 2
      for (int side = 0; side < 2; ++side) {
        const int sides[3] = {D == 2 ? row : row >> 1, D == 2 ? side : row & 1, side};
#pragma GCC unroll 3
        for (int axis = 0; axis < D; ++axis) {
          Vector factor = at.slope[axis][sides[axis]];
#pragma GCC unroll 3
          for (int other = 0; other < D; ++other)
            if (other != axis) factor *= at.weight[other][sides[other]];
          sum[axis] += factor * (factor != 0.0f ? corner[side] : Vector{});
        }
      }
    }
    for (int axis = 0; axis < D; ++axis)
      store_up_to<Float32>(gradient + volume.component[axis] * volume.points + cells.first, n, cells.count, sum[axis]);
  }
}

template <typename E>
void read(const void* from, const float* mask, int64_t count, float* to) {
  const auto* elements = static_cast<const typename E::Storage*>(from);
  for (int64_t n = 0; n < count; n += kLanes) {
    const Vector value = load_up_to<E>(elements, n, count);
    store(to + n, mask == nullptr ? value : live(mask, n, count) ? value : Vector{});
  }
}

template <typename E>
void write_difference(const float* a, const float* x, const float* b, const float* y, int64_t count, void* to) {
  auto* elements = static_cast<typename E::Storage*>(to);
  for (int64_t n = 0; n < count; n += kLanes)
    store_up_to<E>(elements, n, count, load(a + n) * load(x + n) - load(b + n) * load(y + n));
}

template <typename E>
void join(const float* sums, int64_t count, void* to) {
  auto* elements = static_cast<typename E::Storage*>(to);
  for (int64_t n = 0; n < count; n += kLanes) {
    const float* pair = sums + 2 * n;
    // A lane of even number: what the pair gives to its own voxel, and the pair before to the next.
    const Vector first = load(pair) + load(pair - 1), last = load(pair + kLanes) + load(pair + kLanes - 1);
    store_up_to<E>(elements, n, count, unpair<0>(first, last, AllLanes{}));
  }
}

void add_products(const float* fixed, const float* warped, int64_t count, float* dot, float* fixed_norm,
                  float* warped_norm) {
  for (int64_t n = 0; n < count; n += kLanes) {
    const Vector here = load(fixed + n), there = load(warped + n);
    store(dot + n, here * there + load(dot + n));
    store(fixed_norm + n, here * here + load(fixed_norm + n));
    store(warped_norm + n, there * there + load(warped_norm + n));
  }
}

// Shorter vectors have no direction. The same number stands in kernels/warped_cosine_loss.py.
constexpr float kMinimumNorm = 1e-6f;

VOXTRAST_INLINE float cosine_of(float dot, float fixed_norm, float warped_norm, float& norms) {
  constexpr float minimum = kMinimumNorm * kMinimumNorm;
  const bool directed = !(fixed_norm < minimum) & !(warped_norm < minimum);
  norms = __builtin_sqrtf(fixed_norm) * __builtin_sqrtf(warped_norm);
  const float cosine = dot / norms;
  norms = directed ? norms : 0.0f;
  return directed ? cosine : 0.0f;
}

void cosines(const float* dot, const float* fixed_norm, const float* warped_norm, int64_t count, float* cosine) {
  float norms;
  for (int64_t n = 0; n < count; ++n) cosine[n] = cosine_of(dot[n], fixed_norm[n], warped_norm[n], norms);
}

void slopes(const float* dot, const float* fixed_norm, const float* warped_norm, const float* gradient, int64_t count,
            float* along, float* radial_fixed, float* radial_warped) {
  for (int64_t n = 0; n < count; ++n) {
    float norms;
    const float cosine = cosine_of(dot[n], fixed_norm[n], warped_norm[n], norms);
    const float share = gradient[n] / norms;
    const float fixed = gradient[n] * cosine / fixed_norm[n], warped = gradient[n] * cosine / warped_norm[n];
    along[n] = norms == 0.0f ? 0.0f : share;
    radial_fixed[n] = norms == 0.0f ? 0.0f : fixed;
    radial_warped[n] = norms == 0.0f ? 0.0f : warped;
  }
}

#define VOXTRAST_POINTS(D)                                                                  \
  {                                                                                         \
    locate<D>, reach<D>, spread<D>, differentiate<D>, {                                     \
      {interpolate<Float32, D>, sample<Float32, D>, collect<Float32, D>},                   \
          {interpolate<BFloat16, D>, sample<BFloat16, D>, collect<BFloat16, D>},            \
          {interpolate<Float16, D>, sample<Float16, D>, collect<Float16, D>},               \
    }                                                                                       \
  }

}  // namespace

const WarpPath VOXTRAST_PATH = {
    VOXTRAST_POINTS(2),
    VOXTRAST_POINTS(3),
    {{read<Float32>, write_difference<Float32>, join<Float32>},
     {read<BFloat16>, write_difference<BFloat16>, join<BFloat16>},
     {read<Float16>, write_difference<Float16>, join<Float16>}},
    add_products,
    cosines,
    slopes,
};

}  // namespace voxtrast
