// Random numbers, a register at a time: the words of random.h and normal numbers of them. Included by row_path.inl after
// registers.inl and powers.inl.

namespace voxtrast {
namespace {

typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
typedef uint64_t LongWords __attribute__((vector_size(kLanes * 4)));

// Products of the low halves, whatever stands in the high ones.
VOXTRAST_INLINE LongWords multiply_low(LongWords one, LongWords other) {
#if defined(VOXTRAST_AVX512)
  return reinterpret_cast<LongWords>(
      _mm512_mul_epu32(reinterpret_cast<__m512i>(one), reinterpret_cast<__m512i>(other)));
#elif VOXTRAST_LANES == 8
  return reinterpret_cast<LongWords>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(one), reinterpret_cast<__m256i>(other)));
#elif defined(__SSE2__)
  return reinterpret_cast<LongWords>(_mm_mul_epu32(reinterpret_cast<__m128i>(one), reinterpret_cast<__m128i>(other)));
#else
  return (one & 0xffffffff) * (other & 0xffffffff);
#endif
}

// philox of half as many blocks as there are lanes; the high half of each number is of no meaning.
VOXTRAST_INLINE void philox_half(const NumberStream& stream, LongWords block, LongWords (&word)[4]) {
  const LongWords zero = {};
  LongWords c0 = block, c1 = zero + stream.stream, c2 = zero + stream.slot, c3 = zero + stream.step;
  uint32_t key0 = static_cast<uint32_t>(stream.seed), key1 = static_cast<uint32_t>(stream.seed >> 32);
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const LongWords first = multiply_low(c0, zero + 0xD2511F53u), second = multiply_low(c2, zero + 0xCD9E8D57u);
    c0 = second >> 32 ^ c1 ^ (zero + key0);
    c2 = first >> 32 ^ c3 ^ (zero + key1);
    c1 = second;
    c3 = first;
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  word[0] = c0;
  word[1] = c1;
  word[2] = c2;
  word[3] = c3;
}

// Lane l of word[j] is word j of block `first` + l.
VOXTRAST_INLINE void philox_lanes(const NumberStream& stream, uint32_t first, Words (&word)[4]) {
  LongWords even_block = {};
#pragma GCC unroll 8
  for (int lane = 0; lane < kLanes / 2; ++lane) even_block[lane] = static_cast<uint32_t>(2 * lane);
  LongWords even[4], odd[4];
  philox_half(stream, even_block + first, even);
  philox_half(stream, even_block + (uint64_t(first) + 1), odd);
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) word[j] = reinterpret_cast<Words>((even[j] & 0xffffffff) | odd[j] << 32);
}

// log(m) = 2 atanh((m - 1) / (m + 1)) for sqrt(1/2) <= m <= sqrt(2): to 2e-9 relative before rounding.
VOXTRAST_INLINE Vector log_of_mantissa(Vector mantissa) {
  const Vector z = (mantissa - 1.0f) / (mantissa + 1.0f), y = z * z;
  Vector p = splat(1.0f / 9.0f);
  p = p * y + 1.0f / 7.0f;
  p = p * y + 1.0f / 5.0f;
  p = p * y + 1.0f / 3.0f;
  p = p * y + 1.0f;
  return 2.0f * z * p;
}

// x = mantissa 2^exponent with a mantissa between sqrt(1/2) and sqrt(2); x a positive normal number.
struct Split {
  Vector mantissa, exponent;
};

VOXTRAST_INLINE Split split_exponent(Vector x) {
  const Integers bits = reinterpret_cast<Integers>(x), from_root = bits - 0x3f3504f3;
  const Integers exponent = from_root >> 23;
  return {reinterpret_cast<Vector>(bits - (exponent << 23)), __builtin_convertvector(exponent, Vector)};
}

VOXTRAST_INLINE Vector logarithm(Vector x) {
  const Split s = split_exponent(x);
  return s.exponent * 0.69314718055994531f + log_of_mantissa(s.mantissa);
}

VOXTRAST_INLINE Vector logarithm2(Vector x) {
  const Split s = split_exponent(x);
  return s.exponent + log_of_mantissa(s.mantissa) * 1.4426950408889634f;
}

VOXTRAST_INLINE Vector square_root(Vector x) {
#if defined(VOXTRAST_AVX512)
  return reinterpret_cast<Vector>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x)));
#elif VOXTRAST_LANES == 8
  return reinterpret_cast<Vector>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x)));
#elif defined(__SSE2__)
  return reinterpret_cast<Vector>(_mm_sqrt_ps(reinterpret_cast<__m128>(x)));
#else
  for (int lane = 0; lane < kLanes; ++lane) x[lane] = __builtin_sqrtf(x[lane]);
  return x;
#endif
}

// Two normal numbers of two words, to 3e-7 (relative to the radius sqrt(-2 ln u)). The Taylor series of sine and cosine
// within an eighth of a turn are cut where the rest is below 2e-9.
VOXTRAST_INLINE void normal_pair(Words one, Words other, Vector& cosine, Vector& sine) {
  const Vector u = __builtin_convertvector(reinterpret_cast<Integers>((one >> 8) + 1), Vector) * 0x1p-24f;
  const Vector squared = -2.0f * logarithm(u);
  const Vector radius = square_root(squared > 0.0f ? squared : Vector{});
  const Vector quarters = __builtin_convertvector(reinterpret_cast<Integers>(other), Vector) * 0x1p-30f;
  const Vector magic = quarters + kMagic;
  const Integers quadrant = reinterpret_cast<Integers>(magic);
  const Vector x = quarters - (magic - kMagic), y = x * x;
  Vector s = splat(1.6044118478735982e-4f);
  s = s * y - 4.6817541353186881e-3f;
  s = s * y + 7.9692626246167046e-2f;
  s = s * y - 6.4596409750624625e-1f;
  s = (s * y + 1.5707963267948966f) * x;
  Vector c = splat(-2.5202042373060605e-5f);
  c = c * y + 9.1926027483942659e-4f;
  c = c * y - 2.0863480763352961e-2f;
  c = c * y + 2.5366950790104802e-1f;
  c = c * y - 1.2337005501361698f;
  c = c * y + 1.0f;
  const Integers odd = (quadrant & 1) != 0;
  const Integers sine_sign = (quadrant & 2) << 30, cosine_sign = ((quadrant + 1) & 2) << 30;
  sine = radius * reinterpret_cast<Vector>(reinterpret_cast<Integers>(odd ? c : s) ^ sine_sign);
  cosine = radius * reinterpret_cast<Vector>(reinterpret_cast<Integers>(odd ? s : c) ^ cosine_sign);
}

// Lanes of two vectors in turn, of the first or the second half of them.
template <int First, int... Lane>
VOXTRAST_INLINE Vector zip(Vector one, Vector other, Lanes<Lane...>) {
#if defined(__clang__)
  return __builtin_shufflevector(one, other, ((Lane & 1 ? kLanes : 0) + First + Lane / 2)...);
#else
  return __builtin_shuffle(one, other, Integers{((Lane & 1 ? kLanes : 0) + First + Lane / 2)...});
#endif
}

constexpr int64_t kNumbers = 4 * kLanes;  // of one call

// to[4 l + j] = word[j][l]
VOXTRAST_INLINE void store_in_turn(const Vector (&word)[4], float* to) {
  constexpr int kHalf = kLanes / 2;
  const Vector low02 = zip<0>(word[0], word[2], AllLanes{}), high02 = zip<kHalf>(word[0], word[2], AllLanes{});
  const Vector low13 = zip<0>(word[1], word[3], AllLanes{}), high13 = zip<kHalf>(word[1], word[3], AllLanes{});
  store(to, zip<0>(low02, low13, AllLanes{}));
  store(to + kLanes, zip<kHalf>(low02, low13, AllLanes{}));
  store(to + 2 * kLanes, zip<0>(high02, high13, AllLanes{}));
  store(to + 3 * kLanes, zip<kHalf>(high02, high13, AllLanes{}));
}

struct Normals {
  static VOXTRAST_INLINE void make(const NumberStream& stream, uint32_t block, float* to) {
    Words word[4];
    philox_lanes(stream, block, word);
    Vector number[4];
    normal_pair(word[0], word[1], number[0], number[1]);
    normal_pair(word[2], word[3], number[2], number[3]);
    store_in_turn(number, to);
  }
};

struct Uniforms {
  static VOXTRAST_INLINE void make(const NumberStream& stream, uint32_t block, float* to) {
    Words word[4];
    philox_lanes(stream, block, word);
    Vector number[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      number[j] = __builtin_convertvector(reinterpret_cast<Integers>(word[j] >> 8), Vector) * 0x1p-24f;
    store_in_turn(number, to);
  }
};

// Calls use(place, numbers, count) until all numbers first .. first + count of the stream went through.
template <typename Kind, typename Use>
VOXTRAST_INLINE void for_numbers(const NumberStream& stream, int64_t first, int64_t count, const Use& use) {
  alignas(64) float numbers[kNumbers];
  for (int64_t n = 0; n < count;) {
    const int64_t skipped = (first + n) & 3;
    const int64_t length = smaller(kNumbers - skipped, count - n);
    Kind::make(stream, static_cast<uint32_t>((first + n) >> 2), numbers);
    use(n, numbers + skipped, length);
    n += length;
  }
}

void noise(float* values, int64_t count, const NumberStream& stream, int64_t first, float std) {
  for_numbers<Normals>(stream, first, count, [&](int64_t n, const float* numbers, int64_t length) {
    for (int64_t i = 0; i < length; i += kLanes) {
      const Vector sum = load_up_to<Float32>(values + n, i, length) + std * load_up_to<Float32>(numbers, i, length);
      store_up_to<Float32>(values + n, i, length, sum);
    }
  });
}

void uniform_numbers(float* values, int64_t count, const NumberStream& stream, int64_t first, float low, float high) {
  for_numbers<Uniforms>(stream, first, count, [&](int64_t n, const float* numbers, int64_t length) {
    for (int64_t i = 0; i < length; i += kLanes)
      store_up_to<Float32>(values + n, i, length, low + (high - low) * load_up_to<Float32>(numbers, i, length));
  });
}

VOXTRAST_INLINE Words select(Words mask, Words yes, Words no) { return (yes & mask) | (no & ~mask); }

// As permutation.h has it: lanes that have come back wait for the others.
void permute(const PermutationKey& key, uint32_t first, int64_t count, uint32_t* places) {
  const uint32_t half = key.half_bits;
  const uint32_t mask = (1u << half) - 1;
  const Words zero = {}, size = zero + key.size;
  for (int64_t n = 0; n < count; n += kLanes) {
    Words index = reinterpret_cast<Words>(lane_numbers()) + (first + static_cast<uint32_t>(n));
    index = select(reinterpret_cast<Words>(index < size), index, zero);  // lanes behind the last number
    Words walking = ~zero;
    do {
      Words left = index >> half, right = index & mask;
#pragma GCC unroll 4
      for (int round = 0; round < 4; ++round) {
        Words mixed = (right ^ key.word[round]) * 0x9E3779B1u;
        mixed = (mixed ^ mixed >> 15) * 0x85EBCA77u;
        const Words next = left ^ (mixed >> 16 & mask);
        left = right;
        right = next;
      }
      index = select(walking, left << half | right, index);
      walking = reinterpret_cast<Words>(index >= size);
    } while (any(reinterpret_cast<Integers>(walking)));
    for (int64_t lane = 0; lane < kLanes && n + lane < count; ++lane) places[n + lane] = index[lane];
  }
}

}  // namespace
}  // namespace voxtrast
