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

// 2^x for x <= 0 or little more: 0 below 2^-100, which no sum of at least 1 would notice. NaN stays NaN.
VOXTRAST_INLINE Vector power_or_zero(Vector x) {
  const Vector magic = x + kMagic;
  const Vector result = power(magic, x - (magic - kMagic));
  const Integers vanishes = x < -100.0f;
  return vanishes ? Vector{} : result;
}

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

// dot[y][w] = <query(y), key(y + w)> for R rows of queries and N rows of the window, -infinity for keys outside.
// query (channels, R, lanes); key: first row of the window of the first query, at the offset along the row.
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
  const int64_t row = rows.channels * rows.pitch;
  for (int64_t c = 0; c < rows.channels; ++c) {
    Vector here[R];
#pragma GCC unroll 16
    for (int y = 0; y < R; ++y) here[y] = load(query + (c * R + y) * kLanes);
#pragma GCC unroll 16
    for (int there = 0; there < R + N - 1; ++there) {
      const Vector value = load(key + there * row + c * rows.pitch);
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
void forward_rows(const CorrelationRows& rows) {
  const int64_t width = rows.strips * kLanes, window = 2 * rows.radius + 1, row = rows.channels * rows.pitch;
  for (int64_t strip = 0; strip < rows.strips; ++strip) {
    const float* query = rows.query + strip * rows.channels * R * kLanes;
    Softmax softmax[R];
    for (int y = 0; y < R; ++y) softmax[y] = {splat(kLowest), Vector{}, {Vector{}, Vector{}, Vector{}}};
    for (int64_t dz = 0; dz < rows.planes; ++dz) {
      for (int64_t dy = 0; dy < window; dy += N) {
        const float* key = rows.key + dz * rows.plane + dy * row + strip * kLanes;
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
    float* voxels = rows.voxels + strip * 4 * R * kLanes;
    for (int y = 0; y < R; ++y) {
      const Vector inverse = 1.0f / softmax[y].sum;
      store(voxels + y * kLanes, softmax[y].largest + logarithm(softmax[y].sum));
      for (int axis = 0; axis < 3; ++axis)
        store(voxels + ((axis + 1) * R + y) * kLanes, softmax[y].mean[axis] * inverse);
    }
  }
}

// Gradients of logits, from the logits: dot = 2^(dot - log-sum-exp) (along + dx across). along (R, N): the upstream
// gradients times the offset from the mean, but for its last component, which is dx - the mean's.
template <int R, int N>
VOXTRAST_INLINE void differentiate(const float* voxels, const float* along, float dx, Vector (&dot)[R][N]) {
#pragma GCC unroll 16
  for (int y = 0; y < R; ++y) {
    const Vector log_sum = load(voxels + y * kLanes), across = load(voxels + (3 * R + y) * kLanes) * dx;
#pragma GCC unroll 16
    for (int w = 0; w < N; ++w)
      dot[y][w] = power_or_zero(dot[y][w] - log_sum) * (load(along + (y * N + w) * kLanes) + across);
  }
}

template <int R, int N>
VOXTRAST_INLINE void add_to_query(const CorrelationRows& rows, const Vector (&slope)[R][N], const float* key,
                                  float* gradient) {
  const int64_t row = rows.channels * rows.pitch;
  for (int64_t c = 0; c < rows.channels; ++c) {
    Vector sum[R];
#pragma GCC unroll 16
    for (int y = 0; y < R; ++y) sum[y] = load(gradient + (c * R + y) * kLanes);
#pragma GCC unroll 16
    for (int there = 0; there < R + N - 1; ++there) {
      const Vector value = load(key + there * row + c * rows.pitch);
#pragma GCC unroll 16
      for (int y = 0; y < R; ++y)
        if (0 <= there - y && there - y < N) sum[y] = slope[y][there - y] * value + sum[y];
    }
#pragma GCC unroll 16
    for (int y = 0; y < R; ++y) store(gradient + (c * R + y) * kLanes, sum[y]);
  }
}

template <int R, int N>
VOXTRAST_INLINE void add_to_key(const CorrelationRows& rows, const Vector (&slope)[R][N], const float* query,
                                float* gradient) {
  const int64_t row = rows.channels * rows.pitch;
  for (int64_t c = 0; c < rows.channels; ++c) {
    Vector here[R];
#pragma GCC unroll 16
    for (int y = 0; y < R; ++y) here[y] = load(query + (c * R + y) * kLanes);
#pragma GCC unroll 16
    for (int there = 0; there < R + N - 1; ++there) {
      float* target = gradient + there * row + c * rows.pitch;
      Vector sum = load(target);
#pragma GCC unroll 16
      for (int y = 0; y < R; ++y)
        if (0 <= there - y && there - y < N) sum = slope[y][there - y] * here[y] + sum;
      store(target, sum);
    }
  }
}

template <int R, int N>
void backward_rows(const CorrelationRows& rows) {
  const int64_t width = rows.strips * kLanes, window = 2 * rows.radius + 1, row = rows.channels * rows.pitch;
  const int64_t block = rows.channels * R * kLanes;
  for (int64_t strip = 0; strip < rows.strips; ++strip) {
    const float* query = rows.query + strip * block;
    float* grad_query = rows.grad_query == nullptr ? nullptr : rows.grad_query + strip * block;
    if (grad_query != nullptr)
      for (int64_t n = 0; n < block; n += kLanes) store(grad_query + n, Vector{});
    const float* voxels = rows.voxels + strip * 5 * R * kLanes;
    float along[R * N * kLanes];
    for (int64_t dz = 0; dz < rows.planes; ++dz) {
      for (int64_t dy = 0; dy < window; dy += N) {
        const float plane = static_cast<float>(rows.first_plane + dz), first = static_cast<float>(dy - rows.radius);
        for (int y = 0; y < R; ++y) {
          const Vector constant =
              load(voxels + (R + y) * kLanes) * plane - load(voxels + (4 * R + y) * kLanes);
          const Vector step = load(voxels + (2 * R + y) * kLanes);
          for (int w = 0; w < N; ++w) store(along + (y * N + w) * kLanes, step * (first + w) + constant);
        }
        const int64_t corner = dz * rows.plane + dy * row + strip * kLanes;
        for (int64_t dx = 0; dx < window; ++dx) {
          Vector slope[R][N];
          products<R, N>(rows, query, rows.key + corner + dx, rows.row_edge + dy,
                         load(rows.column_edge + dx * width + strip * kLanes), slope);
          differentiate<R, N>(voxels, along, static_cast<float>(dx - rows.radius), slope);
          if (grad_query != nullptr) add_to_query<R, N>(rows, slope, rows.key + corner + dx, grad_query);
          if (rows.grad_key != nullptr) add_to_key<R, N>(rows, slope, query, rows.grad_key + corner + dx);
        }
      }
    }
  }
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

const CorrelationPath VOXTRAST_PATH = {kLanes, rows_of, forward, backward};

}  // namespace voxtrast
