// What the register tiles of all matrix products share: their size, and their stores.

#include "tinyllama/kernels/cpu/isa-inl.h"

#include <cstring>

#include <hwy/cache_control.h>

TINYLLAMA_BEFORE_NAMESPACE();
namespace tinyllama {
namespace TINYLLAMA_ISA {
namespace {

// Rows of X and panels of W held in registers: 8 x 3 x 16 lanes of f32 with 32 registers, 6 x 16 with 16.
inline constexpr int tile_rows = lanes == 16 ? 8 : lanes == 8 ? 6 : 4;
inline constexpr int tile_panels = lanes == 16 ? 3 : 1;
inline constexpr index_t tile_k = 1024;  // columns at a time: 3 panels of f32 are 192 KB, within a core's L2

// Weights are asked for so many bytes ahead where few rows of X use them: beside the arithmetic the hardware alone keeps too little of the stream
// on its way (Zen 4, q4_K in batches of 4: 1.4 times as fast; 1 KB and 12 KB ahead are a little slower).
inline constexpr index_t ahead = 4096;

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

/// bf16 of each lane, to nearest even, in its upper half; the lower half is not cleared.
HWY_INLINE VU RoundedHigh(V v) {
  const DU du;
  const VU u = hn::BitCast(du, v);
  return hn::Add(u, hn::Add(hn::Set(du, 0x7fffu), hn::And(hn::ShiftRight<16>(u), hn::Set(du, 1u))));
}
/// Pairs of bf16, `low` first in memory.
HWY_INLINE VU RoundedPairs(V low, V high) {
  return hn::Or(hn::ShiftRight<16>(RoundedHigh(low)), hn::And(RoundedHigh(high), hn::Set(DU(), 0xffff0000u)));
}
/// A vector of bf16.
HWY_INLINE void StoreBf16(V v, bf16* to) {
#if HWY_TARGET != HWY_SCALAR
  const hn::Rebind<std::uint16_t, D> d16;
  hn::StoreU(hn::TruncateTo(d16, hn::ShiftRight<16>(RoundedHigh(v))), d16, reinterpret_cast<std::uint16_t*>(to));
#else
  *to = bf16(hn::GetLane(v));
#endif
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
