// Vec: a SIMD vector of floats as a value, with operators and functions, so that one generic lambda runs over vectors and over floats.
#pragma once

#include <cstring>
#include <type_traits>

#include "tinyllama/kernels/cpu/highway-inl.h"

#include "tinyllama/kernels/cpu/math-inl.h"
#include "tinyllama/tensor/dtype.hpp"

// Units built with different -m flags must not share an inline function, and Highway's target does not tell all flags apart: the
// namespace's name holds the target and the flags above it.
#if defined(__AVX512BF16__)
#define TINYLLAMA_VEC_FLAGS _avx512bf16
#elif defined(__AVX512F__)
#define TINYLLAMA_VEC_FLAGS _avx512
#elif defined(__AVX2__) && defined(__FMA__)
#define TINYLLAMA_VEC_FLAGS _avx2_fma
#elif defined(__AVX__)
#define TINYLLAMA_VEC_FLAGS _avx
#elif defined(__SSE4_1__)
#define TINYLLAMA_VEC_FLAGS _sse4
#else
#define TINYLLAMA_VEC_FLAGS _base
#endif
#define TINYLLAMA_VEC_NAMESPACE HWY_CONCAT(HWY_NAMESPACE, HWY_CONCAT(_vec, TINYLLAMA_VEC_FLAGS))

HWY_BEFORE_NAMESPACE();
namespace tinyllama {
inline namespace TINYLLAMA_VEC_NAMESPACE {

namespace vec_detail {
namespace hn = hwy::HWY_NAMESPACE;
namespace math = tinyllama::HWY_NAMESPACE;
#if HWY_HAVE_SCALABLE
using Tag = hn::CappedTag<float, 1>;  // vectors of unknown length cannot be members
#else
using Tag = hn::ScalableTag<float>;
#endif
using OneTag = hn::CappedTag<float, 1>;
}  // namespace vec_detail

/// Which lanes of a Vec: what a comparison yields and select() takes.
struct Mask {
  hwy::HWY_NAMESPACE::Mask<vec_detail::Tag> raw;
  friend HWY_INLINE Mask operator&(Mask a, Mask b) { return {hwy::HWY_NAMESPACE::And(a.raw, b.raw)}; }
  friend HWY_INLINE Mask operator|(Mask a, Mask b) { return {hwy::HWY_NAMESPACE::Or(a.raw, b.raw)}; }
  friend HWY_INLINE Mask operator!(Mask a) { return {hwy::HWY_NAMESPACE::Not(a.raw)}; }
};

/// As many floats as the instruction set of this unit takes at once. A float converts to it, as the same value in each lane.
struct Vec {
  using Raw = hwy::HWY_NAMESPACE::Vec<vec_detail::Tag>;
  Raw raw;

  static constexpr index_t lanes = static_cast<index_t>(hwy::HWY_NAMESPACE::MaxLanes(vec_detail::Tag()));

  Vec() = default;
  HWY_INLINE Vec(Raw r) : raw(r) {}
  HWY_INLINE Vec(float x) : raw(hwy::HWY_NAMESPACE::Set(vec_detail::Tag(), x)) {}

  static HWY_INLINE Vec load(const float* p) { return hwy::HWY_NAMESPACE::LoadU(vec_detail::Tag(), p); }
  HWY_INLINE void store(float* p) const { hwy::HWY_NAMESPACE::StoreU(raw, vec_detail::Tag(), p); }

  friend HWY_INLINE Vec operator+(Vec a, Vec b) { return hwy::HWY_NAMESPACE::Add(a.raw, b.raw); }
  friend HWY_INLINE Vec operator-(Vec a, Vec b) { return hwy::HWY_NAMESPACE::Sub(a.raw, b.raw); }
  friend HWY_INLINE Vec operator*(Vec a, Vec b) { return hwy::HWY_NAMESPACE::Mul(a.raw, b.raw); }
  friend HWY_INLINE Vec operator/(Vec a, Vec b) { return hwy::HWY_NAMESPACE::Div(a.raw, b.raw); }
  friend HWY_INLINE Vec operator-(Vec a) { return hwy::HWY_NAMESPACE::Neg(a.raw); }
  HWY_INLINE Vec& operator+=(Vec b) { return *this = *this + b; }
  HWY_INLINE Vec& operator-=(Vec b) { return *this = *this - b; }
  HWY_INLINE Vec& operator*=(Vec b) { return *this = *this * b; }
  HWY_INLINE Vec& operator/=(Vec b) { return *this = *this / b; }

  friend HWY_INLINE Mask operator<(Vec a, Vec b) { return {hwy::HWY_NAMESPACE::Lt(a.raw, b.raw)}; }
  friend HWY_INLINE Mask operator<=(Vec a, Vec b) { return {hwy::HWY_NAMESPACE::Le(a.raw, b.raw)}; }
  friend HWY_INLINE Mask operator>(Vec a, Vec b) { return {hwy::HWY_NAMESPACE::Gt(a.raw, b.raw)}; }
  friend HWY_INLINE Mask operator>=(Vec a, Vec b) { return {hwy::HWY_NAMESPACE::Ge(a.raw, b.raw)}; }
  friend HWY_INLINE Mask operator==(Vec a, Vec b) { return {hwy::HWY_NAMESPACE::Eq(a.raw, b.raw)}; }
  friend HWY_INLINE Mask operator!=(Vec a, Vec b) { return !(a == b); }  // Highway 1.0.3's Ne is false for NaNs on AVX2 and AVX-512
};

/// a where the mask is set, b elsewhere.
HWY_INLINE Vec select(Mask m, Vec a, Vec b) { return hwy::HWY_NAMESPACE::IfThenElse(m.raw, a.raw, b.raw); }
HWY_INLINE float select(bool m, float a, float b) { return m ? a : b; }

/// a > b ? a : b, so b where either is a NaN; on x86 one instruction.
HWY_INLINE Vec max(Vec a, Vec b) {
#if HWY_ARCH_X86 && HWY_TARGET < HWY_EMU128
  return hwy::HWY_NAMESPACE::Max(a.raw, b.raw);
#else
  return select(a > b, a, b);
#endif
}
HWY_INLINE float max(float a, float b) { return a > b ? a : b; }

/// a < b ? a : b, so b where either is a NaN.
HWY_INLINE Vec min(Vec a, Vec b) {
#if HWY_ARCH_X86 && HWY_TARGET < HWY_EMU128
  return hwy::HWY_NAMESPACE::Min(a.raw, b.raw);
#else
  return select(a < b, a, b);
#endif
}
HWY_INLINE float min(float a, float b) { return a < b ? a : b; }

// Each function over vectors, and over one float by the same instructions: the same bits.
#define TINYLLAMA_VEC_FUNCTION(name, expression)               \
  HWY_INLINE Vec name(Vec v) {                                 \
    const vec_detail::Tag d;                                   \
    const auto x = v.raw;                                      \
    namespace hn = hwy::HWY_NAMESPACE;                         \
    namespace math = tinyllama::HWY_NAMESPACE;                 \
    return expression;                                         \
  }                                                            \
  HWY_INLINE float name(float v) {                             \
    const vec_detail::OneTag d;                                \
    const auto x = hwy::HWY_NAMESPACE::Set(d, v);              \
    namespace hn = hwy::HWY_NAMESPACE;                         \
    namespace math = tinyllama::HWY_NAMESPACE;                 \
    return hn::GetLane(expression);                            \
  }
// Errors in ulp: see kernels/cpu/math-inl.h. rsqrt is 1 / sqrt(x), correctly rounded twice.
TINYLLAMA_VEC_FUNCTION(exp, math::Exp(d, x))
TINYLLAMA_VEC_FUNCTION(log, math::Log(d, x))
TINYLLAMA_VEC_FUNCTION(tanh, math::Tanh(d, x))
TINYLLAMA_VEC_FUNCTION(sigmoid, math::Sigmoid(d, x))
TINYLLAMA_VEC_FUNCTION(silu, math::Silu(d, x))
TINYLLAMA_VEC_FUNCTION(gelu, math::Gelu(d, x))
TINYLLAMA_VEC_FUNCTION(abs, hn::Abs((void(d), x)))
TINYLLAMA_VEC_FUNCTION(sqrt, hn::Sqrt((void(d), x)))
TINYLLAMA_VEC_FUNCTION(rsqrt, hn::Div(hn::Set(d, 1.0f), hn::Sqrt(x)))
TINYLLAMA_VEC_FUNCTION(relu, hn::IfThenElse(hn::Gt(x, hn::Zero(d)), x, hn::Zero(d)))
TINYLLAMA_VEC_FUNCTION(square, hn::Mul(x, (void(d), x)))
#undef TINYLLAMA_VEC_FUNCTION

/// a b + c; rounded once where the instruction set has FMA, twice elsewhere.
HWY_INLINE Vec fma(Vec a, Vec b, Vec c) { return hwy::HWY_NAMESPACE::MulAdd(a.raw, b.raw, c.raw); }
HWY_INLINE float fma(float a, float b, float c) {
  const vec_detail::OneTag d;
  namespace hn = hwy::HWY_NAMESPACE;
  return hn::GetLane(hn::MulAdd(hn::Set(d, a), hn::Set(d, b), hn::Set(d, c)));
}

namespace vec_detail {

// Whole vectors from and to memory, in any of the three element types. Conversions give the bits
// of dtype.hpp on every target, but for the payload of a NaN.
HWY_INLINE Vec load(const float* p) { return Vec::load(p); }
HWY_INLINE void store(Vec v, float* p) { v.store(p); }

HWY_INLINE Vec load(const bf16* p) {
  const hn::Rebind<std::uint16_t, Tag> d16;
  const hn::RebindToUnsigned<Tag> d32;
  const auto bits = hn::LoadU(d16, reinterpret_cast<const std::uint16_t*>(p));
  return Vec(hn::BitCast(Tag(), hn::ShiftLeft<16>(hn::PromoteTo(d32, bits))));
}

// The lower 16 bits of each lane.
template <class VU>
HWY_INLINE void store_low_half(VU bits, std::uint16_t* p) {
  const hn::Rebind<std::uint16_t, Tag> d16;
  const hn::RebindToSigned<Tag> di;
  hn::StoreU(hn::DemoteTo(d16, hn::BitCast(di, bits)), d16, p);
}

HWY_INLINE void store(Vec v, bf16* p) {
  const hn::RebindToUnsigned<Tag> d;
  const auto u = hn::BitCast(d, v.raw);
  const auto odd = hn::And(hn::ShiftRight<16>(u), hn::Set(d, 1u));
  const auto rounded = hn::ShiftRight<16>(hn::Add(u, hn::Add(odd, hn::Set(d, 0x7fffu))));
  const auto quiet = hn::Or(hn::ShiftRight<16>(u), hn::Set(d, 0x40u));
  const auto is_nan = hn::RebindMask(d, hn::Not(hn::Eq(v.raw, v.raw)));
  store_low_half(hn::IfThenElse(is_nan, quiet, rounded), reinterpret_cast<std::uint16_t*>(p));
}

#if (HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX2 && !defined(HWY_DISABLE_F16C)) || (HWY_ARCH_ARM_A64 && HWY_TARGET == HWY_NEON)
#define TINYLLAMA_VEC_NATIVE_F16 1
#else
#define TINYLLAMA_VEC_NATIVE_F16 0  // Highway 1.0.3's emulation is wrong for infinities and NaNs, and rounds by truncation
#endif

HWY_INLINE Vec load(const f16* p) {
#if TINYLLAMA_VEC_NATIVE_F16
  const hn::Rebind<hwy::float16_t, Tag> d16;
  return Vec(hn::PromoteTo(Tag(), hn::LoadU(d16, reinterpret_cast<const hwy::float16_t*>(p))));
#else
  const hn::Rebind<std::uint16_t, Tag> d16;
  const hn::RebindToUnsigned<Tag> d;
  const auto u = hn::PromoteTo(d, hn::LoadU(d16, reinterpret_cast<const std::uint16_t*>(p)));
  const auto sign = hn::ShiftLeft<16>(hn::And(u, hn::Set(d, 0x8000u)));
  const auto magnitude = hn::ShiftLeft<13>(hn::And(u, hn::Set(d, 0x7fffu)));
  // Times 2^112 rebiases the exponent, of subnormals too; infinities and NaNs come out as 65536 and above.
  const auto scaled = hn::Mul(hn::BitCast(Tag(), magnitude), hn::Set(Tag(), 0x1p112f));
  const auto special = hn::RebindMask(d, hn::Ge(scaled, hn::Set(Tag(), 65536.0f)));
  const auto bits = hn::Or(hn::BitCast(d, scaled), hn::IfThenElseZero(special, hn::Set(d, 0x7f800000u)));
  return Vec(hn::BitCast(Tag(), hn::Or(bits, sign)));
#endif
}

HWY_INLINE void store(Vec v, f16* p) {
#if TINYLLAMA_VEC_NATIVE_F16
  const hn::Rebind<hwy::float16_t, Tag> d16;
  hn::StoreU(hn::DemoteTo(d16, v.raw), d16, reinterpret_cast<hwy::float16_t*>(p));
#else
  const hn::RebindToUnsigned<Tag> d;
  const hn::RebindToSigned<Tag> di;
  const auto u = hn::BitCast(d, v.raw);
  const auto sign = hn::And(hn::ShiftRight<16>(u), hn::Set(d, 0x8000u));
  const auto a = hn::And(u, hn::Set(d, 0x7fffffffu));
  const auto ai = hn::BitCast(di, a);  // non-negative, so that signed comparisons, which every target has, will do
  const auto odd = hn::And(hn::ShiftRight<13>(a), hn::Set(d, 1u));
  const auto normal = hn::ShiftRight<13>(hn::Add(hn::Sub(a, hn::Set(d, 0x38000000u)), hn::Add(odd, hn::Set(d, 0xfffu))));
  const auto shifted = hn::Add(hn::BitCast(Tag(), a), hn::Set(Tag(), 0.5f));
  const auto subnormal = hn::Sub(hn::BitCast(d, shifted), hn::Set(d, 0x3f000000u));
  const auto nan = hn::Or(hn::And(hn::ShiftRight<13>(a), hn::Set(d, 0x3ffu)), hn::Set(d, 0x7e00u));
  const auto above = [&](std::int32_t bound) HWY_ATTR { return hn::RebindMask(d, hn::Gt(ai, hn::Set(di, bound))); };
  auto h = hn::IfThenElse(above(0x387fffff), normal, subnormal);
  h = hn::IfThenElse(above(0x477fefff), hn::Set(d, 0x7c00u), h);
  h = hn::IfThenElse(above(0x7f800000), nan, h);
  store_low_half(hn::Or(h, sign), reinterpret_cast<std::uint16_t*>(p));
#endif
}
#undef TINYLLAMA_VEC_NATIVE_F16

}  // namespace vec_detail

}  // namespace TINYLLAMA_VEC_NAMESPACE
}  // namespace tinyllama
HWY_AFTER_NAMESPACE();
