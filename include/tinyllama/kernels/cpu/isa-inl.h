// For one pass over the kernels: the namespace of its instruction set, its attributes, and the dot products that Highway 1.0.3 lacks.
// kernels/cpu/table-inl.h includes the kernel files once per instruction set and takes the guard back before each.

#ifndef TINYLLAMA_ISA_INL_H_
#define TINYLLAMA_ISA_INL_H_

#include "tinyllama/kernels/cpu/highway-inl.h"

#include "tinyllama/kernels/cpu/math-inl.h"
#include "tinyllama/kernels/kernels.hpp"

#undef TINYLLAMA_ISA
#undef TINYLLAMA_ISA_NAME
#undef TINYLLAMA_BF16_VNNI
#undef TINYLLAMA_BEFORE_NAMESPACE
#undef TINYLLAMA_UNROLL

// Highway 1.0.3 has no target between AVX3 and Sapphire Rapids; Zen 4 and newer Xeons get a pass of their own over the AVX3 code. Names
// differ, because inline functions of the same name built with different flags would be merged by the linker.
#if HWY_TARGET <= HWY_AVX3 && HWY_ARCH_X86 && (defined(TINYLLAMA_EXTRA_PASS) || (defined(__AVX512BF16__) && defined(__AVX512VNNI__)))
#define TINYLLAMA_ISA_NAME HWY_CONCAT(HWY_NAMESPACE, _BF16)
#define TINYLLAMA_BF16_VNNI 1
#else
#define TINYLLAMA_ISA_NAME HWY_NAMESPACE
#define TINYLLAMA_BF16_VNNI 0
#endif
// The kernels of training are a second table, and under static dispatch in the same unit as the first.
#if defined(TINYLLAMA_TRAINING_PASS)
#define TINYLLAMA_ISA HWY_CONCAT(TINYLLAMA_ISA_NAME, _TRAINING)
#else
#define TINYLLAMA_ISA TINYLLAMA_ISA_NAME
#endif

#if defined(TINYLLAMA_EXTRA_PASS)
#define TINYLLAMA_BEFORE_NAMESPACE() HWY_PUSH_ATTRIBUTES(HWY_TARGET_STR ",avx512bf16,avx512vnni") static_assert(true, "")
#else
#define TINYLLAMA_BEFORE_NAMESPACE() HWY_BEFORE_NAMESPACE()
#endif

// On every loop over an array of accumulators: without it g++ -O2 keeps the array in memory, at a third of the speed.
// Vectors of fewer than 8 lanes do not get it: their 4 to 16 vectors a panel would take a minute to compile for CPUs that nobody measures.
#if HWY_TARGET > HWY_AVX2 && HWY_ARCH_X86
#define TINYLLAMA_UNROLL
#elif HWY_COMPILER_CLANG
#define TINYLLAMA_UNROLL _Pragma("clang loop unroll(full)")
#else
#define TINYLLAMA_UNROLL _Pragma("GCC unroll 32")
#endif

TINYLLAMA_BEFORE_NAMESPACE();
namespace tinyllama {
namespace TINYLLAMA_ISA {
namespace {

namespace hn = hwy::HWY_NAMESPACE;
namespace math = tinyllama::HWY_NAMESPACE;

using D = hn::CappedTag<float, 16>;
using DI = hn::RebindToSigned<D>;
using DU = hn::RebindToUnsigned<D>;
using V = hn::Vec<D>;
using VI = hn::Vec<DI>;
using VU = hn::Vec<DU>;  // four bytes a lane: codes of four columns
inline constexpr index_t lanes = static_cast<index_t>(hn::MaxLanes(D()));  // the targets with vectors of unknown length are left out
inline constexpr index_t subs = panel_rows / lanes;                        // vectors that make up the 16 rows of a panel

/// Keeps a loaded vector in its register: tuned for no CPU in particular, g++ 12 loads it anew for each use, and loads then bound a tile of dot
/// products (76% of the int8 peak instead of 89%, Zen 5).
HWY_INLINE void Hold([[maybe_unused]] VU& v) {
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3
  asm("" : "+v"(v.raw));
#endif
}

/// Floats of 16 and 8 bits, and codes of 8 bits, widened: [lanes] elements at p.
HWY_INLINE V Widen(D d, const float* p) { return hn::LoadU(d, p); }
HWY_INLINE V Widen(D d, const f16* p) {
  const hn::Rebind<hwy::float16_t, D> dh;
  return hn::PromoteTo(d, hn::LoadU(dh, reinterpret_cast<const hwy::float16_t*>(p)));
}
HWY_INLINE V Widen(D d, const bf16* p) {
  const hn::Rebind<std::uint16_t, D> d16;
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(DU(), hn::LoadU(d16, reinterpret_cast<const std::uint16_t*>(p)))));
}
HWY_INLINE V Widen(D d, const std::int8_t* p) {
  const hn::Rebind<std::int8_t, D> d8;
  return hn::ConvertTo(d, hn::PromoteTo(DI(), hn::LoadU(d8, p)));
}

/// As f16 the bits are 2^8 too small, subnormals too; a NaN's would be 480, which no other has.
HWY_INLINE V Widen(D d, const e4m3* p) {
  const hn::Rebind<std::uint8_t, D> d8;
  const hn::Rebind<std::uint16_t, D> d16;
  const hn::Rebind<hwy::float16_t, D> dh;
  const auto u = hn::PromoteTo(d16, hn::LoadU(d8, reinterpret_cast<const std::uint8_t*>(p)));
  const auto half = hn::Or(hn::ShiftLeft<8>(hn::And(u, hn::Set(d16, std::uint16_t{0x80}))), hn::ShiftLeft<7>(hn::And(u, hn::Set(d16, std::uint16_t{0x7f}))));
  const V v = hn::Mul(hn::PromoteTo(d, hn::BitCast(dh, half)), hn::Set(d, 256.0f));
  return hn::IfThenElse(hn::Gt(hn::Abs(v), hn::Set(d, e4m3::most)), hn::BitCast(d, hn::Set(DU(), 0x7fc00000u)), v);
}

/// Whether a page of the cache in such elements has scales, one a position.
template <class E>
inline constexpr bool has_scales = std::is_same_v<E, std::int8_t>;
/// The scales of the positions of a page of codes, behind its `rows` values for each.
template <class E>
HWY_INLINE const float* PageScales(const E* page, index_t rows) {
  return reinterpret_cast<const float*>(page + rows * page_tokens);
}

/// acc[lane] += sum of the lane's four products of an unsigned and a signed byte.
HWY_INLINE VI Dot4(VI acc, VU u8, VU s8) {
#if TINYLLAMA_BF16_VNNI
  return VI{_mm512_dpbusd_epi32(acc.raw, u8.raw, s8.raw)};
#elif HWY_ARCH_X86 && HWY_TARGET <= HWY_SSSE3  // elsewhere the sum goes to other lanes
  const DI di;
  // Even and odd bytes as 16-bit lanes: products fit, and madd adds the pairs of each 32-bit lane.
  const hn::Repartition<std::uint16_t, D> du16;
  const hn::Repartition<std::int16_t, D> di16;
  const auto u = hn::BitCast(du16, u8);
  const auto s = hn::BitCast(di16, s8);
  const auto even = hn::BitCast(di16, hn::And(u, hn::Set(du16, std::uint16_t{0xff}))), odd = hn::BitCast(di16, hn::ShiftRight<8>(u));
  VI unused = hn::Zero(di);
  acc = hn::ReorderWidenMulAccumulate(di, even, hn::ShiftRight<8>(hn::ShiftLeft<8>(s)), acc, unused);
  return hn::ReorderWidenMulAccumulate(di, odd, hn::ShiftRight<8>(s), acc, unused);
#else
  const DI di;
  const VI u = hn::BitCast(di, u8), s = hn::BitCast(di, s8), mask = hn::Set(di, 0xff);
  for (int i = 0; i < 4; ++i)
    acc = hn::Add(acc, hn::Mul(hn::And(hn::ShiftRightSame(u, 8 * i), mask), hn::ShiftRight<24>(hn::ShiftLeftSame(s, 24 - 8 * i))));
  return acc;
#endif
}

/// acc[lane] += sum of the lane's two products of 16 bits.
HWY_INLINE VI Dot2(VI acc, VI a, VI b) {
#if TINYLLAMA_BF16_VNNI
  return VI{_mm512_dpwssd_epi32(acc.raw, a.raw, b.raw)};
#elif HWY_ARCH_X86 && HWY_TARGET <= HWY_SSSE3
  const hn::Repartition<std::int16_t, D> d16;
  VI unused = hn::Zero(DI());
  return hn::ReorderWidenMulAccumulate(DI(), hn::BitCast(d16, a), hn::BitCast(d16, b), acc, unused);
#else
  acc = hn::Add(acc, hn::Mul(hn::ShiftRight<16>(a), hn::ShiftRight<16>(b)));
  return hn::Add(acc, hn::Mul(hn::ShiftRight<16>(hn::ShiftLeft<16>(a)), hn::ShiftRight<16>(hn::ShiftLeft<16>(b))));
#endif
}

}  // namespace
}  // namespace TINYLLAMA_ISA
}  // namespace tinyllama
HWY_AFTER_NAMESPACE();

#endif
