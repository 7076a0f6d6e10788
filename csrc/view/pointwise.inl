// What changes voxels one by one, what is summed over them, and weighted sums of rows. Included by row_path.inl.

namespace voxtrast {
namespace {

// values[n] = change(values[n], n)
template <typename Change>
VOXTRAST_INLINE void for_each_vector(float* values, int64_t count, const Change& change) {
  for (int64_t n = 0; n < count; n += kLanes)
    store_up_to<Float32>(values, n, count, change(load_up_to<Float32>(values, n, count), n));
}

void add(float* values, int64_t count, float shift) {
  for_each_vector(values, count, [&](Vector v, int64_t) { return v + shift; });
}

void contrast(float* values, int64_t count, float mean, float factor) {
  for_each_vector(values, count, [&](Vector v, int64_t) { return mean + factor * (v - mean); });
}

// low + (high - low) x^exponent, x the place of v between low and high: to 3e-7 of high - low.
void gamma(float* values, int64_t count, float low, float high, float exponent, bool inverted) {
  const float range = high - low, scale = 1.0f / range;
  const float from = inverted ? high : low, sign = inverted ? -1.0f : 1.0f;
  for_each_vector(values, count, [&](Vector v, int64_t) {
    const Vector x = (sign * scale) * (v - from);
    const Integers positive = x > 0x1p-100f;
    const Vector raised = power_or_zero(exponent * logarithm2(positive ? x : splat(1.0f)));
    return from + (sign * range) * (positive ? raised : Vector{});
  });
}

void bezier(float* values, int64_t count, float low, float high, const float* table) {
  const float range = high - low, scale = (kBezierEntries - 1) / range;
  for_each_vector(values, count, [&](Vector v, int64_t) {
    const Vector x = scale * (v - low);
    Integers entry = __builtin_convertvector(x, Integers);
    entry = entry < 0 ? Integers{} : entry;
    entry = entry > kBezierEntries - 2 ? Integers{} + (kBezierEntries - 2) : entry;
    Vector below, above;
#pragma GCC unroll 16
    for (int lane = 0; lane < kLanes; ++lane) {
      below[lane] = table[entry[lane]];
      above[lane] = table[entry[lane] + 1];
    }
    return low + range * between(below, above, x - __builtin_convertvector(entry, Vector));
  });
}

void bias(float* values, int64_t count, float background, const float* cubic, float start, float step) {
  const Vector lanes = __builtin_convertvector(lane_numbers(), Vector);
  for_each_vector(values, count, [&](Vector v, int64_t n) {
    const Vector x = start + step * (static_cast<float>(n) + lanes);
    Vector exponent = ((cubic[3] * x + cubic[2]) * x + cubic[1]) * x + cubic[0];
    exponent = exponent * 1.4426950408889634f;
    exponent = exponent > 120.0f ? splat(120.0f) : exponent;
    return background + (v - background) * power_or_zero(exponent);
  });
}

void gather_statistics(const float* values, int64_t count, ViewStatistics& statistics) {
  Vector sum[2] = {Vector{}, Vector{}}, low = splat(statistics.low), high = splat(statistics.high);
  const auto take = [&](Vector v) {
    low = v < low ? v : low;
    high = v > high ? v : high;
  };
  int64_t n = 0;
  for (; n + 2 * kLanes <= count; n += 2 * kLanes)
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const Vector v = load(values + n + half * kLanes);
      sum[half] += v;
      take(v);
    }
  double rest = 0.0;
  for (; n < count; ++n) {
    rest += values[n];
    take(splat(values[n]));
  }
  statistics.sum += static_cast<double>(total(sum[0] + sum[1])) + rest;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (low[lane] < statistics.low) statistics.low = low[lane];
    if (high[lane] > statistics.high) statistics.high = high[lane];
  }
}

void weighted_sum(const float* const* rows, const float* weights, int64_t taps, int64_t count, float* out) {
  for (int64_t n = 0; n < count; n += kLanes) {
    Vector sum = {};
    if (n + kLanes <= count) {
      for (int64_t t = 0; t < taps; ++t) sum += weights[t] * load(rows[t] + n);
      store(out + n, sum);
    } else {
      for (int64_t t = 0; t < taps; ++t) sum += weights[t] * load_some<Float32>(rows[t] + n, count - n);
      store_some<Float32>(out + n, sum, count - n);
    }
  }
}

void widen(const uint16_t* halves, int64_t count, float* out) {
  for (int64_t n = 0; n < count; n += kLanes)
    store_up_to<Float32>(out, n, count, load_up_to<Float16>(halves, n, count));
}

}  // namespace
}  // namespace voxtrast
