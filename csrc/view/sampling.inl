// Voxels of a row from the region, and its displacements. Included by row_path.inl.
//
// Coordinates: where each vector of voxels starts is computed in double and split into a whole number and a rest below 1;
// float32 counts from there, so that its error does not grow with the coordinate.

namespace voxtrast {
namespace {

struct Coordinates {
  Integers whole;   // the voxel below
  Vector fraction;  // from it to the next
};

VOXTRAST_INLINE double floor_double(double x) {
  const double whole = static_cast<double>(static_cast<int64_t>(x));
  return whole > x ? whole - 1.0 : whole;
}

VOXTRAST_INLINE Coordinates split_floor(Vector x) {
  Integers whole = __builtin_convertvector(x, Integers);
  whole += __builtin_convertvector(whole, Vector) > x;  // a true comparison is -1
  return {whole, x - __builtin_convertvector(whole, Vector)};
}

// Of the voxels w .. w + kLanes. `shifted` is half a voxel for the nearest one.
VOXTRAST_INLINE Coordinates locate(const SampledRow& row, int axis, int64_t w, Vector along_row, double shifted) {
  const double start = row.start[axis] + static_cast<double>(w) * row.step[axis] + shifted;
  const double whole = floor_double(start);
  Coordinates at = split_floor(static_cast<float>(start - whole) + along_row + load(row.shift[axis] + w));
  at.whole += static_cast<int32_t>(whole);
  return at;
}

typedef double Loose64 __attribute__((aligned(4), may_alias));
typedef int32_t Loose32 __attribute__((aligned(2), may_alias));
typedef int32_t HalfIntegers __attribute__((vector_size(kLanes * 2), may_alias));
typedef LanesUpTo<kLanes / 2>::Type Pairs;

// The pairs of neighbouring voxels at from + place[0], from + place[1] ...: half as many as there are lanes.
template <typename E, int... Pair>
VOXTRAST_INLINE Vector load_pairs(const typename E::Storage* from, const int32_t* place, Lanes<Pair...>) {
  if constexpr (sizeof(typename E::Storage) == 4) {
    return reinterpret_cast<Vector>(Doubles{*reinterpret_cast<const Loose64*>(from + place[Pair])...});
  } else {
    const HalfIntegers pairs = {*reinterpret_cast<const Loose32*>(from + place[Pair])...};
    return E::widen(reinterpret_cast<Shorts>(pairs));
  }
}

// Each lane of the first half, or of the second, twice; and of pairs the first numbers, or the second ones.
template <int First, int... Lane>
VOXTRAST_INLINE Vector twice(Vector value, Lanes<Lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(value, value, (First + Lane / 2)...);
#else
  return __builtin_shuffle(value, Integers{(First + Lane / 2)...});
#endif
}

template <int Side, int... Lane>
VOXTRAST_INLINE Vector of_pairs(Vector one, Vector other, Lanes<Lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(one, other, (2 * Lane + Side)...);
#else
  return __builtin_shuffle(one, other, Integers{(2 * Lane + Side)...});
#endif
}

VOXTRAST_INLINE Vector between(Vector low, Vector high, Vector fraction) { return low + fraction * (high - low); }

template <typename E>
struct Source {
  const typename E::Storage* voxels;
  int32_t row, plane;  // voxels from one to the next
  int64_t ahead;       // to about where the same voxel of the view's next plane is read
  int32_t next_plane;  // the same; 0 in a region of a single plane, where the fraction is 0 or the voxel at the border
};

// Of eight voxels all of which lie in the region. The two of a pair are worked on side by side to the end.
template <typename E>
VOXTRAST_INLINE Vector interpolate(const Source<E>& source, const Coordinates (&at)[3]) {
  alignas(64) int32_t place[kLanes];
  const Integers places = at[0].whole * source.plane + at[1].whole * source.row + at[2].whole;
  __builtin_memcpy(place, &places, sizeof(place));
  // The next plane's rows come to the cache meanwhile: they are too scattered for the processor to foresee.
#pragma GCC unroll 4
  for (int lane = 0; lane < kLanes; lane += 4) {
    __builtin_prefetch(source.voxels + place[lane] + source.ahead);
    __builtin_prefetch(source.voxels + place[lane] + source.ahead + source.next_plane);
  }
  const auto half = [&](const int32_t* here, Vector depth, Vector height) {
    const auto pairs = [&](int32_t offset) { return load_pairs<E>(source.voxels + offset, here, Pairs{}); };
    const Vector front = between(pairs(0), pairs(source.row), height);
    const Vector back = between(pairs(source.next_plane), pairs(source.next_plane + source.row), height);
    return between(front, back, depth);
  };
  const Vector first =
      half(place, twice<0>(at[0].fraction, AllLanes{}), twice<0>(at[1].fraction, AllLanes{}));
  const Vector second = half(place + kLanes / 2, twice<kLanes / 2>(at[0].fraction, AllLanes{}),
                             twice<kLanes / 2>(at[1].fraction, AllLanes{}));
  return between(of_pairs<0>(first, second, AllLanes{}), of_pairs<1>(first, second, AllLanes{}), at[2].fraction);
}

template <typename E, int... Lane>
VOXTRAST_INLINE Vector load_lanes(const typename E::Storage* from, Integers places, Lanes<Lane...>) {
  int32_t place[kLanes];
  __builtin_memcpy(place, &places, sizeof(place));
  if constexpr (sizeof(typename E::Storage) == 4) return Vector{from[place[Lane]]...};
  else return E::widen(Shorts{from[place[Lane]]...});
}

// The same where some of the eight may lie outside: the first voxel of the axis is read in their stead.
template <typename E>
VOXTRAST_INLINE Vector interpolate_at_border(const SampledRow& row, const Source<E>& source,
                                             const Coordinates (&at)[3]) {
  const int32_t stride[3] = {source.plane, source.row, 1};
  Integers inside[3][2], place[3][2];
#pragma GCC unroll 3
  for (int axis = 0; axis < 3; ++axis)
#pragma GCC unroll 2
    for (int side = 0; side < 2; ++side) {
      const Integers index = at[axis].whole + side;
      inside[axis][side] = (index >= 0) & (index < row.size[axis]);
      place[axis][side] = (index & inside[axis][side]) * stride[axis];
    }
  const Vector background = splat(row.background);
  const auto voxel = [&](int d, int h, int w) {
    const Vector value = load_lanes<E>(source.voxels, place[0][d] + place[1][h] + place[2][w], AllLanes{});
    return inside[0][d] & inside[1][h] & inside[2][w] ? value : background;
  };
  Vector column[2];
#pragma GCC unroll 2
  for (int w = 0; w < 2; ++w) {
    const Vector front = between(voxel(0, 0, w), voxel(0, 1, w), at[1].fraction);
    const Vector back = between(voxel(1, 0, w), voxel(1, 1, w), at[1].fraction);
    column[w] = between(front, back, at[0].fraction);
  }
  return between(column[0], column[1], at[2].fraction);
}

template <typename E>
VOXTRAST_INLINE Vector nearest(const SampledRow& row, const Source<E>& source, const Coordinates (&at)[3],
                               Integers outside) {
  const Integers places = at[0].whole * source.plane + at[1].whole * source.row + at[2].whole;
  const Vector value = load_lanes<E>(source.voxels, places & ~outside, AllLanes{});
  return outside ? splat(row.background) : value;
}

VOXTRAST_INLINE Integers beyond(Integers whole, int32_t low, int32_t high) { return (whole < low) | (whole > high); }

template <typename E, bool Linear>
void sample(const SampledRow& row, float* values) {
  const Source<E> source = {static_cast<const typename E::Storage*>(row.voxels), row.size[2],
                            row.size[1] * row.size[2], row.ahead, row.size[0] > 1 ? row.size[1] * row.size[2] : 0};
  Vector along[3];
  for (int axis = 0; axis < 3; ++axis)
    along[axis] = static_cast<float>(row.step[axis]) * __builtin_convertvector(lane_numbers(), Vector);
  for (int64_t w = 0; w < row.count; w += kLanes) {
    Coordinates at[3];
    Integers border = {}, outside = {};
#pragma GCC unroll 3
    for (int axis = 0; axis < 3; ++axis) {
      at[axis] = locate(row, axis, w, along[axis], Linear ? 0.0 : 0.5);
      if (Linear && axis == 0 && row.size[0] == 1) border |= (at[0].whole != 0) | (at[0].fraction != 0.0f);
      else border |= beyond(at[axis].whole, 0, row.size[axis] - 2);
      outside |= beyond(at[axis].whole, Linear ? -1 : 0, row.size[axis] - 1);
    }
    Vector result;
    if (!any(~outside)) result = splat(row.background);
    else if (!Linear) result = nearest(row, source, at, outside);
    else if (!any(border)) result = interpolate(source, at);
    else result = outside ? splat(row.background) : interpolate_at_border(row, source, at);
    store_up_to<Float32>(values, w, row.count, result);
  }
}

void field(const FieldRow& row) {
  const Vector lanes = __builtin_convertvector(lane_numbers(), Vector);
  for (int64_t w = 0; w < row.count; w += kLanes) {
    const double at = static_cast<double>(w);
    const Vector shift[3] = {load(row.shift[0] + w), load(row.shift[1] + w), load(row.shift[2] + w)};
    Integers valid = ~Integers{};
#pragma GCC unroll 3
    for (int axis = 0; axis < 3; ++axis) {
      Vector psi = static_cast<float>(row.step[axis]) * lanes;
#pragma GCC unroll 3
      for (int other = 0; other < 3; ++other) psi += row.linear[axis][other] * shift[other];
      psi += static_cast<float>(row.start[axis] + at * row.step[axis]);
      if (row.displacement[axis] != nullptr) store_up_to<Float32>(row.displacement[axis], w, row.count, psi);
      // Limits move along with the row instead of the point: they are small whole numbers.
      const Vector along = psi + static_cast<float>(row.along_row[axis]) * lanes;
      const double travelled = at * row.along_row[axis];
      valid &= along >= static_cast<float>(row.low[axis] - travelled);
      valid &= along <= static_cast<float>(row.high[axis] - travelled);
      const double here = row.position[axis] + at * row.position_step[axis];
      const Vector position = static_cast<float>(row.position_step[axis]) * lanes + shift[axis];
      valid &= position >= static_cast<float>(row.volume_low[axis] - here);
      valid &= position <= static_cast<float>(row.volume_high[axis] - here);
    }
    if (row.mask != nullptr) {
      const Vector one = splat(1.0f), zero = {};
      store_up_to<Float32>(row.mask, w, row.count, valid ? one : zero);
    }
  }
}

}  // namespace
}  // namespace voxtrast
