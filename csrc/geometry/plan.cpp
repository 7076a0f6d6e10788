#include "plan.h"

#include <cstring>
#include <stdexcept>
#include <type_traits>
#include <utility>

namespace voxtrast {

static_assert(sizeof(int) == 4 && __BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "plans are little-endian");

namespace {

constexpr uint32_t kFormat = 0x31505856;  // "VXP1"

// Eight bytes at a time: plans with thousands of boxes are checked wherever they are decoded.
uint64_t checksum(const uint8_t* bytes, size_t count) {
  uint64_t sum = count * 0x9E3779B97F4A7C15u;
  for (size_t i = 0; i < count; i += 8) {
    uint64_t word = 0;
    std::memcpy(&word, bytes + i, count - i < 8 ? count - i : 8);
    sum = (sum ^ word) * 0xD6E8FEB86659FD93u;
    sum ^= sum >> 32;
  }
  return sum;
}

class Writer {
 public:
  std::vector<uint8_t> bytes;

  void raw(const void* data, size_t count) {
    const auto* first = static_cast<const uint8_t*>(data);
    bytes.insert(bytes.end(), first, first + count);
  }
  template <typename T>
  void value(const T& number) {
    static_assert(std::is_trivially_copyable_v<T>);
    raw(&number, sizeof number);
  }
  void value(const std::string& text) {
    value(static_cast<uint32_t>(text.size()));
    raw(text.data(), text.size());
  }
  template <typename T>
  void value(const std::vector<T>& numbers) {
    value(static_cast<uint32_t>(numbers.size()));
    raw(numbers.data(), numbers.size() * sizeof(T));
  }
};

class Reader {
 public:
  Reader(const uint8_t* bytes, size_t count) : next_(bytes), left_(count) {}

  size_t left() const { return left_; }
  void raw(void* data, size_t count) {
    if (count > left_) throw std::invalid_argument("plan: ends too early, damaged or cut off");
    if (count) std::memcpy(data, next_, count);
    next_ += count;
    left_ -= count;
  }
  template <typename T>
  void value(T& number) {
    static_assert(std::is_trivially_copyable_v<T> && !std::is_same_v<T, bool>);
    raw(&number, sizeof number);
  }
  void value(bool& flag) {
    uint8_t byte = 0;
    value(byte);
    if (byte > 1) throw std::invalid_argument("plan: a flag is neither 0 nor 1");
    flag = byte != 0;
  }
  void value(std::string& text) {
    text.resize(length(1));
    raw(text.data(), text.size());
  }
  template <typename T>
  void value(std::vector<T>& numbers) {
    numbers.resize(length(sizeof(T)));
    raw(numbers.data(), numbers.size() * sizeof(T));
  }
  // How many of so many bytes each follow; never more than there can be.
  size_t length(size_t each) {
    uint32_t count = 0;
    value(count);
    if (count > left_ / each) throw std::invalid_argument("plan: a list is longer than the rest of the bytes");
    return count;
  }

 private:
  const uint8_t* next_;
  size_t left_;
};

// Both directions walk over the same fields in the same order.
template <typename Stream, typename T>
void walk_box(Stream& stream, T& box) {
  stream.value(box.lower);
  stream.value(box.upper);
}

template <typename Stream, typename T>
void walk_step(Stream& stream, T& step) {
  stream.value(step.kind);
  stream.value(step.stream);
  stream.value(step.numbers);
  stream.value(step.boxes);
}

template <typename Stream, typename T>
void walk_view(Stream& stream, T& view) {
  stream.value(view.name);
  stream.value(view.size);
  walk_box(stream, view.box);
  stream.value(view.flips);
  stream.value(view.quarter_turns);
  stream.value(view.clean);
  stream.value(view.displacement);
  stream.value(view.to_volume);
  stream.value(view.elastic.points);
  stream.value(view.elastic.spacing);
  stream.value(view.elastic.shift);
  stream.value(view.antialias);
  stream.value(view.from_volume);
  stream.value(view.partner_size);
}

template <typename Stream, typename T>
void walk_plan(Stream& stream, T& plan) {
  stream.value(plan.seed);
  stream.value(plan.step);
  stream.value(plan.slot);
  stream.value(plan.split);
  stream.value(plan.case_index);
  stream.value(plan.volume);
  stream.value(plan.background);
  walk_box(stream, plan.crop);
  stream.value(plan.position);
  walk_box(stream, plan.region);
}

void check(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(std::string("plan: ") + what);
}

void check_box(const Box& box, const char* what) {
  for (int axis = 0; axis < 3; ++axis) check(box.lower[axis] <= box.upper[axis], what);
}

void check_view(const ViewPlan& view) {
  for (int axis = 0; axis < 3; ++axis) check(view.size[axis] > 0, "a view has no voxels");
  check_box(view.box, "the box of a view ends before it begins");
  size_t points = 3;
  for (const int64_t count : view.elastic.points) {
    check(count >= 0 && count <= 1 << 20, "a number of control points is impossible");
    points *= static_cast<size_t>(count);
  }
  check(view.elastic.shift.size() == points, "control points and their displacements differ in number");
}

void check_step(const Step& step) {
  check(step.kind >= StepKind::noise && step.kind <= StepKind::cut_out_outside, "a step is of no known kind");
  check(step.boxes.size() % 6 == 0, "boxes of a step are incomplete");
}

}  // namespace

std::vector<uint8_t> encode(const Plan& plan) {
  Writer writer;
  writer.value(kFormat);
  writer.value(uint64_t{0});  // the checksum's place
  walk_plan(writer, plan);
  writer.value(static_cast<uint32_t>(plan.views.size()));
  for (const ViewPlan& view : plan.views) {
    walk_view(writer, view);
    writer.value(static_cast<uint32_t>(view.steps.size()));
    for (const Step& step : view.steps) walk_step(writer, step);
  }
  constexpr size_t head = sizeof kFormat + sizeof(uint64_t);
  const uint64_t sum = checksum(writer.bytes.data() + head, writer.bytes.size() - head);
  std::memcpy(writer.bytes.data() + sizeof kFormat, &sum, sizeof sum);
  return std::move(writer.bytes);
}

Plan decode(const uint8_t* bytes, size_t count) {
  Reader reader(bytes, count);
  uint32_t format = 0;
  uint64_t sum = 0;
  reader.value(format);
  check(format == kFormat, "not a plan, or one of another version");
  reader.value(sum);
  check(sum == checksum(bytes + (count - reader.left()), reader.left()), "damaged: the checksum differs");
  Plan plan;
  walk_plan(reader, plan);
  check_box(plan.region, "the region ends before it begins");
  plan.views.resize(reader.length(100));
  for (ViewPlan& view : plan.views) {
    walk_view(reader, view);
    check_view(view);
    view.steps.resize(reader.length(16));
    for (Step& step : view.steps) {
      walk_step(reader, step);
      check_step(step);
    }
  }
  check(reader.left() == 0, "bytes are left over");
  return plan;
}

}  // namespace voxtrast
