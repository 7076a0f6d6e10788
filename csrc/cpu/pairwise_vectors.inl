// Vectors in rows, on their way into a tile and out of it. Included by pairwise_tile.inl.

namespace voxtrast {
namespace {

// A block of BlockRows x BlockColumns dot products fills one register with their sums.
constexpr int kBlockColumns = kLanes >= 16 ? 4 : 2;
constexpr int kBlockRows = kLanes / kBlockColumns;

void read(const float* from, const int64_t* order, int64_t count, int64_t channels, int64_t width, float* to,
          float* norm) {
  for (int64_t item = 0; item < count; ++item) {
    const float* source = from + (order == nullptr ? item : order[item]) * channels;
    float* target = to == nullptr ? nullptr : to + item * width;
    Vector squares = {};
    for (int64_t c = 0; c < width; c += kLanes) {
      Vector part = {};
      if (c + kLanes <= channels) {
        part = load(source + c);
      } else {
        for (int64_t n = c; n < channels; ++n) part[n - c] = source[n];
      }
      if (target != nullptr) store(target + c, part);
      squares += part * part;
    }
    norm[item] = __builtin_sqrtf(total(squares));
  }
}

void scale(const float* factor, int64_t count, int64_t width, float* vectors) {
  for (int64_t item = 0; item < count; ++item)
    for (int64_t c = 0; c < width; c += kLanes)
      store(vectors + item * width + c, load(vectors + item * width + c) * factor[item]);
}

void paired(const float* one, const float* other, int64_t count, int64_t width, double* result) {
  for (int64_t item = 0; item < count; ++item) {
    const float *left = one + item * width, *right = other + item * width;
    Doubles low = {}, high = {};
    for (int64_t c = 0; c < width; c += kLanes) {
      low += load_doubles(left + c) * load_doubles(right + c);
      high += load_doubles(left + c + kLanes / 2) * load_doubles(right + c + kLanes / 2);
    }
    result[item] = total(low + high);
  }
}

VOXTRAST_INLINE void finish_part(const Finish finish, int64_t item, int64_t channel, int64_t width, Vector gradient) {
  const Vector vector = load(finish.vectors + item * width + channel);
  const Vector part = (gradient - vector * finish.along[item]) * finish.factor[item];
  float* to = finish.to + (finish.order == nullptr ? item : finish.order[item]) * finish.channels + channel;
  if (channel + kLanes <= finish.channels) {
    store(to, part);
  } else {
    for (int64_t n = 0; n < finish.channels - channel; ++n) to[n] = part[n];
  }
}

void write(const float* gradients, int64_t count, int64_t width, const Finish& finish) {
  for (int64_t item = 0; item < count; ++item)
    for (int64_t channel = 0; channel < width; channel += kLanes)
      finish_part(finish, item, channel, width, load(gradients + item * width + channel));
}

void pack(const float* key, int64_t columns, int64_t width, float* packed) {
  for (int64_t first = 0; first < columns || first % kStrip != 0; first += kLanes) {
    const int64_t count = columns - first, strip = first / kStrip * kStrip;
    for (int64_t channel = 0; channel < width; channel += kLanes) {
      Vector block[kLanes];
#pragma GCC unroll 16
      for (int n = 0; n < kLanes; ++n) block[n] = n < count ? load(key + (first + n) * width + channel) : Vector{};
      transpose(block);
      float* to = packed + strip * width + channel * kStrip + (first - strip);
#pragma GCC unroll 16
      for (int c = 0; c < kLanes; ++c) store(to + c * kStrip, block[c]);
    }
  }
}

// Sums over the channels stay apart lane by lane until the end: nothing needs packing, and of each two equal entries
// one is computed.
void products(const float* vectors, int64_t count, int64_t width, float* matrix) {
  for (int64_t row = 0; row < count; row += kBlockRows) {
    const float *left[kBlockRows], *right[kBlockColumns];
    for (int r = 0; r < kBlockRows; ++r) left[r] = vectors + smaller(row + r, count - 1) * width;
    for (int64_t column = 0; column < smaller(row + kBlockRows, count); column += kBlockColumns) {
      for (int c = 0; c < kBlockColumns; ++c) right[c] = vectors + smaller(column + c, count - 1) * width;
      Vector sum[kLanes] = {};
      for (int64_t channel = 0; channel < width; channel += kLanes) {
        Vector others[kBlockColumns];
#pragma GCC unroll 4
        for (int c = 0; c < kBlockColumns; ++c) others[c] = load(right[c] + channel);
#pragma GCC unroll 4
        for (int r = 0; r < kBlockRows; ++r) {
          const Vector own = load(left[r] + channel);
#pragma GCC unroll 4
          for (int c = 0; c < kBlockColumns; ++c) sum[r * kBlockColumns + c] += own * others[c];
        }
      }
      float entries[kLanes];
      store(entries, totals(sum));
#pragma GCC unroll 4
      for (int r = 0; r < kBlockRows; ++r)
#pragma GCC unroll 4
        for (int c = 0; c < kBlockColumns; ++c)
          matrix[(row + r) * kMatrixRow + column + c] = entries[r * kBlockColumns + c];
    }
  }
  for (int64_t row = 0; row < count; ++row)
    for (int64_t column = 0; column < row; ++column)
      matrix[column * kMatrixRow + row] = matrix[row * kMatrixRow + column];
  for (int64_t row = 0; row < count; ++row)
    for (int64_t column = count; column % kStrip != 0; ++column) matrix[row * kMatrixRow + column] = 0.0f;
}

}  // namespace
}  // namespace voxtrast
