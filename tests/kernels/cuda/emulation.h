// CUDA on one thread of the CPU, so that the tests run the very kernels of csrc/cuda where there is no GPU. Included
// before the kernels. The threads of a block are fibers that give way at barriers, in an order that the test chooses;
// blocks come one after the other. What would hang, race or touch foreign memory on a GPU is reported, where it shows:
// barriers that some threads miss, launches beyond the limits, and accesses outside the tensors and the shared memory,
// which end (or begin) at pages that nobody may touch. Shared memory is NaN when a block begins.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#undef __shared__
#define __shared__ kernels_take_their_shared_memory_from_shared_memory_cuh
#undef __launch_bounds__
#define __launch_bounds__(...)

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulation {

constexpr size_t kPage = 4096, kStack = 256 * 1024, kMostShared = 99 * 1024, kMostThreads = 1024;
inline bool backwards = false;  // the order of threads and blocks, and on which side the guard page lies

enum class Waiting { kNothing, kWarp, kBlock, kFinished };

struct Fiber {
  ucontext_t context;
  uint3 index;
  Waiting waiting;
  std::source_location place;  // of the barrier
  uint32_t mask;               // of a warp's barrier
  uint64_t posted;             // to the other lanes
};

inline std::vector<Fiber> fibers;
inline Fiber* current = nullptr;
inline ucontext_t scheduler;
inline void (*body)(const void*) = nullptr;
inline const void* arguments = nullptr;
inline unsigned char* shared = nullptr;
inline sigjmp_buf outside;
inline void* touched = nullptr;

// Memory between two pages that nobody may touch: filled with NaN, flush with the one behind it, or the one before it.
struct Guarded {
  unsigned char* mapping;
  size_t mapped;
  unsigned char* begin;

  Guarded(size_t bytes, size_t alignment) {
    const size_t whole = (bytes + kPage - 1) / kPage * kPage;
    mapped = whole + 2 * kPage;
    mapping = static_cast<unsigned char*>(mmap(nullptr, mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (mapping == MAP_FAILED) throw std::bad_alloc();
    if (whole > 0) mprotect(mapping + kPage, whole, PROT_READ | PROT_WRITE);
    begin = mapping + kPage + (backwards ? 0 : (whole - bytes) / alignment * alignment);
    memset(mapping + kPage, 0xff, whole);
  }
  void release() { munmap(mapping, mapped); }
};

inline std::string name(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

inline std::string line(const std::source_location& place) {
  return std::string(place.file_name()) + ":" + std::to_string(place.line());
}

inline void run_fiber() {
  body(arguments);
  current->waiting = Waiting::kFinished;
  setcontext(&scheduler);
}

inline void wait(Waiting what, uint32_t mask, const std::source_location& place) {
  current->waiting = what;
  current->mask = mask;
  current->place = place;
  swapcontext(&current->context, &scheduler);
}

inline Fiber* lane(unsigned warp, unsigned number) {
  const size_t position = warp * 32 + number;
  return position < fibers.size() ? &fibers[position] : nullptr;
}

inline unsigned flat_thread() { return static_cast<unsigned>(current - fibers.data()); }

// Frees the lanes of a warp whose barrier all the lanes that it names have reached.
inline bool free_warps() {
  bool freed = false;
  for (Fiber& fiber : fibers) {
    if (fiber.waiting != Waiting::kWarp) continue;
    const unsigned warp = static_cast<unsigned>(&fiber - fibers.data()) / 32;
    bool all = true;
    for (unsigned number = 0; number < 32; ++number) {
      const Fiber* other = fiber.mask >> number & 1 ? lane(warp, number) : nullptr;
      if (other) all = all && other->waiting == Waiting::kWarp && other->mask == fiber.mask;
    }
    for (unsigned number = 0; all && number < 32; ++number)
      if (Fiber* other = fiber.mask >> number & 1 ? lane(warp, number) : nullptr) other->waiting = Waiting::kNothing;
    freed = freed || all;
  }
  return freed;
}

// True as long as there are threads to run.
inline bool free_block() {
  const auto finished = std::count_if(fibers.begin(), fibers.end(),
                                      [](const Fiber& fiber) { return fiber.waiting == Waiting::kFinished; });
  if (static_cast<size_t>(finished) == fibers.size()) return false;
  const Fiber* waiting = &*std::find_if(fibers.begin(), fibers.end(),
                                        [](const Fiber& fiber) { return fiber.waiting != Waiting::kFinished; });
  for (const Fiber& fiber : fibers)
    if (fiber.waiting != Waiting::kBlock || fiber.place.line() != waiting->place.line())
      throw std::runtime_error("thread " + name(waiting->index) + " of block " + name(blockIdx) + " waits at " +
                               line(waiting->place) + ", but thread " + name(fiber.index) +
                               (fiber.waiting == Waiting::kFinished ? " has finished"
                                                                    : " waits at " + line(fiber.place)));
  for (Fiber& fiber : fibers) fiber.waiting = Waiting::kNothing;
  return true;
}

inline void run_block(unsigned char* stacks) {
  for (size_t position = 0; position < fibers.size(); ++position) {
    Fiber& fiber = fibers[position];
    const unsigned flat = static_cast<unsigned>(position);
    fiber.index = {flat % blockDim.x, flat / blockDim.x % blockDim.y, flat / (blockDim.x * blockDim.y)};
    fiber.waiting = Waiting::kNothing;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks + position * kStack;
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, run_fiber, 0);
  }
  do {
    do {
      for (size_t position = 0; position < fibers.size(); ++position) {
        Fiber& fiber = fibers[backwards ? fibers.size() - 1 - position : position];
        if (fiber.waiting != Waiting::kNothing) continue;
        current = &fiber;
        threadIdx = fiber.index;
        swapcontext(&scheduler, &fiber.context);
      }
    } while (free_warps());
  } while (free_block());
}

inline void on_fault(int, siginfo_t* information, void*) {
  touched = information->si_addr;
  siglongjmp(outside, 1);
}

inline void run_grid(size_t shared_bytes) {
  static unsigned char* const stacks = static_cast<unsigned char*>(
      mmap(nullptr, kMostThreads * kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  fibers.assign(size_t(blockDim.x) * blockDim.y * blockDim.z, Fiber{});
  const uint64_t blocks = uint64_t(gridDim.x) * gridDim.y * gridDim.z;
  Guarded memory(shared_bytes, 16);
  shared = memory.begin;
  for (uint64_t position = 0; position < blocks; ++position) {
    const uint64_t block = backwards ? blocks - 1 - position : position;
    blockIdx = {static_cast<unsigned>(block % gridDim.x), static_cast<unsigned>(block / gridDim.x % gridDim.y),
                static_cast<unsigned>(block / gridDim.x / gridDim.y)};
    memset(shared, 0xff, shared_bytes);
    run_block(stacks);
  }
  memory.release();
}

inline void check_limits(dim3 grid, dim3 block, size_t shared_bytes) {
  const bool fits = grid.x > 0 && grid.y > 0 && grid.z > 0 && grid.x <= 0x7fffffffu && grid.y <= 65535u &&
                    grid.z <= 65535u && block.z <= 64 && size_t(block.x) * block.y * block.z <= kMostThreads &&
                    size_t(block.x) * block.y * block.z > 0 && shared_bytes <= kMostShared;
  if (!fits)
    throw std::runtime_error("a launch beyond the limits: grid " + name({grid.x, grid.y, grid.z}) + ", block " +
                             name({block.x, block.y, block.z}) + ", " + std::to_string(shared_bytes) + " bytes");
}

// Stands where csrc/cuda/launch.cuh has a launch on a stream.
struct Launch {
  static constexpr int64_t kMostBlocks = 0x7fffffff;

  template <class... Parameters, class... Given>
  void operator()(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, Given... given) const {
    check_limits(grid, block, shared_bytes);
    auto call = [&] { kernel(given...); };
    body = [](const void* it) { (*static_cast<const decltype(call)*>(it))(); };
    arguments = &call;
    gridDim = grid;
    blockDim = block;
    struct sigaction ours = {}, segment, bus;
    ours.sa_sigaction = on_fault;
    ours.sa_flags = SA_SIGINFO;
    sigaction(SIGSEGV, &ours, &segment);
    sigaction(SIGBUS, &ours, &bus);
    std::string error;
    if (sigsetjmp(outside, 1) == 0) {
      try {
        run_grid(shared_bytes);
      } catch (const std::exception& caught) {
        error = caught.what();
      }
    } else {
      char address[32];
      snprintf(address, sizeof address, "%p", touched);
      error = "thread " + name(current->index) + " of block " + name(blockIdx) + " touches " + address + ", outside";
    }
    sigaction(SIGSEGV, &segment, nullptr);
    sigaction(SIGBUS, &bus, nullptr);
    if (!error.empty()) throw std::runtime_error(error);
  }
};

// What an entry point returns: nullptr, or what went wrong.
template <class Function>
const char* report(Function&& function) {
  static std::string message;
  try {
    function();
  } catch (const std::exception& caught) {
    message = caught.what();
    return message.c_str();
  }
  return nullptr;
}

// The value that lane `source(own lane)` has posted; lanes that the source lies outside of keep their own.
template <class Value, class Source>
Value exchange(uint32_t mask, Value value, Source source, const std::source_location& place) {
  static_assert(sizeof(Value) <= sizeof(uint64_t));
  memcpy(&current->posted, &value, sizeof value);
  wait(Waiting::kWarp, mask, place);
  const unsigned own = flat_thread() % 32, other = source(own);
  const Fiber* found = other < 32 ? lane(flat_thread() / 32, other) : nullptr;
  if (found) memcpy(&value, &found->posted, sizeof value);
  wait(Waiting::kWarp, mask, place);
  return value;
}

inline std::map<void*, Guarded> tensors;

}  // namespace emulation

extern "C" {
inline __attribute__((used)) void emulation_choose_order(int backwards) { emulation::backwards = backwards != 0; }

inline __attribute__((used)) void* emulation_allocate(size_t bytes, size_t alignment) {
  emulation::Guarded memory(bytes, alignment);
  emulation::tensors.emplace(memory.begin, memory);
  return memory.begin;
}

inline __attribute__((used)) void emulation_release(void* begin) {
  emulation::tensors.at(begin).release();
  emulation::tensors.erase(begin);
}
}

namespace voxtrast {
// csrc/cuda/shared_memory.cuh
template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(emulation::shared);
}
}  // namespace voxtrast

using std::max;
using std::min;

using Place = std::source_location;

inline void __syncthreads(const Place& place = Place::current()) {
  emulation::wait(emulation::Waiting::kBlock, 0, place);
}

inline void __syncwarp(uint32_t mask = 0xffffffffu, const Place& place = Place::current()) {
  emulation::wait(emulation::Waiting::kWarp, mask, place);
}

template <class Value>
Value __shfl_sync(uint32_t mask, Value value, int source, const Place& place = Place::current()) {
  return emulation::exchange(mask, value, [=](unsigned) { return unsigned(source) % 32; }, place);
}

template <class Value>
Value __shfl_down_sync(uint32_t mask, Value value, unsigned delta, const Place& place = Place::current()) {
  return emulation::exchange(mask, value, [=](unsigned own) { return own + delta; }, place);
}

template <class Value>
Value __shfl_up_sync(uint32_t mask, Value value, unsigned delta, const Place& place = Place::current()) {
  return emulation::exchange(mask, value, [=](unsigned own) { return own - delta; }, place);
}

template <class Value>
Value __shfl_xor_sync(uint32_t mask, Value value, int lanes, const Place& place = Place::current()) {
  return emulation::exchange(mask, value, [=](unsigned own) { return own ^ unsigned(lanes); }, place);
}

inline int __any_sync(uint32_t mask, int predicate, const Place& place = Place::current()) {
  for (int lanes = 16; lanes > 0; lanes /= 2) predicate |= __shfl_xor_sync(mask, predicate, lanes, place);
  return predicate;
}

template <class Value>
Value __ldg(const Value* address) {
  return *address;
}

// Threads give way at barriers alone: every access is atomic.
template <class Value, class Function>
Value emulation_exchange(Value* address, Function function) {
  const Value old = *address;
  *address = function(old);
  return old;
}

template <class Value>
Value atomicAdd(Value* address, std::type_identity_t<Value> value) {
  return emulation_exchange(address, [=](Value old) { return Value(old + value); });
}

template <class Value>
Value atomicMax(Value* address, std::type_identity_t<Value> value) {
  return emulation_exchange(address, [=](Value old) { return std::max(old, value); });
}

template <class Value>
Value atomicMin(Value* address, std::type_identity_t<Value> value) {
  return emulation_exchange(address, [=](Value old) { return std::min(old, value); });
}

template <class Value>
Value atomicOr(Value* address, std::type_identity_t<Value> value) {
  return emulation_exchange(address, [=](Value old) { return Value(old | value); });
}

template <class Value>
Value atomicExch(Value* address, std::type_identity_t<Value> value) {
  return emulation_exchange(address, [=](Value) { return value; });
}

template <class Value>
Value atomicCAS(Value* address, std::type_identity_t<Value> compared, std::type_identity_t<Value> value) {
  return emulation_exchange(address, [=](Value old) { return old == compared ? value : old; });
}

inline void __threadfence() {}
inline float __expf(float value) { return std::exp(value); }
inline float __logf(float value) { return std::log(value); }
inline float __log2f(float value) { return std::log2(value); }
inline float __fdividef(float value, float divisor) { return value / divisor; }
inline float __frcp_rn(float value) { return 1.0f / value; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline void sincospif(float value, float* sine, float* cosine) {
  *sine = static_cast<float>(std::sin(3.14159265358979323846 * value));
  *cosine = static_cast<float>(std::cos(3.14159265358979323846 * value));
}
inline float __saturatef(float value) { return std::min(std::max(value, 0.0f), 1.0f); }
inline int __float2int_rd(float value) { return static_cast<int>(std::floor(value)); }
inline float __int_as_float(int value) { return __builtin_bit_cast(float, value); }
inline int __float_as_int(float value) { return __builtin_bit_cast(int, value); }
