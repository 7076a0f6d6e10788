// Vector registers of VOXTRAST_LANES floats as types of the compiler (GCC and Clang), and what moves their lanes about.
// To be included between target_*.h and target_end.h.

namespace voxtrast {
namespace {

constexpr int kLanes = VOXTRAST_LANES;

typedef float Vector __attribute__((vector_size(kLanes * 4)));
typedef int32_t Integers __attribute__((vector_size(kLanes * 4)));
typedef float Unaligned __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));
typedef float HalfUnaligned __attribute__((vector_size(kLanes * 2), aligned(4), may_alias));
typedef double Doubles __attribute__((vector_size(kLanes * 4)));  // half as many

#define VOXTRAST_INLINE inline __attribute__((always_inline))

VOXTRAST_INLINE Vector load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
VOXTRAST_INLINE void store(float* to, Vector value) { *reinterpret_cast<Unaligned*>(to) = value; }
VOXTRAST_INLINE Vector splat(float value) { return value - Vector{}; }
VOXTRAST_INLINE Doubles load_doubles(const float* from) {
  return __builtin_convertvector(*reinterpret_cast<const HalfUnaligned*>(from), Doubles);
}

// Has the value stay in a register: the compiler would rather load it once for every use.
VOXTRAST_INLINE void keep(Vector& value) {
#if defined(__x86_64__)
  asm("" : "+v"(value));
#elif defined(__aarch64__)
  asm("" : "+w"(value));
#endif
}

VOXTRAST_INLINE int64_t smaller(int64_t one, int64_t other) { return one < other ? one : other; }

template <int... Lane>
struct Lanes {};
template <int Count, int... Lane>
struct LanesUpTo : LanesUpTo<Count - 1, Count - 1, Lane...> {};
template <int... Lane>
struct LanesUpTo<0, Lane...> {
  typedef Lanes<Lane...> Type;
};
typedef LanesUpTo<kLanes>::Type AllLanes;

VOXTRAST_INLINE Integers lane_numbers() {
  Integers result = {};
#pragma GCC unroll 16
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = lane;
  return result;
}

// Lane l is one[l + forth] where l has no bit `Bit`, other[l - back] where it has.
template <int Bit, int Forth, int Back, int... Lane>
VOXTRAST_INLINE Vector mix(Vector one, Vector other, Lanes<Lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(one, other, ((Lane & Bit) ? kLanes + Lane - Back : Lane + Forth)...);
#else
  return __builtin_shuffle(one, other, Integers{((Lane & Bit) ? kLanes + Lane - Back : Lane + Forth)...});
#endif
}

// Afterwards lane l of register r is what lane r of register l was.
template <int Bit = 1>
VOXTRAST_INLINE void transpose(Vector (&block)[kLanes]) {
#pragma GCC unroll 16
  for (int r = 0; r < kLanes; ++r) {
    if (r & Bit) continue;
    const Vector one = block[r], other = block[r + Bit];
    block[r] = mix<Bit, 0, Bit>(one, other, AllLanes{});
    block[r + Bit] = mix<Bit, Bit, 0>(one, other, AllLanes{});
  }
  if constexpr (2 * Bit < kLanes) transpose<2 * Bit>(block);
}

// Lane l is the sum of the lanes of parts[l]. The parts are spent.
template <int Bit = kLanes / 2>
VOXTRAST_INLINE Vector totals(Vector* parts) {
#pragma GCC unroll 16
  for (int r = 0; r < Bit; ++r)
    parts[r] = mix<Bit, 0, 0>(parts[r], parts[r + Bit], AllLanes{}) +
               mix<Bit, Bit, Bit>(parts[r], parts[r + Bit], AllLanes{});
  if constexpr (Bit > 1) return totals<Bit / 2>(parts);
  return parts[0];
}

template <int Bit = kLanes / 2>
VOXTRAST_INLINE float total(Vector value) {
  const Vector sum = value + mix<Bit, Bit, Bit>(value, value, AllLanes{});
  if constexpr (Bit > 1) return total<Bit / 2>(sum);
  return sum[0];
}

VOXTRAST_INLINE double total(Doubles value) {
  double sum = 0.0;
#pragma GCC unroll 8
  for (int lane = 0; lane < kLanes / 2; ++lane) sum += value[lane];
  return sum;
}

}  // namespace
}  // namespace voxtrast
