// Numbers of 16 bits as vectors of floats, and back. To be included after registers.inl, and for AVX-512 immintrin.h
// before target_avx512.h.

namespace voxtrast {
namespace {

typedef uint32_t Bits __attribute__((vector_size(kLanes * 4)));
typedef uint16_t Shorts __attribute__((vector_size(kLanes * 2)));
typedef Shorts UnalignedShorts __attribute__((aligned(2), may_alias));

VOXTRAST_INLINE Vector as_floats(Bits bits) { return reinterpret_cast<Vector>(bits); }
VOXTRAST_INLINE Bits as_bits(Vector value) { return reinterpret_cast<Bits>(value); }

struct Float32 {
  typedef float Storage;
};

struct BFloat16 {
  typedef uint16_t Storage;

  static VOXTRAST_INLINE Vector widen(Shorts shorts) {
    return as_floats(__builtin_convertvector(shorts, Bits) << 16);
  }
  static VOXTRAST_INLINE Shorts narrow(Vector value) {  // to the nearest, ties to even
    const Bits bits = as_bits(value);
    const Bits rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return __builtin_convertvector(value == value ? rounded : rounded * 0 + 0x7fc0, Shorts);
  }
};

struct Float16 {
  typedef uint16_t Storage;

#if VOXTRAST_LANES == 16
  static VOXTRAST_INLINE Vector widen(Shorts shorts) {
    return reinterpret_cast<Vector>(_mm512_cvtph_ps(reinterpret_cast<__m256i>(shorts)));
  }
  static VOXTRAST_INLINE Shorts narrow(Vector value) {
    constexpr int kToNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    return reinterpret_cast<Shorts>(_mm512_cvtps_ph(reinterpret_cast<__m512>(value), kToNearest));
  }
#else
  static VOXTRAST_INLINE Vector widen(Shorts shorts) {
    const Bits bits = __builtin_convertvector(shorts, Bits);
    const Bits size = (bits & 0x7fff) << 13, exponent = size & 0x0f800000;
    const Bits zero = {}, shift = exponent == 0x0f800000 ? zero + (224u << 23) : zero + (112u << 23);
    const Vector normal = as_floats(size + shift);
    const Vector least = splat(0x1p-14f);
    const Vector small = as_floats(size + as_bits(least)) - least;
    return as_floats(as_bits(exponent == 0 ? small : normal) | (bits & 0x8000) << 16);
  }
  static VOXTRAST_INLINE Shorts narrow(Vector value) {
    const Bits bits = as_bits(value), size = bits & 0x7fffffff, zero = {};
    const Bits normal = (size - (112u << 23) + 0xfff + (size >> 13 & 1)) >> 13;
    const Bits small = as_bits(as_floats(size) + 0.5f) - as_bits(splat(0.5f));
    const Bits finite = size < 0x38800000 ? small : normal;
    const Bits beyond = size > 0x7f800000 ? zero + 0x7e00 : zero + 0x7c00;
    return __builtin_convertvector((size >= 0x477ff000 ? beyond : finite) | (bits >> 16 & 0x8000), Shorts);
  }
#endif
};

template <typename E>
VOXTRAST_INLINE Vector load_elements(const typename E::Storage* from) {
  return E::widen(*reinterpret_cast<const UnalignedShorts*>(from));
}
template <>
VOXTRAST_INLINE Vector load_elements<Float32>(const float* from) {
  return load(from);
}

template <typename E>
VOXTRAST_INLINE void store_elements(typename E::Storage* to, Vector value) {
  *reinterpret_cast<UnalignedShorts*>(to) = E::narrow(value);
}
template <>
VOXTRAST_INLINE void store_elements<Float32>(float* to, Vector value) {
  store(to, value);
}

// The first `count` elements, fewer than a vector, followed by zeros.
template <typename E>
VOXTRAST_INLINE Vector load_some(const typename E::Storage* from, int64_t count) {
  typename E::Storage some[kLanes] = {};
  for (int64_t n = 0; n < count; ++n) some[n] = from[n];
  return load_elements<E>(some);
}

template <typename E>
VOXTRAST_INLINE void store_some(typename E::Storage* to, Vector value, int64_t count) {
  typename E::Storage some[kLanes];
  store_elements<E>(some, value);
  for (int64_t n = 0; n < count; ++n) to[n] = some[n];
}

// The elements n, n + 1 ... of an array of `count`.
template <typename E>
VOXTRAST_INLINE Vector load_up_to(const typename E::Storage* from, int64_t n, int64_t count) {
  return n + kLanes <= count ? load_elements<E>(from + n) : load_some<E>(from + n, count - n);
}

template <typename E>
VOXTRAST_INLINE void store_up_to(typename E::Storage* to, int64_t n, int64_t count, Vector value) {
  if (n + kLanes <= count) store_elements<E>(to + n, value);
  else store_some<E>(to + n, value, count - n);
}

}  // namespace
}  // namespace voxtrast
