// Powers of two, a register at a time. To be included after registers.inl.

namespace voxtrast {
namespace {

constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number

// 2^fraction, |fraction| <= 1/2 (and a little). Minimax in relative error; 8e-8 with the coefficients and the sums in
// float32.
VOXTRAST_INLINE Vector polynomial(Vector fraction) {
  Vector p = splat(0.0001534581242594868f);
  p = p * fraction + 0.0013399930903688073f;
  p = p * fraction + 0.009618489071726799f;
  p = p * fraction + 0.05550328642129898f;
  p = p * fraction + 0.24022646248340607f;
  p = p * fraction + 0.6931471824645996f;
  return p * fraction + 1.0f;
}

// 2^x for x = whole + fraction. `magic` is kMagic + whole.
VOXTRAST_INLINE Vector power(Vector magic, Vector fraction) {
  // The low bits of kMagic's pattern are zeros: what remains after the shift is `whole` at the place of the exponent.
  // A product and not a sum of patterns: NaN stays NaN.
  const Integers exponent = (reinterpret_cast<Integers>(magic) << 23) + 0x3f800000;
  return polynomial(fraction) * reinterpret_cast<Vector>(exponent);
}

// 2^x for x <= 0 or little more: 0 below 2^-100, which no sum of at least 1 would notice. NaN stays NaN.
VOXTRAST_INLINE Vector power_or_zero(Vector x) {
#if defined(VOXTRAST_AVX512)
  // As above, in two instructions for the fraction and one for the whole part.
  const Vector fraction = reinterpret_cast<Vector>(_mm512_reduce_ps(reinterpret_cast<__m512>(x), 0));
  const __mmask16 counts = _mm512_cmp_ps_mask(reinterpret_cast<__m512>(x), _mm512_set1_ps(-100.0f), _CMP_NLT_UQ);
  return reinterpret_cast<Vector>(_mm512_maskz_scalef_ps(counts, reinterpret_cast<__m512>(polynomial(fraction)),
                                                         reinterpret_cast<__m512>(x - fraction)));
#else
  const Vector magic = x + kMagic;
  const Vector result = power(magic, x - (magic - kMagic));
  const Integers vanishes = x < -100.0f;
  return vanishes ? Vector{} : result;
#endif
}

}  // namespace
}  // namespace voxtrast
