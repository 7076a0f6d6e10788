#include "read_region.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "row_path.h"

namespace voxtrast {
namespace {

// A gap between two rows that takes as long to copy as a call takes.
constexpr int64_t kLongGap = 4096;

int64_t bytes_of(StoredType type) {
  switch (type) {
    case StoredType::uint8:
    case StoredType::int8: return 1;
    case StoredType::float16:
    case StoredType::uint16:
    case StoredType::int16: return 2;
    case StoredType::float32:
    case StoredType::uint32:
    case StoredType::int32: return 4;
  }
  throw std::invalid_argument("there is no type of voxels " + std::to_string(static_cast<int64_t>(type)));
}

std::string name_of(int descriptor) {
  char name[4096];
  const ssize_t length = readlink(("/proc/self/fd/" + std::to_string(descriptor)).c_str(), name, sizeof name);
  return length > 0 ? std::string(name, static_cast<size_t>(length)) : "descriptor " + std::to_string(descriptor);
}

void read_exactly(int descriptor, int64_t offset, int64_t count, char* to) {
  while (count > 0) {
    const ssize_t got = pread(descriptor, to, static_cast<size_t>(count), offset);
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw std::runtime_error(name_of(descriptor) + " cannot be read: " + std::strerror(errno));
    if (got == 0)
      throw std::runtime_error(name_of(descriptor) + " ends at byte " + std::to_string(offset) + ", " +
                               std::to_string(count) + " bytes early: it was cut off while in use");
    offset += got;
    count -= got;
    to += got;
  }
}

template <typename T>
void convert(const char* from, int64_t count, float* to) {
  for (int64_t n = 0; n < count; ++n) {
    T value;
    std::memcpy(&value, from + n * sizeof(T), sizeof(T));
    to[n] = static_cast<float>(value);
  }
}

// Whether every value is a number: of others all bits of the exponent are set.
template <typename Bits>
bool finite(const char* from, int64_t count, Bits exponent) {
  Bits found = 0;
  for (int64_t n = 0; n < count; ++n) {
    Bits value;
    std::memcpy(&value, from + n * sizeof(Bits), sizeof(Bits));
    found |= (value & exponent) == exponent;
  }
  return !found;
}

bool finite(StoredType stored, const char* from, int64_t count) {
  if (stored == StoredType::float16) return finite<uint16_t>(from, count, 0x7c00);
  if (stored == StoredType::float32) return finite<uint32_t>(from, count, 0x7f800000);
  return true;
}

void convert_row(StoredType stored, const char* from, int64_t count, VoxelType type, char* to) {
  float* floats = reinterpret_cast<float*>(to);
  if (type == VoxelType::float16) {
    std::memcpy(to, from, static_cast<size_t>(2 * count));
    return;
  }
  switch (stored) {
    case StoredType::float16: return row_path().widen(reinterpret_cast<const uint16_t*>(from), count, floats);
    case StoredType::float32: std::memcpy(to, from, static_cast<size_t>(4 * count)); return;
    case StoredType::uint8: return convert<uint8_t>(from, count, floats);
    case StoredType::int8: return convert<int8_t>(from, count, floats);
    case StoredType::uint16: return convert<uint16_t>(from, count, floats);
    case StoredType::int16: return convert<int16_t>(from, count, floats);
    case StoredType::uint32: return convert<uint32_t>(from, count, floats);
    case StoredType::int32: return convert<int32_t>(from, count, floats);
  }
}

uint16_t as_float16(float value) {
  const _Float16 half = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
}

void fill(VoxelType type, float background, int64_t count, char* to) {
  if (type == VoxelType::float32) std::fill_n(reinterpret_cast<float*>(to), count, background);
  else std::fill_n(reinterpret_cast<uint16_t*>(to), count, as_float16(background));
}

// What of a box lies in the volume.
Box inside(const Box& box, const Index3& shape) {
  Box result;
  for (int axis = 0; axis < 3; ++axis) {
    result.lower[axis] = std::clamp<int64_t>(box.lower[axis], 0, shape[axis]);
    result.upper[axis] = std::clamp<int64_t>(box.upper[axis], result.lower[axis], shape[axis]);
  }
  return result;
}

}  // namespace

void read_region(const StoredVolume& volume, const Box& box, float background, VoxelType type, void* voxels) {
  if (type == VoxelType::float16 && volume.type != StoredType::float16)
    throw std::invalid_argument("only float16 volumes are read as float16");
  const int64_t stored = bytes_of(volume.type), written = type == VoxelType::float16 ? 2 : 4;
  const Box part = inside(box, volume.shape);
  const Index3 size = {box.upper[0] - box.lower[0], box.upper[1] - box.lower[1], box.upper[2] - box.lower[2]};
  const int64_t rows = part.upper[1] - part.lower[1], columns = part.upper[2] - part.lower[2];
  const bool all = part.lower == box.lower && part.upper == box.upper;
  if (!all) fill(type, background, size[0] * size[1] * size[2], static_cast<char*>(voxels));
  if (rows == 0 || columns == 0) return;

  const int64_t row_bytes = volume.shape[2] * stored, wanted = columns * stored;
  const auto offset = [&](int64_t d, int64_t h) {
    return volume.offset + ((d * volume.shape[1] + h) * volume.shape[2] + part.lower[2]) * stored;
  };
  const bool by_rows = row_bytes - wanted > kLongGap;
  const int64_t stretch = (rows - 1) * row_bytes + wanted;  // of a plane
  for (int64_t d = part.lower[0]; d < part.upper[0]; ++d)
    posix_fadvise(volume.descriptor, offset(d, part.lower[1]), stretch, POSIX_FADV_WILLNEED);
  std::vector<char> buffer(static_cast<size_t>(by_rows ? wanted : stretch));
  for (int64_t d = part.lower[0]; d < part.upper[0]; ++d) {
    if (!by_rows) read_exactly(volume.descriptor, offset(d, part.lower[1]), stretch, buffer.data());
    for (int64_t h = part.lower[1]; h < part.upper[1]; ++h) {
      if (by_rows) read_exactly(volume.descriptor, offset(d, h), wanted, buffer.data());
      const char* row = by_rows ? buffer.data() : buffer.data() + (h - part.lower[1]) * row_bytes;
      const int64_t place = ((d - box.lower[0]) * size[1] + h - box.lower[1]) * size[2] + part.lower[2] - box.lower[2];
      if (!finite(volume.type, row, columns))
        throw std::runtime_error(name_of(volume.descriptor) + " holds NaN or infinity at (" + std::to_string(d) + ", " +
                                 std::to_string(h) + ", ..)");
      convert_row(volume.type, row, columns, type, static_cast<char*>(voxels) + place * written);
    }
  }
}

}  // namespace voxtrast
