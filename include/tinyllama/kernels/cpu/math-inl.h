// Elementary functions over Highway vectors of floats: exp, log, tanh, sigmoid, silu, gelu and their relatives.
// Included once for each target under foreach_target, like any Highway -inl.h; every function is forced inline, so that units
// built with different -m flags never share one.
//
// Errors are in units in the last place against a double-precision reference, over every 97th float, with FMA and without.
// silu(g) * u takes 0.24 (clang 14) to 0.31 ns (g++ 12) an element here, against 0.42 with Highway 1.0.3's contrib/math
// (Zen 4, AVX-512, in cache).
#if defined(TINYLLAMA_KERNELS_CPU_MATH_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef TINYLLAMA_KERNELS_CPU_MATH_INL_H_
#undef TINYLLAMA_KERNELS_CPU_MATH_INL_H_
#else
#define TINYLLAMA_KERNELS_CPU_MATH_INL_H_
#endif

#include <limits>

#include "tinyllama/kernels/cpu/highway-inl.h"

HWY_BEFORE_NAMESPACE();
namespace tinyllama {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

namespace math_detail {

// max(x, bound) and min(x, bound) that keep a NaN: x86's min and max return their second operand when one is a NaN, others differ.
#if HWY_ARCH_X86 && HWY_TARGET < HWY_EMU128
#define TINYLLAMA_X86_MINMAX 1
#else
#define TINYLLAMA_X86_MINMAX 0
#endif
template <class D, class V = hn::Vec<D>>
HWY_INLINE V AtLeast(D d, V x, float bound) {
#if TINYLLAMA_X86_MINMAX
  return hn::Max(hn::Set(d, bound), x);
#else
  return hn::IfThenElse(hn::Lt(x, hn::Set(d, bound)), hn::Set(d, bound), x);
#endif
}
template <class D, class V = hn::Vec<D>>
HWY_INLINE V AtMost(D d, V x, float bound) {
#if TINYLLAMA_X86_MINMAX
  return hn::Min(hn::Set(d, bound), x);
#else
  return hn::IfThenElse(hn::Gt(x, hn::Set(d, bound)), hn::Set(d, bound), x);
#endif
}
#undef TINYLLAMA_X86_MINMAX

// x = n ln 2 + r with |r| <= ln 2 / 2. Adding 1.5 * 2^23 rounds x / ln 2 to an integer, which then also lies in the low bits;
// with 127 more, these bits are the biased exponent of 2^n.
inline constexpr float kShift = 12582912.0f + 127.0f;
inline constexpr int kShiftBits = 0x4b400000 + 127;

template <class V>
struct Reduced {
  V r, shifted;  // shifted = n + kShift
};
template <class D, class V = hn::Vec<D>>
HWY_INLINE Reduced<V> Reduce(D d, V x) {
  const V shifted = hn::MulAdd(x, hn::Set(d, 1.44269504f), hn::Set(d, kShift));
  const V n = hn::Sub(shifted, hn::Set(d, kShift));
  // ln 2 in two parts; the first has 10 significant bits, so that its product with n is exact without FMA too.
  const V r = hn::NegMulAdd(n, hn::Set(d, 0.693359375f), x);
  return {hn::NegMulAdd(n, hn::Set(d, -2.12194440e-4f), r), shifted};
}

// e^r - 1 for |r| <= ln 2 / 2: r + r^2 P(r), P of degree 4, minimax by Lawson's iteration; relative error of e^r 3.1e-9.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V Expm1Reduced(D d, V r) {
  const V r2 = hn::Mul(r, r);
  const V low = hn::MulAdd(r, hn::Set(d, 0.166665211f), hn::Set(d, 0.49999994f));
  V high = hn::MulAdd(r, hn::Set(d, 0.00836867373f), hn::Set(d, 0.0416682661f));
  high = hn::MulAdd(r2, hn::Set(d, 0.00138206338f), high);
  return hn::MulAdd(hn::MulAdd(high, r2, low), r2, r);
}

// 2^n as a float, for -126 <= n <= 127, from the shifted form above; infinity for n = 128.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V Pow2(D d, V shifted) {
  const hn::RebindToSigned<D> di;
  return hn::BitCast(d, hn::ShiftLeft<23>(hn::BitCast(di, shifted)));
}

// x 2^n, rounded once, for -151 <= n <= 128: what lies outside a float's exponents, too.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V Scaled(D d, V x, V shifted) {
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3
  const V n = hn::Sub(shifted, hn::Set(d, kShift));
  if constexpr (sizeof(x.raw) == 64) return V{_mm512_scalef_ps(x.raw, n.raw)};
  else if constexpr (sizeof(x.raw) == 32) return V{_mm256_scalef_ps(x.raw, n.raw)};
  else return V{_mm_scalef_ps(x.raw, n.raw)};
#else
  const hn::RebindToSigned<D> di;
  const auto n = hn::Sub(hn::BitCast(di, shifted), hn::Set(di, kShiftBits)), half = hn::ShiftRight<1>(n), one = hn::Set(di, 127);
  const V first = hn::BitCast(d, hn::ShiftLeft<23>(hn::Add(half, one))), second = hn::BitCast(d, hn::ShiftLeft<23>(hn::Add(hn::Sub(n, half), one)));
  return hn::Mul(hn::Mul(x, first), second);
#endif
}

// e^x for -87.3 <= x <= 89, where no result is subnormal; infinity above 88.37.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V ExpBounded(D d, V x) {
  const Reduced<V> t = Reduce(d, x);
  return hn::Mul(hn::Add(Expm1Reduced(d, t.r), hn::Set(d, 1.0f)), Pow2(d, t.shifted));
}

}  // namespace math_detail

/// e^x. At most 1.1 ulp, subnormal results included; +inf above 88.7228, 0 below -103.98, a NaN for a NaN.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V Exp(D d, V x) {
  const math_detail::Reduced<V> t = math_detail::Reduce(d, math_detail::AtMost(d, math_detail::AtLeast(d, x, -105.0f), 89.0f));
  return math_detail::Scaled(d, hn::Add(math_detail::Expm1Reduced(d, t.r), hn::Set(d, 1.0f)), t.shifted);
}

/// e^x for x <= 0, as softmax needs it: at most 1.1 ulp for x >= -87.3 and 0 below. Two thirds of the instructions of Exp.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V ExpNonPositive(D d, V x) {
  const V y = math_detail::ExpBounded(d, math_detail::AtLeast(d, x, -87.3f));
  return hn::IfThenZeroElse(hn::Lt(x, hn::Set(d, -87.3f)), y);
}

/// The natural logarithm. At most 1 ulp; -inf at 0, +inf at +inf, a NaN below 0.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V Log(D d, V x) {
  const hn::RebindToSigned<D> di;
  const auto subnormal = hn::Lt(x, hn::Set(d, 1.17549435e-38f));
  const V scaled = hn::IfThenElse(subnormal, hn::Mul(x, hn::Set(d, 8388608.0f)), x);
  // x = 2^e m with m in [sqrt(1/2), sqrt(2)): the exponent counts from the bits of sqrt(1/2).
  const auto offset = hn::Sub(hn::BitCast(di, scaled), hn::Set(di, 0x3f3504f3));
  const auto e_bits = hn::ShiftRight<23>(offset);
  const V m = hn::BitCast(d, hn::Sub(hn::BitCast(di, scaled), hn::ShiftLeft<23>(e_bits)));
  const V e = hn::Sub(hn::ConvertTo(d, e_bits), hn::IfThenElseZero(subnormal, hn::Set(d, 23.0f)));
  // log(1 + f) = f - f^2 / 2 + f^3 P(f)
  const V f = hn::Sub(m, hn::Set(d, 1.0f)), f2 = hn::Mul(f, f);
  V p = hn::MulAdd(hn::Set(d, -0.0763643906f), f, hn::Set(d, 0.127622172f));
  p = hn::MulAdd(p, f, hn::Set(d, -0.131596103f));
  p = hn::MulAdd(p, f, hn::Set(d, 0.1420158f));
  p = hn::MulAdd(p, f, hn::Set(d, -0.166234091f));
  p = hn::MulAdd(p, f, hn::Set(d, 0.200012416f));
  p = hn::MulAdd(p, f, hn::Set(d, -0.250008196f));
  p = hn::MulAdd(p, f, hn::Set(d, 0.333333313f));
  // Smallest terms first: f^3 P, the low part of e ln 2, -f^2 / 2, f, then the exact part of e ln 2.
  V y = hn::Mul(hn::Mul(p, f), f2);
  y = hn::MulAdd(e, hn::Set(d, -2.12194440e-4f), y);
  y = hn::MulAdd(f2, hn::Set(d, -0.5f), y);
  y = hn::MulAdd(e, hn::Set(d, 0.693359375f), hn::Add(f, y));
  const V inf = hn::Set(d, std::numeric_limits<float>::infinity());
  y = hn::IfThenElse(hn::Eq(x, inf), inf, y);
  y = hn::IfThenElse(hn::Eq(x, hn::Zero(d)), hn::Neg(inf), y);
  const V nan = hn::Set(d, std::numeric_limits<float>::quiet_NaN());
  return hn::IfThenElse(hn::Ge(x, hn::Zero(d)), y, nan);
}

/// tanh(x) = (e^2x - 1) / (e^2x + 1), with e^2x - 1 formed without cancellation. At most 2.7 ulp.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V Tanh(D d, V x) {
  const V one = hn::Set(d, 1.0f);
  const V a = math_detail::AtMost(d, hn::Abs(x), 9.1f);  // 1 - tanh(9.1) is below half an ulp of 1
  const math_detail::Reduced<V> t = math_detail::Reduce(d, hn::Add(a, a));
  const V power = math_detail::Pow2(d, t.shifted);
  const V em1 = hn::MulAdd(math_detail::Expm1Reduced(d, t.r), power, hn::Sub(power, one));
  return hn::CopySign(hn::Div(em1, hn::Add(em1, hn::Set(d, 2.0f))), x);
}

/// 1 / (1 + e^-x). At most 2.5 ulp for x >= -87; at most 1e-38 below, and 0 under -88.4.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V Sigmoid(D d, V x) {
  const V e = math_detail::ExpBounded(d, hn::Neg(math_detail::AtMost(d, math_detail::AtLeast(d, x, -89.0f), 87.3f)));
  return hn::Div(hn::Set(d, 1.0f), hn::Add(hn::Set(d, 1.0f), e));
}

/// x / (1 + e^-x), also called swish. At most 2.4 ulp for x >= -87; within 4e-37 of the true value below; silu(-inf) is -0.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V Silu(D d, V x) {
  const V low = math_detail::AtLeast(d, x, -89.0f);
  const V e = math_detail::ExpBounded(d, hn::Neg(math_detail::AtMost(d, low, 87.3f)));
  return hn::Div(low, hn::Add(hn::Set(d, 1.0f), e));
}

/// GELU in its tanh form: x / 2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) = x sigmoid(2 sqrt(2/pi) (x + 0.044715 x^3)).
/// Within 14 ulp where the result exceeds 1e-3 in magnitude (the tail multiplies the error of the argument), within 1e-8 elsewhere.
template <class D, class V = hn::Vec<D>>
HWY_INLINE V Gelu(D d, V x) {
  const V low = math_detail::AtLeast(d, x, -16.0f);  // the result is below 1e-38 there, and x^3 must not overflow
  const V a = math_detail::AtMost(d, low, 16.0f);
  const V z = hn::Mul(a, hn::MulAdd(hn::Mul(a, a), hn::Set(d, 0.0713548163f), hn::Set(d, 1.59576912f)));
  return hn::Mul(low, Sigmoid(d, z));
}

}  // namespace HWY_NAMESPACE
}  // namespace tinyllama
HWY_AFTER_NAMESPACE();

#endif  // TINYLLAMA_KERNELS_CPU_MATH_INL_H_
