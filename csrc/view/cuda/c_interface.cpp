// Views made on a GPU without DALI, for tests and measurements: plain C, called through ctypes.
#include <cstdio>
#include <exception>

#include "gpu_views.h"
#include "sent_slots.h"

#define VOXTRAST_EXPORT extern "C" __attribute__((visibility("default")))

// Of the device that is current, and on one of its streams. `launches` may be null.
VOXTRAST_EXPORT int voxtrast_make_views_on_gpu(int64_t count, const int64_t* numbers, void* stream, int64_t* launches,
                                               char* message, int64_t message_bytes) {
  using namespace voxtrast;
  try {
    static thread_local GpuViews views;
    const SentSlots sent(count, numbers);
    views.make(sent.slots(), static_cast<cudaStream_t>(stream));
    if (launches != nullptr) count_launches(make_program(sent.slots(), nullptr), launches);
    return 0;
  } catch (const std::exception& error) {
    std::snprintf(message, static_cast<size_t>(message_bytes), "%s", error.what());
    return 1;
  }
}
