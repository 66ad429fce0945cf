// What the register tiles of all matrix products share: their size, and their stores.

#include "tinyllama/kernels/cpu/isa-inl.h"

#include <cstring>

TINYLLAMA_BEFORE_NAMESPACE();
namespace tinyllama {
namespace TINYLLAMA_ISA {
namespace {

// Rows of X and panels of W held in registers: 8 x 3 x 16 lanes of f32 with 32 registers, 6 x 16 with 16.
inline constexpr int tile_rows = lanes == 16 ? 8 : lanes == 8 ? 6 : 4;
inline constexpr int tile_panels = lanes == 16 ? 3 : 1;
inline constexpr index_t tile_k = 1024;  // columns at a time: 3 panels of f32 are 192 KB, within a core's L2

/// y[0, valid) (+)= v for one vector of outputs.
HWY_INLINE void StoreRows(float* y, V v, index_t valid, bool accumulate) {
  const D d;
  if (valid >= lanes) {
    hn::StoreU(accumulate ? hn::Add(v, hn::LoadU(d, y)) : v, d, y);
  } else if (valid > 0) {
    alignas(64) float t[lanes];
    hn::Store(v, d, t);
    for (index_t i = 0; i < valid; ++i) y[i] = accumulate ? y[i] + t[i] : t[i];
  }
}

/// A pair of bf16 as one lane.
HWY_INLINE std::uint32_t Two(const bf16* x) {
  std::uint32_t u;
  std::memcpy(&u, x, 4);
  return u;
}

}  // namespace
}  // namespace TINYLLAMA_ISA
}  // namespace tinyllama
HWY_AFTER_NAMESPACE();
