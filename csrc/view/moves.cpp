// The steps that need the whole view: they move voxels, smooth them, or fill boxes.
#include <cstring>

#include "coarse.h"
#include "permutation.h"
#include "smoothing.h"
#include "steps.h"

namespace voxtrast {
namespace {

struct StepBox {
  int64_t lower[3], sides[3];
  explicit StepBox(const int32_t* numbers) {
    for (int axis = 0; axis < 3; ++axis) {
      lower[axis] = numbers[axis];
      sides[axis] = numbers[3 + axis];
    }
  }
  int64_t voxels() const { return sides[0] * sides[1] * sides[2]; }
  // Of the first voxel of row r of the box.
  int64_t row_start(int64_t r, const Index3& size) const {
    return ((lower[0] + r / sides[1]) * size[1] + lower[1] + r % sides[1]) * size[2] + lower[2];
  }
  int64_t rows() const { return sides[0] * sides[1]; }
};

// Quotients of 32-bit numbers by products (Lemire, Kaser and Kurz, "Faster remainder by direct computation", 2019).
struct Divisor {
  uint32_t by;
  uint64_t inverse;
  explicit Divisor(int64_t by) : by(static_cast<uint32_t>(by)), inverse(UINT64_MAX / static_cast<uint64_t>(by) + 1) {}
  uint32_t quotient(uint32_t number) const {
    if (by == 1) return number;
    return static_cast<uint32_t>(static_cast<unsigned __int128>(inverse) * number >> 64);
  }
};

}  // namespace

void StepRunner::perform_whole(const Step& step) {
  switch (step.kind) {
    case StepKind::blur:
      return smooth(view_, plan_.size, {step.numbers[0], step.numbers[0], step.numbers[0]}, buffers_);
    case StepKind::low_resolution: return low_resolution(step.numbers[0]);
    case StepKind::pixel_shuffle: return shuffle_pixels(step);
    case StepKind::patch_swap: return swap_patches(step);
    case StepKind::in_paint:
    case StepKind::cut_out: return fill_boxes(step);
    default: return fill_outside(step);
  }
}

void StepRunner::low_resolution(float factor) {
  const Index3& size = plan_.size;
  const Coarse depth(size[0], factor), height(size[1], factor), width(size[2], factor);
  float* rows = at_least(buffers_.volume, depth.size * height.size * size[2]);  // fine along W alone
  for (int64_t d = 0; d < depth.size; ++d)
    for (int64_t h = 0; h < height.size; ++h) {
      const float* from = view_ + (depth.nearest[d] * size[1] + height.nearest[h]) * size[2];
      float* to = rows + (d * height.size + h) * size[2];
      for (int64_t w = 0; w < size[2]; ++w) {
        const float low = from[width.nearest[width.lower[w]]], high = from[width.nearest[width.upper(w)]];
        to[w] = low + width.fraction[w] * (high - low);
      }
    }
  for (int64_t d = 0; d < size[0]; ++d)
    for (int64_t h = 0; h < size[1]; ++h) {
      const float* around[4];
      float weights[4];
      for (int k = 0; k < 4; ++k) {
        const int64_t plane = k & 2 ? depth.upper(d) : depth.lower[d], row = k & 1 ? height.upper(h) : height.lower[h];
        around[k] = rows + (plane * height.size + row) * size[2];
        weights[k] = (k & 2 ? depth.fraction[d] : 1 - depth.fraction[d]) *
                     (k & 1 ? height.fraction[h] : 1 - height.fraction[h]);
      }
      row_path().weighted_sum(around, weights, 4, size[2], view_ + (d * size[1] + h) * size[2]);
    }
}

// From the last window to the first: a voxel that is covered has its value already.
void StepRunner::shuffle_pixels(const Step& step) {
  const Index3& size = plan_.size;
  float* before = at_least(buffers_.volume, voxels(size));
  std::memcpy(before, view_, sizeof(float) * voxels(size));
  uint8_t* covered = at_least(buffers_.covered, voxels(size));
  std::memset(covered, 0, voxels(size));
  for (int64_t window = static_cast<int64_t>(step.boxes.size() / 6) - 1; window >= 0; --window) {
    const StepBox box(step.boxes.data() + 6 * window);
    const Random4 keys = philox(key_.seed, static_cast<uint32_t>(window), step.stream, key_.slot, key_.step);
    const auto count = static_cast<uint32_t>(box.voxels());
    const PermutationKey key = {count, half_bits(count), {keys.word[0], keys.word[1], keys.word[2], keys.word[3]}};
    const Divisor row_length(box.sides[2]), plane_rows(box.sides[1]);
    const int64_t origin = box.row_start(0, size);
    const auto source = [&](uint32_t place) {
      const uint32_t row = row_length.quotient(place), plane = plane_rows.quotient(row);
      return origin + (int64_t(plane) * size[1] + (row - plane * plane_rows.by)) * size[2] + place - row * row_length.by;
    };
    const int64_t together = std::max<int64_t>(1, 1024 / box.sides[2]);  // rows: short ones would leave lanes empty
    uint32_t* places = at_least(buffers_.places, together * box.sides[2]);
    for (int64_t first = 0; first < box.rows(); first += together) {
      const int64_t end = std::min(box.rows(), first + together);
      const auto open_row = [&](int64_t r) {
        return std::memchr(covered + box.row_start(r, size), 0, box.sides[2]) != nullptr;
      };
      int64_t r = first;
      while (r < end && !open_row(r)) ++r;
      if (r == end) continue;
      row_path().permute(key, static_cast<uint32_t>(first * box.sides[2]), (end - first) * box.sides[2], places);
      for (; r < end; ++r) {
        const int64_t start = box.row_start(r, size);
        const uint32_t* place = places + (r - first) * box.sides[2];
        for (int64_t w = 0; w < box.sides[2]; ++w)
          if (!covered[start + w]) view_[start + w] = before[source(place[w])];
        std::memset(covered + start, 1, box.sides[2]);
      }
    }
  }
}

void StepRunner::swap_patches(const Step& step) {
  const Index3& size = plan_.size;
  for (size_t pair = 0; pair < step.boxes.size(); pair += 12) {
    const StepBox first(step.boxes.data() + pair), second(step.boxes.data() + pair + 6);
    const size_t bytes = sizeof(float) * first.sides[2];
    float* aside = at_least(buffers_.volume, 2 * first.voxels());
    for (int64_t r = 0; r < first.rows(); ++r) {
      std::memcpy(aside + 2 * r * first.sides[2], view_ + first.row_start(r, size), bytes);
      std::memcpy(aside + (2 * r + 1) * first.sides[2], view_ + second.row_start(r, size), bytes);
    }
    for (int64_t r = 0; r < first.rows(); ++r)
      std::memcpy(view_ + first.row_start(r, size), aside + (2 * r + 1) * first.sides[2], bytes);
    for (int64_t r = 0; r < first.rows(); ++r)
      std::memcpy(view_ + second.row_start(r, size), aside + 2 * r * first.sides[2], bytes);
  }
}

void StepRunner::fill_boxes(const Step& step) {
  for (size_t number = 0; number < step.boxes.size(); number += 6) {
    const StepBox box(step.boxes.data() + number);
    for (int64_t r = 0; r < box.rows(); ++r) {
      const int64_t start = box.row_start(r, plan_.size);
      if (step.kind == StepKind::in_paint)
        row_path().uniform(view_ + start, box.sides[2], stream(step), start, step.numbers[0], step.numbers[1]);
      else
        std::fill_n(view_ + start, box.sides[2], step.numbers[0]);
    }
  }
}

void StepRunner::fill_outside(const Step& step) {
  const Index3& size = plan_.size;
  float* inside = at_least(buffers_.volume, voxels(size));
  std::memcpy(inside, view_, sizeof(float) * voxels(size));
  if (step.kind == StepKind::out_paint)
    row_path().uniform(view_, voxels(size), stream(step), 0, step.numbers[0], step.numbers[1]);
  else
    std::fill_n(view_, voxels(size), step.numbers[0]);
  for (size_t number = 0; number < step.boxes.size(); number += 6) {
    const StepBox box(step.boxes.data() + number);
    for (int64_t r = 0; r < box.rows(); ++r) {
      const int64_t start = box.row_start(r, size);
      std::memcpy(view_ + start, inside + start, sizeof(float) * box.sides[2]);
    }
  }
}

}  // namespace voxtrast
