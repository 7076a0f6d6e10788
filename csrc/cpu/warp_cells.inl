// Where the points of a block land: cells, weights, and the part of the volume that they reach. Included by
// warp_points.inl, which says what may stand here.

namespace voxtrast {
namespace {

constexpr int kPairs = kLanes / 2;  // of a vector
constexpr int kPrefetched = kLanes < 8 ? kLanes : 8;  // points that may share a line of the cache
constexpr float kFarthest = 1073741824.0f;
typedef LanesUpTo<kPairs>::Type AllPairs;

template <int... From>
VOXTRAST_INLINE Vector pick(Vector one, Vector other) {
#if defined(__clang__)
  return __builtin_shufflevector(one, other, From...);
#else
  return __builtin_shuffle(one, other, Integers{From...});
#endif
}

typedef Integers UnalignedIntegers __attribute__((aligned(4), may_alias));

// Numbers of points to both halves of their pairs, and back.
template <int... Lane>
VOXTRAST_INLINE Vector first_pairs(Vector one, Vector other, Lanes<Lane...>) {
  return pick<(Lane / 2 + (Lane & 1) * kLanes)...>(one, other);
}
template <int... Lane>
VOXTRAST_INLINE Vector last_pairs(Vector one, Vector other, Lanes<Lane...>) {
  return pick<(kPairs + Lane / 2 + (Lane & 1) * kLanes)...>(one, other);
}
template <int Side, int... Lane>
VOXTRAST_INLINE Vector unpair(Vector first, Vector last, Lanes<Lane...>) {
  return pick<(2 * Lane + Side)...>(first, last);
}

// The pairs of elements at plane + base[0], plane + base[1] ...
typedef double Loose64 __attribute__((aligned(4), may_alias));
typedef int32_t Loose32 __attribute__((aligned(2), may_alias));
typedef int32_t HalfIntegers __attribute__((vector_size(kLanes * 2), may_alias));
typedef int64_t Longs __attribute__((vector_size(kLanes * 4)));
typedef Longs UnalignedLongs __attribute__((aligned(8), may_alias));

template <typename E, int... Pair>
VOXTRAST_INLINE Vector load_pairs(const typename E::Storage* plane, const int64_t* base, Lanes<Pair...>) {
  if constexpr (sizeof(typename E::Storage) == 4) {
    return reinterpret_cast<Vector>(Doubles{*reinterpret_cast<const Loose64*>(plane + base[Pair])...});
  } else {
    const HalfIntegers pairs = {*reinterpret_cast<const Loose32*>(plane + base[Pair])...};
    return E::widen(reinterpret_cast<Shorts>(pairs));
  }
}

// What the same points read in the next plane comes to the cache meanwhile: a plane is too long, and the cells of a row
// too scattered, for the processor to foresee it.
template <typename E, int D>
VOXTRAST_INLINE void prefetch(const Volume<D>& volume, const typename E::Storage* next, const int64_t* base) {
#pragma GCC unroll 4
  for (int row = 0; row < 1 << (D - 1); ++row)
#pragma GCC unroll 4
    for (int lane = 0; lane < kLanes; lane += kPrefetched) __builtin_prefetch(next + base[lane] + volume.step[row]);
}

// The cells of as many points as a vector holds. Along each axis, for the lower and the upper corner: the weight and
// its derivative.
template <int D>
struct Located {
  Integers base[D];
  Vector weight[D][2], slope[D][2];
};

// First to last live point of a block, -1 or 0 in each lane.
VOXTRAST_INLINE Integers live(const float* mask, int64_t n, int64_t count) {
  const Integers within = lane_numbers() < static_cast<int32_t>(smaller(count - n, kLanes));
  if (mask == nullptr) return within;
  return within & (load_up_to<Float32>(mask, n, count) != 0.0f);
}

VOXTRAST_INLINE bool any(Integers lanes) {
  const Longs halves = reinterpret_cast<Longs>(lanes);
  int64_t found = 0;
#pragma GCC unroll 8
  for (int lane = 0; lane < kPairs; ++lane) found |= halves[lane];
  return found != 0;
}

struct Split {
  Integers whole, usable;
  Vector fraction;
};

// False for NaN, infinities and whatever int32 cannot hold.
VOXTRAST_INLINE Split split(Vector given, Integers usable) {
  usable = usable & (given > -kFarthest) & (given < kFarthest);
  const Vector shift = usable ? given : Vector{};
  Integers whole = __builtin_convertvector(shift, Integers);
  whole += __builtin_convertvector(whole, Vector) > shift;
  return {whole, usable, shift - __builtin_convertvector(whole, Vector)};
}

VOXTRAST_INLINE Integers clamp(Integers value, int32_t low, int32_t high) {
  value = value < low ? Integers{} + low : value;
  return value > high ? Integers{} + high : value;
}

template <int D>
VOXTRAST_INLINE void locate_along(const Volume<D>& volume, const float* displacement, Integers wanted,
                                  const Cells<D>& cells, int axis, int64_t n, Located<D>& at) {
  const float* component = displacement + volume.component[axis] * volume.points + cells.first;
  const auto [whole, usable, fraction] = split(load_up_to<Float32>(component, n, cells.count), wanted);
  const Integers here = *reinterpret_cast<const UnalignedIntegers*>(cells.coordinate[axis] + n);
  const Integers lower = here + whole;
  const int32_t size = static_cast<int32_t>(volume.size[axis]);
  const Integers base = clamp(lower, 0, size > 1 ? size - 2 : 0);
  // The cell itself, or the one before or after it: then one of the corners is inside.
  const Integers same = (lower == base) & usable, before = (lower + 1 == base) & usable;
  const Integers wide = Integers{} - static_cast<int32_t>(size > 1);
  const Integers after = (lower - 1 == base) & usable & wide, upper = same & wide;
  const Vector rest = 1.0f - fraction, zero = {};
  at.base[axis] = base;
  at.weight[axis][0] = same ? rest : before ? fraction : zero;
  at.weight[axis][1] = upper ? fraction : after ? rest : zero;
  at.slope[axis][0] = same ? splat(-1.0f) : before ? splat(1.0f) : zero;
  at.slope[axis][1] = upper ? splat(1.0f) : after ? splat(-1.0f) : zero;
}

template <int D>
VOXTRAST_INLINE void take(const Volume<D>& volume, int64_t first, Cells<D>& cells) {
  cells.first = first;
  cells.count = smaller(kBlock, volume.points - first);
  int64_t here[D];
  for (int axis = 0; axis < D; ++axis) here[axis] = first / volume.stride[axis] % volume.size[axis];
  const int64_t padded = (cells.count + kLanes - 1) / kLanes * kLanes;
  for (int64_t n = 0; n < padded;) {
    const int64_t end = smaller(padded, n + volume.size[D - 1] - here[D - 1]);
    const int32_t begin = static_cast<int32_t>(here[D - 1] - n);
    for (int64_t i = n; i < end; ++i) cells.coordinate[D - 1][i] = begin + static_cast<int32_t>(i);
    for (int axis = 0; axis < D - 1; ++axis) {
      const int32_t value = static_cast<int32_t>(here[axis]);
      for (int64_t i = n; i < end; ++i) cells.coordinate[axis][i] = value;
    }
    n = end;
    here[D - 1] = 0;
    for (int axis = D - 2; axis >= 0 && ++here[axis] == volume.size[axis]; --axis) here[axis] = 0;
  }
}

template <int D>
VOXTRAST_INLINE void store_base(const Volume<D>& volume, const Integers (&base)[D], int64_t* to) {
  if (volume.points < (int64_t(1) << 31)) {
    Integers sum = base[D - 1];
#pragma GCC unroll 2
    for (int axis = 0; axis < D - 1; ++axis) sum += base[axis] * static_cast<int32_t>(volume.stride[axis]);
    // By halves: of a whole vector the compiler would take one lane after the other.
    const auto [low, high] = *reinterpret_cast<const HalfIntegers(*)[2]>(&sum);
    *reinterpret_cast<UnalignedLongs*>(to) = __builtin_convertvector(low, Longs);
    *reinterpret_cast<UnalignedLongs*>(to + kPairs) = __builtin_convertvector(high, Longs);
    return;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    to[lane] = 0;
    for (int axis = 0; axis < D; ++axis) to[lane] += base[axis][lane] * volume.stride[axis];
  }
}

template <int D>
VOXTRAST_INLINE void store_weights(const Located<D>& at, int64_t n, Cells<D>& cells) {
  Vector all = {};
#pragma GCC unroll 4
  for (int row = 0; row < 1 << (D - 1); ++row) {
    Vector share = at.weight[0][D == 2 ? row : row >> 1];
    if constexpr (D == 3) share *= at.weight[1][row & 1];
    const Vector first = share * at.weight[D - 1][0], second = share * at.weight[D - 1][1];
    all += first + second;
    store(cells.weight[row] + 2 * n, first_pairs(first, second, AllLanes{}));
    store(cells.weight[row] + 2 * n + kLanes, last_pairs(first, second, AllLanes{}));
  }
  store(cells.start + n, all != 0.0f ? splat(-0.0f) : Vector{});
}

template <int D>
void locate(const Volume<D>& volume, const float* displacement, const float* mask, const Slab& slab, int64_t first,
            Cells<D>& cells) {
  take(volume, first, cells);
  const float* weights = mask == nullptr ? nullptr : mask + first;
  const int32_t begin = static_cast<int32_t>(slab.begin) - 1, end = static_cast<int32_t>(slab.end);
  for (int64_t n = 0; n < cells.count; n += kLanes) {
    Located<D> at;
    const Integers wanted = live(weights, n, cells.count);
    locate_along(volume, displacement, wanted, cells, 0, n, at);
    cells.wanted[n / kLanes] = any((at.base[0] >= begin) & (at.base[0] < end));
    if (!cells.wanted[n / kLanes]) continue;
#pragma GCC unroll 2
    for (int axis = 1; axis < D; ++axis) locate_along(volume, displacement, wanted, cells, axis, n, at);
    store_base(volume, at.base, cells.base + n);
    store_weights(at, n, cells);
  }
}

template <int D>
void reach(const Volume<D>& volume, const float* displacement, const float* mask, int64_t first, int32_t* low,
           int32_t* high) {
  const int64_t count = smaller(kBlock, volume.points - first);
  const float* component = displacement + volume.component[0] * volume.points + first;
  const int32_t size = static_cast<int32_t>(volume.size[0]);
  Integers least = Integers{} + size, most = Integers{} - 1;
  for (int64_t n = 0; n < count;) {
    // Points that share the coordinate along the first axis.
    const int64_t here = (first + n) / volume.stride[0];
    const int64_t end = smaller(count, (here + 1) * volume.stride[0] - first);
    for (; n < end; n += kLanes) {
      const Integers wanted = live(mask == nullptr ? nullptr : mask + first, n, end);
      const auto [whole, usable, fraction] = split(load_up_to<Float32>(component, n, end), wanted);
      const Integers lower = whole + static_cast<int32_t>(here);
      const Integers counts = usable & (lower >= -1) & (lower < size);
      const Integers begin = clamp(lower, 0, size - 1), last = clamp(lower + 1, 0, size - 1);
      least = counts & (begin < least) ? begin : least;
      most = counts & (last > most) ? last : most;
    }
    n = end;
  }
  *low = least[0];
  *high = most[0];
  for (int lane = 1; lane < kLanes; ++lane) {
    if (least[lane] < *low) *low = least[lane];
    if (most[lane] > *high) *high = most[lane];
  }
}

}  // namespace
}  // namespace voxtrast
