// voxtrast::local_correlation and its gradients on the CPU. What is computed: kernels/local_correlation.py.
//
// The volume is cut into boxes of rows. The keys in reach of a box are copied into a tile that stays in the second-level
// cache: float32, the channels of a row side by side, zeros beyond the volume. Their gradients are summed in a tile
// like it and then added to the map. Boxes that reach the same keys have different colours, and one colour is worked
// off after the other: nothing is added by two threads at once, and every sum has one order, whatever their number.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <type_traits>
#include <vector>

#include "interpolation.h"
#include "local_correlation_rows.h"

namespace voxtrast {
namespace {

using torch::stable::parallel_for;
using torch::stable::Tensor;

constexpr double kLog2E = 1.4426950408889634;
constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();
constexpr int64_t kTileFloats = 96 * 1024;  // with that of its gradients, a tile stays in the second-level cache

int64_t divide_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit; }
int64_t round_up(int64_t count, int64_t unit) { return divide_up(count, unit) * unit; }

// A box of rows of one of the batch x units problems, and the planes of keys in its reach.
struct Box {
  int64_t item, first_plane, last_plane, first_row, last_row;
  int64_t first_key_plane, last_key_plane;
};

// How a volume is cut. A map of two axes has one plane.
struct Layout {
  const CorrelationPath& path = correlation_path();
  int64_t axes, batch, units, channels, depth, height, width;
  float scale;
  int64_t radius, plane_radius;
  int64_t rows, strips;                // rows of a block, registers along a row
  int64_t box_planes, box_rows;        // of a box
  int64_t boxes_deep, boxes_high;      // of a volume
  int64_t tile_planes, tile_rows;      // of the tile of keys and that of their gradients
  int64_t pitch, line, gradient_line;  // a line is a row of all channels, of `pitch` numbers each in the tile of keys
  std::vector<float> column_edge;      // (2 radius + 1, lanes)

  Layout(const Tensor& query, int64_t radius_given, int64_t units_given, double scale_given)
      : axes(query.dim() - 2),
        batch(query.size(0)),
        units(units_given),
        channels(query.size(1) / units),
        depth(axes == 3 ? query.size(2) : 1),
        height(query.size(axes)),
        width(query.size(axes + 1)),
        scale(static_cast<float>(scale_given)) {
    // Further offsets lie outside from every voxel.
    radius = std::max<int64_t>(1, std::min(radius_given, std::max({depth, height, width}) - 1));
    plane_radius = axes == 3 ? radius : 0;
    rows = path.rows(radius);
    strips = divide_up(width, path.lanes);
    pitch = lanes() + 2 * radius;
    line = odd_lines(channels * pitch);
    gradient_line = odd_lines(channels * lanes());
    // Between boxes of one colour lies another box, which the keys in reach of both share.
    box_planes = std::max<int64_t>(4, 2 * plane_radius);
    box_rows = round_up(2 * radius, rows);
    tile_planes = std::min(depth, box_planes + 2 * plane_radius);
    // The higher a box, the fewer rows are copied for two, until the tiles leave the cache.
    while (box_rows < height && tile_planes * (2 * box_rows + 2 * radius) * line <= kTileFloats) box_rows *= 2;
    tile_rows = box_rows + 2 * radius;
    boxes_deep = divide_up(depth, box_planes);
    boxes_high = divide_up(height, box_rows);
    column_edge.resize((2 * radius + 1) * lanes());
    for (int64_t dx = 0; dx <= 2 * radius; ++dx)
      for (int64_t x = 0; x < width; ++x) column_edge[dx * lanes() + x] = edge(x + dx - radius, width);
  }

  int64_t items() const { return batch * units; }
  int64_t points() const { return depth * height * width; }
  int64_t lanes() const { return strips * path.lanes; }
  int64_t padded_lanes() const { return lanes() + 2 * path.lanes; }
  int64_t row(int64_t item, int64_t channel, int64_t z, int64_t y) const {
    return (((item * channels + channel) * depth + z) * height + y) * width;
  }

  Box box(int64_t item, int64_t deep, int64_t high) const {
    const int64_t plane = deep * box_planes, row = high * box_rows, last_plane = std::min(depth, plane + box_planes);
    return {item, plane, last_plane, row, std::min(height, row + box_rows), std::max<int64_t>(0, plane - plane_radius),
            std::min(depth, last_plane + plane_radius)};
  }
  // Of row y of plane z in the tiles of a box.
  int64_t tile_line(const Box& box, int64_t z, int64_t y) const {
    return (z - box.first_key_plane) * tile_rows + y - box.first_row + radius;
  }

  static float edge(int64_t here, int64_t size) { return here < 0 || here >= size ? kNegativeInfinity : 0.0f; }

 private:
  // An odd number of cache lines: neighbouring rows must not share sets of the cache.
  static int64_t odd_lines(int64_t floats) {
    constexpr int64_t kCacheLine = 16;
    return (divide_up(floats, kCacheLine) | 1) * kCacheLine;
  }
};

template <typename From, typename To>
void scale_row(const CorrelationPath& path, const From* from, int64_t count, float factor, To* to) {
  if constexpr (std::is_same_v<From, float> && std::is_same_v<To, float>) {
    path.scale_row(from, count, factor, to);
  } else {
    for (int64_t x = 0; x < count; ++x) to[x] = static_cast<To>(static_cast<float>(from[x]) * factor);
  }
}

// What a thread needs for its boxes and their blocks of rows. voxel_parts: of CorrelationRows::voxels.
class Scratch {
 public:
  CorrelationRows rows = {};

  Scratch(const Layout& layout, int64_t voxel_parts, bool need_query, bool need_key)
      : layout_(layout),
        query_(layout.channels * layout.rows * layout.padded_lanes()),
        voxels_(voxel_parts * layout.rows * layout.padded_lanes()),
        logits_((2 * layout.radius + 1) * layout.rows * 9 * layout.padded_lanes()),
        row_edge_(layout.tile_rows),
        key_(layout.tile_planes * layout.tile_rows * layout.line),
        grad_query_(need_query ? layout.channels * layout.rows * layout.padded_lanes() : 0),
        grad_key_(need_key ? layout.tile_planes * layout.tile_rows * layout.gradient_line : 0) {
    rows.strips = layout.strips;
    rows.channels = layout.channels;
    rows.radius = layout.radius;
    rows.pitch = layout.pitch;
    rows.row = layout.line;
    rows.plane = layout.tile_rows * layout.line;
    rows.grad_row = layout.gradient_line;
    rows.grad_plane = layout.tile_rows * layout.gradient_line;
    rows.column_edge = layout.column_edge.data();
    rows.query = query_.data();
    rows.voxels = voxels_.data();
    rows.logits = rows.slopes = logits_.data();
    if (need_query) rows.grad_query = grad_query_.data();
  }

  // Copies the keys in reach, and clears their gradients.
  template <typename T>
  void take(const Box& box, const T* key) {
    std::fill(grad_key_.begin(), grad_key_.end(), 0.0f);
    for (int64_t n = 0; n < layout_.tile_rows; ++n)
      row_edge_[n] = Layout::edge(box.first_row - layout_.radius + n, layout_.height);
    for (int64_t z = box.first_key_plane; z < box.last_key_plane; ++z)
      for (int64_t y = box.first_row - layout_.radius; y < box.first_row + layout_.box_rows + layout_.radius; ++y) {
        float* line = key_.data() + layout_.tile_line(box, z, y) * layout_.line;
        std::fill(line, line + layout_.line, 0.0f);
        if (y < 0 || y >= layout_.height) continue;
        for (int64_t c = 0; c < layout_.channels; ++c)
          scale_row(layout_.path, key + layout_.row(box.item, c, z, y), layout_.width, 1.0f,
                    line + c * layout_.pitch + layout_.radius);
      }
  }

  // Calls work(z, y) for every block of rows of a box, its queries taken.
  template <typename T, typename Work>
  void each_block(const Box& box, const T* query, const Work& work) {
    const float factor = static_cast<float>(layout_.scale * kLog2E);
    for (int64_t z = box.first_plane; z < box.last_plane; ++z)
      for (int64_t y = box.first_row; y < box.last_row; y += layout_.rows) {
        const int64_t first = std::max<int64_t>(0, z - layout_.plane_radius);
        const int64_t line = layout_.tile_line(box, first, y - layout_.radius);
        count_ = std::min(layout_.rows, box.last_row - y);
        rows.first_plane = first - z;
        rows.planes = std::min(layout_.depth, z + layout_.plane_radius + 1) - first;
        rows.key = key_.data() + line * layout_.line;
        rows.row_edge = row_edge_.data() + y - box.first_row;
        if (!grad_key_.empty()) rows.grad_key = grad_key_.data() + line * layout_.gradient_line;
        if (count_ < layout_.rows) std::fill(query_.begin(), query_.end(), 0.0f);
        for (int64_t c = 0; c < layout_.channels; ++c)
          each_row(c, query + layout_.row(box.item, c, z, y), query_.data(), [&](const T* from, float* to) {
            scale_row(layout_.path, from, layout_.width, factor, to);
          });
        work(z, y);
      }
  }

  // Calls work(row of the map, row of the array) for every row of the block in a (parts, rows, width) array; map is the
  // block's first row in that part of a map.
  template <typename T, typename Work>
  void each_row(int64_t part, T* map, float* array, const Work& work) const {
    for (int64_t y = 0; y < count_; ++y)
      work(map + y * layout_.width,
           array + (part * layout_.rows + y) * layout_.padded_lanes() + layout_.path.lanes);
  }
  void clear_voxels() { std::fill(voxels_.begin(), voxels_.end(), 0.0f); }

  // gradient (channels of all problems, *S) += the tile of gradients.
  void add_to(const Box& box, float* gradient) const {
    const float factor = static_cast<float>(1.0 / kLog2E);  // the queries were multiplied by log2(e)
    const int64_t first = std::max<int64_t>(0, box.first_row - layout_.radius);
    const int64_t last = std::min(layout_.height, box.first_row + layout_.box_rows + layout_.radius);
    for (int64_t z = box.first_key_plane; z < box.last_key_plane; ++z)
      for (int64_t y = first; y < last; ++y)
        for (int64_t c = 0; c < layout_.channels; ++c) {
          const float* from =
              grad_key_.data() + layout_.tile_line(box, z, y) * layout_.gradient_line + c * layout_.lanes();
          layout_.path.add_row(from, layout_.width, factor, gradient + layout_.row(box.item, c, z, y));
        }
  }

 private:
  const Layout& layout_;
  int64_t count_ = 0;  // rows of the block inside the volume
  std::vector<float> query_, voxels_, logits_, row_edge_, key_, grad_query_, grad_key_;
};

struct Outputs {
  float *displacement, *log_sum_exp, *mean;  // mean: (B, J * D, *S); of one unit it is the displacement
};

template <typename T>
void forward(const Layout& layout, const T* query, const T* key, const Outputs& out) {
  const int64_t boxes = layout.boxes_deep * layout.boxes_high, points = layout.points();
  float* means = layout.units == 1 ? out.displacement : out.mean;
  parallel_for(0, layout.items() * boxes, 1, [&](int64_t begin, int64_t end) {
    Scratch scratch(layout, 4, false, false);
    for (int64_t n = begin; n < end; ++n) {
      const Box box = layout.box(n / boxes, n % boxes / layout.boxes_high, n % layout.boxes_high);
      scratch.take(box, key);
      scratch.each_block(box, query, [&](int64_t z, int64_t y) {
        layout.path.forward(scratch.rows);
        const int64_t place = (z * layout.height + y) * layout.width;
        const auto write = [&](int64_t part, float* map, float factor) {
          scratch.each_row(part, map + place, scratch.rows.voxels, [&](float* to, const float* from) {
            layout.path.scale_row(from, layout.width, factor, to);
          });
        };
        write(0, out.log_sum_exp + box.item * points, static_cast<float>(1.0 / kLog2E));
        for (int64_t axis = 0; axis < layout.axes; ++axis)
          write(axis + 4 - layout.axes, means + (box.item * layout.axes + axis) * points, 1.0f);
      });
    }
  });
}

// displacement (B, D, *S) = mean over the units of mean (B, J * D, *S)
void average_units(const Layout& layout, const float* mean, float* displacement) {
  const int64_t points = layout.axes * layout.points();
  parallel_for(0, layout.batch * points, grain(layout.units), [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const float* first = mean + n / points * layout.units * points + n % points;
      float sum = 0.0f;
      for (int64_t unit = 0; unit < layout.units; ++unit) sum += first[unit * points];
      displacement[n] = sum / static_cast<float>(layout.units);
    }
  });
}

struct Saved {
  const float *upstream, *log_sum_exp, *mean;
};

// The voxels of a block for backward: log-sum-exp, upstream gradients and their product with the mean; zeros elsewhere.
void take_gradients(const Layout& layout, const Saved& in, int64_t item, int64_t place, Scratch& scratch) {
  const int64_t points = layout.points();
  const float share = 1.0f / static_cast<float>(layout.units);
  float* voxels = scratch.rows.voxels;
  scratch.clear_voxels();
  scratch.each_row(0, in.log_sum_exp + item * points + place, voxels, [&](const float* from, float* to) {
    layout.path.scale_row(from, layout.width, static_cast<float>(kLog2E), to);
  });
  for (int64_t axis = 0; axis < layout.axes; ++axis) {
    const float* upstream = in.upstream + (item / layout.units * layout.axes + axis) * points;
    const float* mean = in.mean + (item * layout.axes + axis) * points;
    scratch.each_row(axis + 4 - layout.axes, upstream + place, voxels,
                     [&](const float* from, float* to) { layout.path.scale_row(from, layout.width, share, to); });
    scratch.each_row(4, upstream + place, voxels, [&](const float* from, float* to) {
      const float* offset = mean + (from - upstream);
      for (int64_t x = 0; x < layout.width; ++x) to[x] += share * from[x] * offset[x];
    });
  }
}

// Gradients of query and key, the latter added to grad_key. Either may be null.
template <typename T>
void backward(const Layout& layout, const T* query, const T* key, const Saved& in, T* grad_query, float* grad_key) {
  for (int64_t colour = 0; colour < 4; ++colour) {
    const int64_t deep = (layout.boxes_deep + 1 - colour / 2) / 2, high = (layout.boxes_high + 1 - colour % 2) / 2;
    parallel_for(0, layout.items() * deep * high, 1, [&](int64_t begin, int64_t end) {
      Scratch scratch(layout, 5, grad_query != nullptr, grad_key != nullptr);
      for (int64_t n = begin; n < end; ++n) {
        const Box box = layout.box(n / (deep * high), n / high % deep * 2 + colour / 2, n % high * 2 + colour % 2);
        scratch.take(box, key);
        scratch.each_block(box, query, [&](int64_t z, int64_t y) {
          take_gradients(layout, in, box.item, (z * layout.height + y) * layout.width, scratch);
          layout.path.backward(scratch.rows);
          if (grad_query == nullptr) return;
          for (int64_t c = 0; c < layout.channels; ++c)
            scratch.each_row(c, grad_query + layout.row(box.item, c, z, y), scratch.rows.grad_query,
                             [&](T* to, const float* from) {
                               scale_row(layout.path, from, layout.width, layout.scale, to);
                             });
        });
        if (grad_key != nullptr) scratch.add_to(box, grad_key);
      }
    });
  }
}

void check(const Tensor& query, const Tensor& key, int64_t radius, int64_t units) {
  STD_TORCH_CHECK(query.dim() == 4 || query.dim() == 5, "voxtrast: query must have 4 or 5 axes, got ", query.dim());
  STD_TORCH_CHECK(query.scalar_type() == key.scalar_type() && query.dim() == key.dim() && query.numel() == key.numel(),
                  "voxtrast: query and key must have one shape and type");
  STD_TORCH_CHECK(query.numel() > 0 && radius >= 1 && units >= 1 && query.size(1) % units == 0,
                  "voxtrast: query is empty, or radius ", radius, " or units ", units, " is out of range");
}

std::tuple<Tensor, Tensor, Tensor> local_correlation(const Tensor& query_given, const Tensor& key_given, int64_t radius,
                                                     int64_t units, double scale) {
  check(query_given, key_given, radius, units);
  const Tensor query = torch::stable::contiguous(query_given), key = torch::stable::contiguous(key_given);
  const Layout layout(query, radius, units, scale);
  std::vector<int64_t> shape(query.sizes().begin(), query.sizes().end());
  const auto new_map = [&](int64_t components) {
    shape[1] = components;
    return torch::stable::new_empty(query, shape, torch::headeronly::ScalarType::Float);
  };
  Tensor displacement = new_map(layout.axes), log_sum_exp = new_map(units);
  Tensor mean = units == 1 ? torch::stable::new_empty(displacement, {0}) : new_map(units * layout.axes);
  const Outputs out{displacement.mutable_data_ptr<float>(), log_sum_exp.mutable_data_ptr<float>(),
                    mean.mutable_data_ptr<float>()};
  with_element_type(query, "query", [&](auto element) {
    using T = decltype(element);
    forward(layout, query.const_data_ptr<T>(), key.const_data_ptr<T>(), out);
  });
  if (units > 1) average_units(layout, out.mean, out.displacement);
  return {displacement, log_sum_exp, mean};
}

// Gradients of query and key; an empty tensor stands for one that is not needed. mean: of one unit, the displacement.
std::tuple<Tensor, Tensor> local_correlation_backward(const Tensor& grad_given, const Tensor& query_given,
                                                      const Tensor& key_given, const Tensor& log_sum_exp_given,
                                                      const Tensor& mean_given, int64_t radius, int64_t units,
                                                      double scale, bool need_query, bool need_key) {
  check(query_given, key_given, radius, units);
  const Tensor query = torch::stable::contiguous(query_given), key = torch::stable::contiguous(key_given);
  const Tensor grad = torch::stable::contiguous(grad_given), mean = torch::stable::contiguous(mean_given);
  const Tensor log_sum_exp = torch::stable::contiguous(log_sum_exp_given);
  const Layout layout(query, radius, units, scale);
  const Saved in{float_data(grad, layout.batch * layout.axes * layout.points(), "grad_displacement"),
                 float_data(log_sum_exp, layout.items() * layout.points(), "log_sum_exp"),
                 float_data(mean, layout.items() * layout.axes * layout.points(), "mean")};
  Tensor grad_query = need_query ? torch::stable::new_empty(query, query.sizes()) : torch::stable::new_empty(query, {0});
  // float32 until all is added
  Tensor sums = need_key ? torch::stable::new_zeros(key, key.sizes(), torch::headeronly::ScalarType::Float)
                         : torch::stable::new_empty(key, {0});
  Tensor grad_key = sums;
  with_element_type(query, "query", [&](auto element) {
    using T = decltype(element);
    backward(layout, query.const_data_ptr<T>(), key.const_data_ptr<T>(), in,
             need_query ? grad_query.mutable_data_ptr<T>() : nullptr,
             need_key ? sums.mutable_data_ptr<float>() : nullptr);
    if (need_key && !std::is_same_v<T, float>) {
      grad_key = torch::stable::new_empty(key, key.sizes());
      const float* from = sums.const_data_ptr<float>();
      T* to = grad_key.mutable_data_ptr<T>();
      parallel_for(0, key.numel(), grain(1), [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) to[n] = static_cast<T>(from[n]);
      });
    }
  });
  return {grad_query, grad_key};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(voxtrast, CPU, library) {
  library.impl("local_correlation", TORCH_BOX(&local_correlation));
  library.impl("local_correlation_backward", TORCH_BOX(&local_correlation_backward));
}

}  // namespace voxtrast
