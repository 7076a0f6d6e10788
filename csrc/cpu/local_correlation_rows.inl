// The work on a block of rows, written with the vector types of GCC and Clang. Included by
// local_correlation_rows_*.cpp, which set
//   VOXTRAST_ROWS_1 .. VOXTRAST_ROWS_4    rows of a block for the radii 1 to 4: their ROWS x (2 radius + 1) sums of
//                                         products stay in registers
//   VOXTRAST_PATH                         the name of what is defined at the end
// and the instruction set (target_*.h, which say what may stand here).

#include "registers.inl"
#include "powers.inl"

namespace voxtrast {
namespace {

// Any other radius: so many rows, and one row of the window at a time.
constexpr int kAnyRows = 4;
constexpr float kLowest = -3.4028234663852886e38f;

// log2(x) of a normal number x >= 1: 2 atanh((m - 1) / (m + 1)) of the mantissa m in [1, 2). NaN stays NaN.
VOXTRAST_INLINE Vector logarithm(Vector x) {
  const Integers bits = reinterpret_cast<Integers>(x);
  const Vector mantissa = reinterpret_cast<Vector>((bits & 0x7fffff) | 0x3f800000);
  const Vector z = (mantissa - 1.0f) / (mantissa + 1.0f), y = z * z;
  // 2 / log(2) times the polynomial of log_of_one_more, whose largest relative error is 4e-9.
  Vector p = splat(0.4064744f);
  p = p * y + 0.4033980f;
  p = p * y + 0.5774366f;
  p = p * y + 0.9617916f;
  p = p * y + 2.8853901f;
  const Vector whole = __builtin_convertvector((bits >> 23) - 127, Vector);
  return z * p + whole + (x - x);
}

VOXTRAST_INLINE int64_t padded_width(const CorrelationRows& rows) { return (rows.strips + 2) * kLanes; }

// dot[y][w] = <query(y), key(y + w)> for R rows of queries and N rows of the window, -infinity for keys outside.
// query: at the first voxel, of the first channel and row; key: of the first row of its window, at the offset along it.
template <int R, int N>
VOXTRAST_INLINE void products(const CorrelationRows& rows, const float* query, const float* key, const float* row_edge,
                              Vector column_edge, Vector (&dot)[R][N]) {
#pragma GCC unroll 16
  for (int there = 0; there < R + N - 1; ++there) {
    const Vector edge = column_edge + row_edge[there];
#pragma GCC unroll 16
    for (int y = 0; y < R; ++y)
      if (0 <= there - y && there - y < N) dot[y][there - y] = edge;
  }
  const int64_t query_row = padded_width(rows);
  for (int64_t c = 0; c < rows.channels; ++c) {
    Vector here[R];
#pragma GCC unroll 16
    for (int y = 0; y < R; ++y) {
      here[y] = load(query + (c * R + y) * query_row);
      keep(here[y]);
    }
#pragma GCC unroll 16
    for (int there = 0; there < R + N - 1; ++there) {
      Vector value = load(key + there * rows.row + c * rows.pitch);
      keep(value);
#pragma GCC unroll 16
      for (int y = 0; y < R; ++y)
        if (0 <= there - y && there - y < N) dot[y][there - y] = here[y] * value + dot[y][there - y];
    }
  }
}

// The softmax of one voxel of every lane so far, relative to the largest logit so far.
struct Softmax {
  Vector largest, sum, mean[3];
};

// Adds N x (2 radius + 1) logits of one row, `step` registers apart, which lie in plane dz and rows dy .. of the window.
template <int N>
VOXTRAST_INLINE void add(Softmax& softmax, const float* logits, int64_t step, int64_t radius, float dz, float dy) {
  Vector largest = softmax.largest;
  for (int64_t dx = 0; dx <= 2 * radius; ++dx) {
#pragma GCC unroll 16
    for (int w = 0; w < N; ++w) {
      const Vector logit = load(logits + (dx * step + w) * kLanes);
      largest = largest > logit ? largest : logit;  // NaN passes
    }
  }
  const Vector factor = power_or_zero(softmax.largest - largest);
  Vector sum[N], along[N];
#pragma GCC unroll 16
  for (int w = 0; w < N; ++w) sum[w] = along[w] = Vector{};
  for (int64_t dx = 0; dx <= 2 * radius; ++dx) {
    const float offset = static_cast<float>(dx - radius);
#pragma GCC unroll 16
    for (int w = 0; w < N; ++w) {
      const Vector share = power_or_zero(load(logits + (dx * step + w) * kLanes) - largest);
      sum[w] += share;
      along[w] = share * offset + along[w];
    }
  }
  Vector total = {}, rows = {}, columns = {};
#pragma GCC unroll 16
  for (int w = 0; w < N; ++w) {
    total += sum[w];
    columns += along[w];
    rows = sum[w] * (dy + w) + rows;
  }
  softmax.largest = largest;
  softmax.sum = softmax.sum * factor + total;
  softmax.mean[0] = softmax.mean[0] * factor + total * dz;
  softmax.mean[1] = softmax.mean[1] * factor + rows;
  softmax.mean[2] = softmax.mean[2] * factor + columns;
}

template <int R, int N>
void forward_rows(const CorrelationRows& given) {
  const CorrelationRows rows = given;  // a copy, which stays in registers: what is written could be anything
  const int64_t width = rows.strips * kLanes, window = 2 * rows.radius + 1;
  for (int64_t strip = 0; strip < rows.strips; ++strip) {
    const float* query = rows.query + (strip + 1) * kLanes;
    Softmax softmax[R];
    for (int y = 0; y < R; ++y) softmax[y] = {splat(kLowest), Vector{}, {Vector{}, Vector{}, Vector{}}};
    for (int64_t dz = 0; dz < rows.planes; ++dz) {
      for (int64_t dy = 0; dy < window; dy += N) {
        const float* key = rows.key + dz * rows.plane + dy * rows.row + strip * kLanes;
        for (int64_t dx = 0; dx < window; ++dx) {
          Vector dot[R][N];
          products<R, N>(rows, query, key + dx, rows.row_edge + dy,
                         load(rows.column_edge + dx * width + strip * kLanes), dot);
#pragma GCC unroll 16
          for (int y = 0; y < R; ++y)
#pragma GCC unroll 16
            for (int w = 0; w < N; ++w) store(rows.logits + ((dx * R + y) * N + w) * kLanes, dot[y][w]);
        }
        for (int y = 0; y < R; ++y)
          add<N>(softmax[y], rows.logits + y * N * kLanes, R * N, rows.radius,
                 static_cast<float>(rows.first_plane + dz), static_cast<float>(dy - rows.radius));
      }
    }
    float* voxels = rows.voxels + (strip + 1) * kLanes;
    for (int y = 0; y < R; ++y) {
      const Vector inverse = 1.0f / softmax[y].sum;
      store(voxels + y * padded_width(rows), softmax[y].largest + logarithm(softmax[y].sum));
      for (int axis = 0; axis < 3; ++axis)
        store(voxels + ((axis + 1) * R + y) * padded_width(rows), softmax[y].mean[axis] * inverse);
    }
  }
}

// Gradients of logits, from the logits: dot = 2^(dot - log-sum-exp) (along + dx across). along (R, N): the upstream
// gradients times the offset from the mean, but for its last component, which is dx - the mean's.
template <int R, int N>
VOXTRAST_INLINE void differentiate(const float* voxels, int64_t width, const float* along, float dx,
                                   Vector (&dot)[R][N]) {
#pragma GCC unroll 16
  for (int y = 0; y < R; ++y) {
    const Vector log_sum = load(voxels + y * width), across = load(voxels + (3 * R + y) * width) * dx;
#pragma GCC unroll 16
    for (int w = 0; w < N; ++w)
      dot[y][w] = power_or_zero(dot[y][w] - log_sum) * (load(along + (y * N + w) * kLanes) + across);
  }
}

template <int R, int N>
VOXTRAST_INLINE void add_to_query(const CorrelationRows& rows, const Vector (&slope)[R][N], const float* key,
                                  float* gradient) {
  const int64_t query_row = padded_width(rows);
  for (int64_t c = 0; c < rows.channels; ++c) {
    Vector sum[R];
#pragma GCC unroll 16
    for (int y = 0; y < R; ++y) sum[y] = load(gradient + (c * R + y) * query_row);
#pragma GCC unroll 16
    for (int there = 0; there < R + N - 1; ++there) {
      Vector value = load(key + there * rows.row + c * rows.pitch);
      keep(value);
#pragma GCC unroll 16
      for (int y = 0; y < R; ++y)
        if (0 <= there - y && there - y < N) sum[y] = slope[y][there - y] * value + sum[y];
    }
#pragma GCC unroll 16
    for (int y = 0; y < R; ++y) store(gradient + (c * R + y) * query_row, sum[y]);
  }
}

// Of N rows of the window in plane dz: slopes, and the gradient of the query.
template <int R, int N>
VOXTRAST_INLINE void backward_queries(const CorrelationRows& rows, int64_t dz, int64_t dy, int64_t strip) {
  const int64_t width = rows.strips * kLanes, query_row = padded_width(rows), window = 2 * rows.radius + 1;
  const float* query = rows.query + (strip + 1) * kLanes;
  const float* voxels = rows.voxels + (strip + 1) * kLanes;
  const float* key = rows.key + dz * rows.plane + dy * rows.row + strip * kLanes;
  const float plane = static_cast<float>(rows.first_plane + dz), first = static_cast<float>(dy - rows.radius);
  float along[R * N * kLanes];
  for (int y = 0; y < R; ++y) {
    const Vector constant = load(voxels + (R + y) * query_row) * plane - load(voxels + (4 * R + y) * query_row);
    const Vector step = load(voxels + (2 * R + y) * query_row);
    for (int w = 0; w < N; ++w) store(along + (y * N + w) * kLanes, step * (first + w) + constant);
  }
  for (int64_t dx = 0; dx < window; ++dx) {
    Vector slope[R][N];
    products<R, N>(rows, query, key + dx, rows.row_edge + dy, load(rows.column_edge + dx * width + strip * kLanes),
                   slope);
    differentiate<R, N>(voxels, query_row, along, static_cast<float>(dx - rows.radius), slope);
    if (rows.grad_query != nullptr)
      add_to_query<R, N>(rows, slope, key + dx, rows.grad_query + (strip + 1) * kLanes);
    if (rows.grad_key == nullptr) continue;
    // Written where the keys are that they belong to, which is cheaper than to read them askew for every channel. An
    // offset that is longer than a register may lead out of the volume.
    const int64_t place = (strip + 1) * kLanes + dx - rows.radius;
    if (place <= 0 || place >= width + kLanes) continue;
    float* slopes = rows.slopes + dx * R * N * query_row + place;
#pragma GCC unroll 16
    for (int y = 0; y < R; ++y)
#pragma GCC unroll 16
      for (int w = 0; w < N; ++w) store(slopes + (y * N + w) * query_row, slope[y][w]);
  }
}

// gradient += the slopes of the queries that see a strip of the keys, times those queries, for C channels. The sums
// stay in registers over all offsets along the row.
template <int R, int N, int C>
VOXTRAST_INLINE void add_to_keys(const CorrelationRows& rows, int64_t strip, int64_t channel, float* gradient) {
  const int64_t width = rows.strips * kLanes, query_row = padded_width(rows);
  gradient += channel * width + strip * kLanes;
  Vector sum[C][R + N - 1];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 16
    for (int there = 0; there < R + N - 1; ++there) sum[c][there] = load(gradient + there * rows.grad_row + c * width);
  for (int64_t dx = 0; dx <= 2 * rows.radius; ++dx) {
    const int64_t place = (strip + 1) * kLanes - (dx - rows.radius);
    if (place <= 0 || place >= width + kLanes) continue;
    const float* query = rows.query + channel * R * query_row + place;
    const float* slopes = rows.slopes + dx * R * N * query_row + (strip + 1) * kLanes;
#pragma GCC unroll 16
    for (int y = 0; y < R; ++y) {
      Vector here[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        here[c] = load(query + (c * R + y) * query_row);
        keep(here[c]);
      }
#pragma GCC unroll 16
      for (int w = 0; w < N; ++w) {
        Vector slope = load(slopes + (y * N + w) * query_row);
        keep(slope);
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) sum[c][y + w] = slope * here[c] + sum[c][y + w];
      }
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c)
#pragma GCC unroll 16
    for (int there = 0; there < R + N - 1; ++there) store(gradient + there * rows.grad_row + c * width, sum[c][there]);
}

template <int R, int N>
VOXTRAST_INLINE void backward_keys(const CorrelationRows& rows, int64_t dz, int64_t dy, int64_t strip) {
  float* gradient = rows.grad_key + dz * rows.grad_plane + dy * rows.grad_row;
  int64_t channel = 0;
  for (; channel + 2 <= rows.channels; channel += 2) add_to_keys<R, N, 2>(rows, strip, channel, gradient);
  if (channel < rows.channels) add_to_keys<R, N, 1>(rows, strip, channel, gradient);
}

template <int R, int N>
void backward_rows(const CorrelationRows& given) {
  const CorrelationRows rows = given;
  if (rows.grad_query != nullptr)
    for (int64_t n = 0; n < rows.channels * R * padded_width(rows); n += kLanes) store(rows.grad_query + n, Vector{});
  for (int64_t dz = 0; dz < rows.planes; ++dz) {
    for (int64_t dy = 0; dy <= 2 * rows.radius; dy += N) {
      // Keys follow as soon as the queries in their reach are done: slopes are then still in the cache.
      const int64_t reach = (rows.radius + kLanes - 1) / kLanes;
      for (int64_t strip = 0; strip < rows.strips + reach; ++strip) {
        if (strip < rows.strips) backward_queries<R, N>(rows, dz, dy, strip);
        if (strip >= reach && rows.grad_key != nullptr) backward_keys<R, N>(rows, dz, dy, strip - reach);
      }
    }
  }
}

void scale_row(const float* from, int64_t count, float factor, float* to) {
  int64_t x = 0;
  for (; x + kLanes <= count; x += kLanes) store(to + x, load(from + x) * factor);
  for (; x < count; ++x) to[x] = from[x] * factor;
}

void add_row(const float* from, int64_t count, float factor, float* to) {
  int64_t x = 0;
  for (; x + kLanes <= count; x += kLanes) store(to + x, load(from + x) * factor + load(to + x));
  for (; x < count; ++x) to[x] += from[x] * factor;
}

int64_t rows_of(int64_t radius) {
  constexpr int64_t kRows[] = {VOXTRAST_ROWS_1, VOXTRAST_ROWS_2, VOXTRAST_ROWS_3, VOXTRAST_ROWS_4};
  return radius <= 4 ? kRows[radius - 1] : kAnyRows;
}

void forward(const CorrelationRows& rows) {
  if (rows.radius == 1) return forward_rows<VOXTRAST_ROWS_1, 3>(rows);
  if (rows.radius == 2) return forward_rows<VOXTRAST_ROWS_2, 5>(rows);
  if (rows.radius == 3) return forward_rows<VOXTRAST_ROWS_3, 7>(rows);
  if (rows.radius == 4) return forward_rows<VOXTRAST_ROWS_4, 9>(rows);
  return forward_rows<kAnyRows, 1>(rows);
}

void backward(const CorrelationRows& rows) {
  if (rows.radius == 1) return backward_rows<VOXTRAST_ROWS_1, 3>(rows);
  if (rows.radius == 2) return backward_rows<VOXTRAST_ROWS_2, 5>(rows);
  if (rows.radius == 3) return backward_rows<VOXTRAST_ROWS_3, 7>(rows);
  if (rows.radius == 4) return backward_rows<VOXTRAST_ROWS_4, 9>(rows);
  return backward_rows<kAnyRows, 1>(rows);
}

}  // namespace

const CorrelationPath VOXTRAST_PATH = {kLanes, rows_of, forward, backward, scale_row, add_row};

}  // namespace voxtrast
