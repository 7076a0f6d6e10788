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

}  // namespace

extern "C" {

const char* local_correlation(const void* query, const void* key, float* displacement, float* log_sum_exp, float* mean,
                              int64_t batch, int64_t units, int64_t channels, int64_t dimensions, int64_t size_0,
                              int64_t size_1, int64_t size_2, int64_t radius, int64_t element, int64_t processors,
                              double scale) {
  return emulation::report([=] {
    const auto problem = describe(batch, units, channels, dimensions, size_0, size_1, size_2, radius, element, scale);
    correlation::forward(emulation::Launch(), problem, int(processors), query, key, displacement, log_sum_exp, mean);
  });
}

const char* local_correlation_backward(const float* grad_displacement, const void* query, const void* key,
                                       const float* log_sum_exp, const float* mean, void* grad_query, void* grad_key,
                                       int64_t batch, int64_t units, int64_t channels, int64_t dimensions,
                                       int64_t size_0, int64_t size_1, int64_t size_2, int64_t radius, int64_t element,
                                       int64_t processors, double scale) {
  return emulation::report([=] {
    const auto problem = describe(batch, units, channels, dimensions, size_0, size_1, size_2, radius, element, scale);
    correlation::backward(emulation::Launch(), problem, int(processors), {grad_displacement, log_sum_exp, mean}, query, key, grad_query,
                          grad_key);
  });
}
}
