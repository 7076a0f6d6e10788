// Powers of two, a register at a time. To be included after registers.inl.

namespace voxtrast {
namespace {

constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number

// 2^x for x = whole + fraction, |fraction| <= 1/2 (and a little). `magic` is kMagic + whole.
VOXTRAST_INLINE Vector power(Vector magic, Vector fraction) {
  // Minimax in relative error; 8e-8 with the coefficients and the sums in float32.
  Vector p = splat(0.0001534581242594868f);
  p = p * fraction + 0.0013399930903688073f;
  p = p * fraction + 0.009618489071726799f;
  p = p * fraction + 0.05550328642129898f;
  p = p * fraction + 0.24022646248340607f;
  p = p * fraction + 0.6931471824645996f;
  p = p * fraction + 1.0f;
  // The low bits of kMagic's pattern are zeros: what remains after the shift is `whole` at the place of the exponent.
  // A product and not a sum of patterns: NaN stays NaN.
  const Integers exponent = (reinterpret_cast<Integers>(magic) << 23) + 0x3f800000;
  return p * reinterpret_cast<Vector>(exponent);
}

}  // namespace
}  // namespace voxtrast
