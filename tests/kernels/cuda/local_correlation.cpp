// Entry points of local_correlation for the tests. The arguments of a problem: batch, units, channels of a unit,
// dimensions, sizes (0 past the last), radius, element, processors, scale.
#include "emulation.h"

#include "cuda/local_correlation.cuh"

namespace correlation = voxtrast::correlation;

namespace {

correlation::Problem describe(int64_t batch, int64_t units, int64_t channels, int64_t dimensions, int64_t size_0,
                              int64_t size_1, int64_t size_2, int64_t radius, int64_t element, double scale) {
  const int64_t sizes[] = {size_0, size_1, size_2};
  return correlation::describe(batch, units, channels, sizes, static_cast<int>(dimensions), radius, scale,
                               static_cast<correlation::Element>(element));
}

// A grid of 3 blocks at most, as if more were beyond the limits. Asked for by 0 processors.
struct FewBlocks {
  template <class Kernel, class... Given>
  void operator()(Kernel kernel, dim3 grid, dim3 block, size_t shared_bytes, Given... given) const {
    emulation::Launch()(kernel, dim3(std::min(grid.x, 3u)), block, shared_bytes, given...);
  }
};

template <class Run>
const char* run(int64_t processors, Run run) {
  return emulation::report([=] {
    if (processors > 0)
      run(emulation::Launch(), static_cast<int>(processors));
    else
      run(FewBlocks(), 2);
  });
}

}  // namespace

extern "C" {

const char* local_correlation(const void* query, const void* key, float* displacement, float* log_sum_exp, float* mean,
                              int64_t batch, int64_t units, int64_t channels, int64_t dimensions, int64_t size_0,
                              int64_t size_1, int64_t size_2, int64_t radius, int64_t element, int64_t processors,
                              double scale) {
  return run(processors, [=](auto launch, int processors) {
    const auto problem = describe(batch, units, channels, dimensions, size_0, size_1, size_2, radius, element, scale);
    correlation::forward(launch, problem, processors, query, key, displacement, log_sum_exp, mean);
  });
}

const char* local_correlation_backward(const float* grad_displacement, const void* query, const void* key,
                                       const float* log_sum_exp, const float* mean, void* grad_query, void* grad_key,
                                       int64_t batch, int64_t units, int64_t channels, int64_t dimensions,
                                       int64_t size_0, int64_t size_1, int64_t size_2, int64_t radius, int64_t element,
                                       int64_t processors, double scale) {
  return run(processors, [=](auto launch, int processors) {
    const auto problem = describe(batch, units, channels, dimensions, size_0, size_1, size_2, radius, element, scale);
    correlation::backward(launch, problem, processors, {grad_displacement, log_sum_exp, mean}, query, key, grad_query,
                          grad_key);
  });
}
}
