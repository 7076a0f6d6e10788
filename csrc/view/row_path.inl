// The work on rows of a view, written with the vector types of GCC and Clang. Included by row_path_*.cpp, which set
// VOXTRAST_PATH, the name of what is defined at the end, and the instruction set (target_*.h, which say what may stand
// here).

#include "../cpu/registers.inl"
#include "../cpu/powers.inl"
#include "../cpu/elements.inl"

namespace voxtrast {
namespace {

VOXTRAST_INLINE bool any(Integers mask) {
#if defined(VOXTRAST_AVX512)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask)) != 0;
#elif VOXTRAST_LANES == 8
  return _mm256_movemask_ps(reinterpret_cast<__m256>(mask)) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps(reinterpret_cast<__m128>(mask)) != 0;
#else
  return (mask[0] | mask[1] | mask[2] | mask[3]) != 0;
#endif
}

}  // namespace
}  // namespace voxtrast

#include "random.inl"
#include "sampling.inl"
#include "pointwise.inl"

namespace voxtrast {

const RowPath VOXTRAST_PATH = {
    {{sample<Float32, true>, sample<Float32, false>}, {sample<Float16, true>, sample<Float16, false>}},
    field,
    weighted_sum,
    widen,
    gather_statistics,
    add,
    contrast,
    gamma,
    bezier,
    bias,
    noise,
    uniform_numbers,
    permute,
};

}  // namespace voxtrast
