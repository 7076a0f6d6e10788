// Powers of two and what the operators make of them, a register at a time. Included by pairwise_tile.inl.

namespace voxtrast {
namespace {

// 2^(dot * scale - shift), shift whole numbers; the result must be a normal number.
VOXTRAST_INLINE Vector exponential(Vector dot, const Exponent& e, Vector shift) {
  const Vector offset = kMagic - shift;
  const Vector magic = dot * e.scale + offset;
  const Vector whole = magic - offset;  // plus the shift: exact
  const Vector fraction = dot * e.scale_low + (dot * e.scale - whole);
  return power(magic, fraction);
}

// The same for any result below 2: 0 below 2^-126. NaN stays NaN.
VOXTRAST_INLINE Vector exponential_or_zero(Vector dot, const Exponent& e, Vector shift) {
  const Integers vanishes = dot * e.scale - shift < -126.0f;
  return vanishes ? Vector{} : exponential(dot, e, shift);
}

// log(1 + v) for 0 <= v <= 1: 2 atanh(v / (2 + v)), to 4e-9 relative before rounding.
VOXTRAST_INLINE Vector log_of_one_more(Vector v) {
  const Vector z = v / (v + 2.0f), y = z * z;
  Vector p = splat(0.1408732831478119f);
  p = p * y + 0.1398070901632309f;
  p = p * y + 0.20012426376342773f;
  p = p * y + 0.3333315849304199f;
  p = p * y + 1.0f;
  return 2.0f * z * p;
}

// What becomes of a similarity before it is summed or weighed.
struct Exponential {
  const Exponent& exponent;
  VOXTRAST_INLINE Vector operator()(Vector dot) const { return exponential(dot, exponent, splat(exponent.shift)); }
};

// Both functions of x = log(2) (dot * scale - shift) need exp(-|x|), which never overflows.
struct Softplus {
  const Exponent& exponent;
  float fraction;  // the rest of the shift, whose whole part is exponent.shift
  float up, up_low, down, down_low;  // 2^fraction and its inverse, each with what float32 leaves over of it

  VOXTRAST_INLINE Vector decay(Vector dot, Integers positive) const {
    const Vector side = positive ? splat(-1.0f) : splat(1.0f);
    const Vector e = exponential_or_zero(side * dot, exponent, side * exponent.shift);
    return e * (positive ? splat(up) : splat(down)) + e * (positive ? splat(up_low) : splat(down_low));
  }
  VOXTRAST_INLINE Vector operator()(Vector dot) const {
    const Vector x = (dot * exponent.scale - exponent.shift) - fraction;
    const Integers positive = x > 0.0f;
    const Vector result = log_of_one_more(decay(dot, positive));
    return positive ? x * 0.6931471805599453f + result : result;
  }
};

struct Sigmoid {
  Softplus softplus;
  VOXTRAST_INLINE Vector operator()(Vector dot) const {
    const Integers positive = dot * softplus.exponent.scale - softplus.exponent.shift > softplus.fraction;
    const Vector v = softplus.decay(dot, positive);
    return (positive ? splat(1.0f) : v) / (v + 1.0f);
  }
};

}  // namespace
}  // namespace voxtrast
