#pragma once

#include <cstdint>
#include <memory>

namespace voxtrast {

// Has untouched memory come in large pages where the system has them. In small ones, the 64 MB that a bank of 65536
// vectors needs cost as much time as its products with 256 queries.
void prefer_large_pages(void* memory, int64_t bytes);

// Memory that is kept for the next problem and not cleared.
template <typename T>
class Buffer {
 public:
  T* of(int64_t count) {
    if (count > count_) {
      data_.reset(new T[count]);
      prefer_large_pages(data_.get(), count * int64_t(sizeof(T)));
      count_ = count;
    }
    return data_.get();
  }
  const T* get() const { return data_.get(); }

 private:
  std::unique_ptr<T[]> data_;
  int64_t count_ = 0;
};

}  // namespace voxtrast
