// voxtrast::local_correlation and its gradients on the CPU. What is computed: kernels/local_correlation.py.
//
// The keys of a unit are copied once, in float32, with a border of zeros and the channels of a row side by side. The
// volume is cut into boxes of rows. A box of queries adds to the gradients of the keys in its reach; boxes that touch
// the same keys have different colours, and one colour is worked off after the other: nothing is added by two threads
// at once, and every sum has one order, whatever the number of threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <tuple>
#include <vector>

#include "interpolation.h"
#include "local_correlation_rows.h"
#include "memory.h"

namespace voxtrast {
namespace {

using torch::stable::parallel_for;
using torch::stable::Tensor;

constexpr double kLog2E = 1.4426950408889634;
constexpr float kNegativeInfinity = -std::numeric_limits<float>::infinity();

int64_t divide_up(int64_t count, int64_t unit) { return (count + unit - 1) / unit; }
int64_t round_up(int64_t count, int64_t unit) { return divide_up(count, unit) * unit; }

// How the volumes of `items` = batch x units problems are padded and cut. A map of two axes has one plane.
struct Layout {
  const CorrelationPath& path = correlation_path();
  int64_t axes, batch, units, channels, depth, height, width;
  float scale;
  int64_t radius, plane_radius;
  int64_t rows, strips;                  // rows of a block, registers along a row
  int64_t pitch, padded_height, plane;   // of the padded key, in floats, rows and floats
  int64_t box_planes, box_rows;          // of a box
  int64_t boxes_deep, boxes_high;
  std::vector<float> column_edge, row_edge;

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
    pitch = strips * path.lanes + 2 * radius;
    padded_height = round_up(height, rows) + 2 * radius;
    plane = padded_height * channels * pitch;
    // Between boxes of one colour lies another box, which the keys in reach of both share.
    box_planes = std::max<int64_t>(4, 2 * plane_radius);
    box_rows = round_up(std::max<int64_t>(16, 2 * radius), rows);
    boxes_deep = divide_up(depth, box_planes);
    boxes_high = divide_up(height, box_rows);
    make_edges();
  }

  int64_t items() const { return batch * units; }
  int64_t points() const { return depth * height * width; }
  int64_t lanes() const { return strips * path.lanes; }
  int64_t padded_floats() const { return items() * depth * plane; }
  // Row y of the padded key holds row y - radius.
  int64_t padded_row(int64_t item, int64_t z, int64_t y) const {
    return (item * depth + z) * plane + y * channels * pitch;
  }
  int64_t row(int64_t item, int64_t channel, int64_t z, int64_t y) const {
    return (((item * channels + channel) * depth + z) * height + y) * width;
  }

 private:
  void make_edges() {
    const auto outside = [](int64_t here, int64_t size) { return here < 0 || here >= size ? kNegativeInfinity : 0.0f; };
    column_edge.resize((2 * radius + 1) * lanes());
    for (int64_t dx = 0; dx <= 2 * radius; ++dx)
      for (int64_t x = 0; x < width; ++x) column_edge[dx * lanes() + x] = outside(x + dx - radius, width);
    row_edge.resize(padded_height);
    for (int64_t y = 0; y < padded_height; ++y) row_edge[y] = outside(y - radius, height);
  }
};

// A map of voxels, whose rows come and go as float32.
template <typename T>
void load_row(const T* from, int64_t count, float factor, float* to) {
  for (int64_t x = 0; x < count; ++x) to[x] = static_cast<float>(from[x]) * factor;
}

template <typename T>
void pad_key(const Layout& layout, const T* key, float* padded) {
  const int64_t lines = layout.items() * layout.depth * layout.padded_height;
  parallel_for(0, lines, grain(layout.channels * layout.pitch), [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const int64_t y = line % layout.padded_height - layout.radius, plane = line / layout.padded_height;
      float* target = padded + line * layout.channels * layout.pitch;
      std::fill(target, target + layout.channels * layout.pitch, 0.0f);
      if (y < 0 || y >= layout.height) continue;
      for (int64_t c = 0; c < layout.channels; ++c)
        load_row(key + layout.row(plane / layout.depth, c, plane % layout.depth, y), layout.width, 1.0f,
                 target + c * layout.pitch + layout.radius);
    }
  });
}

template <typename T>
void unpad_gradient(const Layout& layout, const float* padded, T* gradient) {
  const float factor = static_cast<float>(1.0 / kLog2E);  // the queries were multiplied by log2(e)
  const int64_t lines = layout.items() * layout.depth * layout.height;
  parallel_for(0, lines, grain(layout.channels * layout.pitch), [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const int64_t y = line % layout.height, plane = line / layout.height;
      const int64_t item = plane / layout.depth, z = plane % layout.depth;
      for (int64_t c = 0; c < layout.channels; ++c) {
        const float* from = padded + layout.padded_row(item, z, y + layout.radius) + c * layout.pitch + layout.radius;
        T* to = gradient + layout.row(item, c, z, y);
        for (int64_t x = 0; x < layout.width; ++x) to[x] = static_cast<T>(from[x] * factor);
      }
    }
  });
}

// What a thread needs for a block of rows, and the block's place.
class Block {
 public:
  CorrelationRows rows = {};

  Block(const Layout& layout, int64_t voxel_parts)
      : layout_(layout),
        query_(layout.channels * layout.rows * layout.lanes()),
        voxels_(voxel_parts * layout.rows * layout.lanes()),
        logits_((2 * layout.radius + 1) * layout.rows * 9 * layout.path.lanes) {
    rows.strips = layout.strips;
    rows.channels = layout.channels;
    rows.radius = layout.radius;
    rows.pitch = layout.pitch;
    rows.plane = layout.plane;
    rows.column_edge = layout.column_edge.data();
    rows.query = query_.data();
    rows.voxels = voxels_.data();
    rows.logits = logits_.data();
  }

  template <typename T>
  void take(const T* query, const float* padded_key, int64_t item, int64_t z, int64_t y) {
    count_ = std::min(layout_.rows, layout_.height - y);
    rows.first_plane = -std::min(z, layout_.plane_radius);
    rows.planes = std::min(layout_.depth - 1 - z, layout_.plane_radius) - rows.first_plane + 1;
    rows.key = padded_key + layout_.padded_row(item, z + rows.first_plane, y);
    rows.row_edge = layout_.row_edge.data() + y;
    std::fill(query_.begin(), query_.end(), 0.0f);
    const float factor = static_cast<float>(layout_.scale * kLog2E);
    for (int64_t c = 0; c < layout_.channels; ++c)
      each_piece(c, layout_.channels, query + layout_.row(item, c, z, y), query_.data(),
                 [&](const T* from, float* to, int64_t count) { load_row(from, count, factor, to); });
  }

  // Calls work(voxels of the map, lanes of the block, count) for every piece of row y of a (strips, parts, rows, lanes)
  // array; map is the block's first row of that part.
  template <typename T, typename Work>
  void each_piece(int64_t part, int64_t parts, T* map, float* array, const Work& work) const {
    const int64_t lanes = layout_.path.lanes;
    for (int64_t strip = 0; strip < layout_.strips; ++strip)
      for (int64_t y = 0; y < count_; ++y)
        work(map + y * layout_.width + strip * lanes, array + ((strip * parts + part) * layout_.rows + y) * lanes,
             std::min(lanes, layout_.width - strip * lanes));
  }

 private:
  const Layout& layout_;
  int64_t count_ = 0;  // rows inside the volume
  std::vector<float> query_, voxels_, logits_;
};

// Calls work(block, item, z, y) for every block of rows in box `box` of a problem.
template <typename Work>
void each_block(const Layout& layout, int64_t item, int64_t deep, int64_t high, const Work& work) {
  const int64_t last_plane = std::min(layout.depth, (deep + 1) * layout.box_planes);
  const int64_t last_row = std::min(layout.height, (high + 1) * layout.box_rows);
  for (int64_t z = deep * layout.box_planes; z < last_plane; ++z)
    for (int64_t y = high * layout.box_rows; y < last_row; y += layout.rows) work(item, z, y);
}

struct Outputs {
  float *displacement, *log_sum_exp, *mean;  // mean: (B, J * D, *S); of one unit it is the displacement
};

template <typename T>
void forward(const Layout& layout, const T* query, const float* padded_key, const Outputs& out) {
  const int64_t boxes = layout.boxes_deep * layout.boxes_high, points = layout.points();
  float* means = layout.units == 1 ? out.displacement : out.mean;
  parallel_for(0, layout.items() * boxes, 1, [&](int64_t begin, int64_t end) {
    Block block(layout, 4);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t box = n % boxes;
      each_block(layout, n / boxes, box / layout.boxes_high, box % layout.boxes_high,
                 [&](int64_t item, int64_t z, int64_t y) {
                   block.take(query, padded_key, item, z, y);
                   layout.path.forward(block.rows);
                   const int64_t place = (z * layout.height + y) * layout.width;
                   block.each_piece(0, 4, out.log_sum_exp + item * points + place, block.rows.voxels,
                                    [](float* to, const float* from, int64_t count) {
                                      for (int64_t x = 0; x < count; ++x) to[x] = from[x] / static_cast<float>(kLog2E);
                                    });
                   for (int64_t axis = 0; axis < layout.axes; ++axis)
                     block.each_piece(axis + 4 - layout.axes, 4, means + (item * layout.axes + axis) * points + place,
                                      block.rows.voxels, [](float* to, const float* from, int64_t count) {
                                        std::copy(from, from + count, to);
                                      });
                 });
    }
  });
}

// displacement (B, D, *S) = mean over the units of mean (B, J * D, *S)
void average_units(const Layout& layout, const float* mean, float* displacement) {
  const int64_t points = layout.axes * layout.points();
  constexpr int64_t kStretch = 4096;
  const int64_t stretches = divide_up(points, kStretch);
  parallel_for(0, layout.batch * stretches, 4, [&](int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const int64_t item = n / stretches, first = n % stretches * kStretch, last = std::min(first + kStretch, points);
      float* to = displacement + item * points;
      for (int64_t p = first; p < last; ++p) {
        float sum = 0.0f;
        for (int64_t unit = 0; unit < layout.units; ++unit) sum += mean[(item * layout.units + unit) * points + p];
        to[p] = sum / static_cast<float>(layout.units);
      }
    }
  });
}

struct Gradients {
  const float *displacement, *log_sum_exp, *mean;  // the upstream gradient, and what forward saved
};

// voxels of a block for backward: log-sum-exp, upstream gradients and their product with the mean; zeros elsewhere.
void take_gradients(const Layout& layout, const Gradients& in, int64_t item, int64_t place, Block& block) {
  const int64_t points = layout.points();
  const float share = 1.0f / static_cast<float>(layout.units);
  std::fill(block.rows.voxels, block.rows.voxels + 5 * layout.rows * layout.lanes(), 0.0f);
  block.each_piece(0, 5, in.log_sum_exp + item * points + place, block.rows.voxels,
                   [](const float* from, float* to, int64_t count) {
                     load_row(from, count, static_cast<float>(kLog2E), to);
                   });
  for (int64_t axis = 0; axis < layout.axes; ++axis) {
    const float* upstream = in.displacement + (item / layout.units * layout.axes + axis) * points;
    const float* mean = in.mean + (item * layout.axes + axis) * points;
    block.each_piece(axis + 4 - layout.axes, 5, upstream + place, block.rows.voxels,
                     [&](const float* from, float* to, int64_t count) { load_row(from, count, share, to); });
    block.each_piece(4, 5, upstream + place, block.rows.voxels, [&](const float* from, float* to, int64_t count) {
      const float* offset = mean + (from - upstream);
      for (int64_t x = 0; x < count; ++x) to[x] += share * from[x] * offset[x];
    });
  }
}

// Gradients of the query, and of the padded key, which holds zeros on entry. Either may be null.
template <typename T>
void backward(const Layout& layout, const T* query, const float* padded_key, const Gradients& in, T* grad_query,
              float* grad_key) {
  // One colour after the other: no two boxes of a colour reach the same keys.
  for (int64_t colour = 0; colour < 4; ++colour) {
    const int64_t deep = (layout.boxes_deep + 1 - colour / 2) / 2, high = (layout.boxes_high + 1 - colour % 2) / 2;
    parallel_for(0, layout.items() * deep * high, 1, [&](int64_t begin, int64_t end) {
      Block block(layout, 5);
      std::vector<float> gradient(grad_query == nullptr ? 0 : layout.channels * layout.rows * layout.lanes());
      if (grad_query != nullptr) block.rows.grad_query = gradient.data();
      for (int64_t n = begin; n < end; ++n) {
        const int64_t box = n % (deep * high);
        each_block(layout, n / (deep * high), 2 * (box / high) + colour / 2, 2 * (box % high) + colour % 2,
                   [&](int64_t item, int64_t z, int64_t y) {
                     block.take(query, padded_key, item, z, y);
                     take_gradients(layout, in, item, (z * layout.height + y) * layout.width, block);
                     if (grad_key != nullptr) block.rows.grad_key = grad_key + (block.rows.key - padded_key);
                     layout.path.backward(block.rows);
                     if (grad_query == nullptr) return;
                     for (int64_t c = 0; c < layout.channels; ++c)
                       block.each_piece(c, layout.channels, grad_query + layout.row(item, c, z, y), gradient.data(),
                                        [&](T* to, const float* from, int64_t count) {
                                          for (int64_t x = 0; x < count; ++x)
                                            to[x] = static_cast<T>(from[x] * layout.scale);
                                        });
                   });
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

// Zeros of a page each come from the system when they are first touched, by the thread that touches them.
struct FreeFloats {
  void operator()(float* memory) const { std::free(memory); }
};
using Floats = std::unique_ptr<float[], FreeFloats>;

Floats floats(int64_t count, bool zero) {
  Floats result(static_cast<float*>(zero ? std::calloc(count, sizeof(float)) : std::malloc(count * sizeof(float))));
  STD_TORCH_CHECK(result != nullptr, "voxtrast: no memory for ", count, " numbers of a padded map");
  prefer_large_pages(result.get(), count * int64_t(sizeof(float)));
  return result;
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
    const Floats padded = floats(layout.padded_floats(), false);
    pad_key(layout, key.const_data_ptr<T>(), padded.get());
    forward(layout, query.const_data_ptr<T>(), padded.get(), out);
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
  const Gradients in{float_data(grad, layout.batch * layout.axes * layout.points(), "grad_displacement"),
                     float_data(log_sum_exp, layout.items() * layout.points(), "log_sum_exp"),
                     float_data(mean, layout.items() * layout.axes * layout.points(), "mean")};
  const auto new_gradient = [](const Tensor& like, bool needed) {
    return needed ? torch::stable::new_empty(like, like.sizes()) : torch::stable::new_empty(like, {0});
  };
  Tensor grad_query = new_gradient(query, need_query), grad_key = new_gradient(key, need_key);
  with_element_type(query, "query", [&](auto element) {
    using T = decltype(element);
    const Floats padded = floats(layout.padded_floats(), false);
    const Floats grad_padded = need_key ? floats(layout.padded_floats(), true) : Floats();
    pad_key(layout, key.const_data_ptr<T>(), padded.get());
    backward(layout, query.const_data_ptr<T>(), padded.get(), in,
             need_query ? grad_query.mutable_data_ptr<T>() : nullptr, grad_padded.get());
    if (need_key) unpad_gradient(layout, grad_padded.get(), grad_key.mutable_data_ptr<T>());
  });
  return {grad_query, grad_key};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(voxtrast, CPU, library) {
  library.impl("local_correlation", TORCH_BOX(&local_correlation));
  library.impl("local_correlation_backward", TORCH_BOX(&local_correlation_backward));
}

}  // namespace voxtrast
