// The memory of a view in the making, and the order in which its voxels are gone through.
#pragma once

#include <algorithm>
#include <vector>

#include "row_path.h"
#include "view.h"

namespace voxtrast {

struct ViewWorkspace::Buffers {
  std::vector<float> region;        // smoothed, or widened
  std::vector<float> volume;        // a copy of a view or region
  std::vector<float> row;
  std::vector<uint8_t> covered;     // voxels of a view
  std::vector<uint32_t> places;
  std::vector<float> control_rows, control_plane, shifts;
};

// At least `count` elements, of unknown value.
template <typename T>
T* at_least(std::vector<T>& buffer, int64_t count) {
  if (static_cast<int64_t>(buffer.size()) < count) buffer.resize(static_cast<size_t>(count));
  return buffer.data();
}

inline int64_t voxels(const Index3& size) { return size[0] * size[1] * size[2]; }

// Some rows of one plane, which stay in the first-level cache while several things are done to them.
struct Strip {
  int64_t plane, row, rows;
  int64_t first, count;  // voxels
};

template <typename Work>
void for_each_strip(const Index3& size, const Work& work) {
  const int64_t rows = std::max<int64_t>(1, 4096 / size[2]);
  for (int64_t plane = 0; plane < size[0]; ++plane)
    for (int64_t row = 0; row < size[1]; row += rows) {
      const int64_t taken = std::min(rows, size[1] - row);
      work(Strip{plane, row, taken, (plane * size[1] + row) * size[2], taken * size[2]});
    }
}

}  // namespace voxtrast
