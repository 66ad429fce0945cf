// AdamW on a stretch of weights, whose moments are stored in any of their formats (kernels/moments.hpp). Behind gradients-inl.h, whose loop over strips it uses.

#include "tinyllama/kernels/cpu/isa-inl.h"

#include <cstring>

#include "tinyllama/kernels/training.hpp"

TINYLLAMA_BEFORE_NAMESPACE();
namespace tinyllama {
namespace TINYLLAMA_ISA {
namespace {

/// The numbers of a task, and what they do to a vector of weights.
struct Adamw {
  V keep, rate, eps, scale, beta1, beta2, rest1, rest2, correction2;
  HWY_INLINE explicit Adamw(const AdamwTask& t) {
    const D d;
    keep = hn::Set(d, 1.0f - t.lr * t.decay), rate = hn::Set(d, t.lr / t.correction1), eps = hn::Set(d, t.eps), scale = hn::Set(d, t.scale);
    beta1 = hn::Set(d, t.beta1), beta2 = hn::Set(d, t.beta2), rest1 = hn::Set(d, 1.0f - t.beta1), rest2 = hn::Set(d, 1.0f - t.beta2);
    correction2 = hn::Set(d, 1.0f / t.correction2);
  }
  /// m and v become those of this step; returns p.
  HWY_INLINE V Step(V p, V gradient, V& m, V& v) const {
    const V g = hn::Mul(gradient, scale);
    m = hn::MulAdd(beta1, m, hn::Mul(rest1, g)), v = hn::MulAdd(beta2, v, hn::Mul(rest2, hn::Mul(g, g)));
    const V step = hn::Div(hn::Mul(rate, m), hn::Add(hn::Sqrt(hn::Mul(v, correction2)), eps));
    return hn::Sub(hn::Mul(keep, p), step);
  }
};

/// rounding_bits() of the weights from `place` on.
HWY_INLINE VU RoundingBits(std::uint32_t key, std::uint32_t place) {
  const DU du;
  VU h = hn::Xor(hn::Set(du, key), hn::Mul(hn::Add(hn::Iota(du, 0), hn::Set(du, place)), hn::Set(du, 0x9e3779b1u)));
  h = hn::Mul(hn::Xor(h, hn::ShiftRight<16>(h)), hn::Set(du, 0x7feb352du));
  h = hn::Mul(hn::Xor(h, hn::ShiftRight<15>(h)), hn::Set(du, 0x846ca68bu));
  return hn::Xor(h, hn::ShiftRight<16>(h));
}
HWY_INLINE VU LowerHalves(VU bits) { return hn::And(bits, hn::Set(DU(), 0xffffu)); }

HWY_INLINE V LoadSome(const bf16* p, index_t count) {
  if (count == lanes) return Widen(D(), p);
  bf16 t[lanes] = {};
  std::memcpy(t, p, static_cast<std::size_t>(count) * sizeof(bf16));
  return Widen(D(), t);
}
/// round_moment()
HWY_INLINE void StoreRounded(bf16* p, V x, VU random, index_t count) {
  const hn::Rebind<std::uint16_t, D> d16;
  const auto halves = hn::TruncateTo(d16, hn::ShiftRight<16>(hn::Add(hn::BitCast(DU(), x), random)));
  if (count == lanes) return hn::StoreU(halves, d16, reinterpret_cast<std::uint16_t*>(p));
  alignas(64) std::uint16_t t[lanes];
  hn::Store(halves, d16, t);
  std::memcpy(p, t, static_cast<std::size_t>(count) * sizeof(bf16));
}

/// decode_m(), decode_v(), without their scales: whole vectors, as blocks are.
template <std::uint32_t bias, bool sign>
HWY_INLINE V Decode(const std::uint8_t* codes) {
  const DU du;
  const hn::Rebind<std::uint8_t, D> d8;
  const VU u = hn::PromoteTo(du, hn::LoadU(d8, codes)), c = sign ? hn::And(u, hn::Set(du, 0x7fu)) : u;
  const VU bits = hn::IfThenZeroElse(hn::Eq(c, hn::Zero(du)), hn::ShiftLeft<20>(hn::Add(c, hn::Set(du, bias))));
  return hn::BitCast(D(), sign ? hn::Or(bits, hn::ShiftLeft<24>(hn::Xor(u, c))) : bits);
}
/// The code of a scaled magnitude that is not below code 1.
template <std::uint32_t bias>
HWY_INLINE VU Code(V y, VU random) {
  const DU du;
  return hn::Sub(hn::ShiftRight<20>(hn::Add(hn::BitCast(du, y), hn::Or(hn::ShiftLeft<4>(random), hn::Set(du, 8u)))), hn::Set(du, bias));
}
HWY_INLINE VU OneWhere(hn::Mask<D> m) { return hn::And(hn::BitCast(DU(), hn::VecFromMask(D(), m)), hn::Set(DU(), 1u)); }
HWY_INLINE void StoreCodes(std::uint8_t* to, VU codes) {
  const hn::Rebind<std::uint8_t, D> d8;
  hn::StoreU(hn::TruncateTo(d8, codes), d8, to);
}
/// encode_m(), encode_v()
HWY_INLINE void EncodeM(std::uint8_t* to, V x, V inverse, VU random) {
  const D d;
  const V y = hn::Mul(hn::Abs(x), inverse), least = hn::Set(d, m_code_least);
  const V chance = hn::Mul(hn::Mul(least, hn::Add(hn::ConvertTo(d, hn::BitCast(DI(), random)), hn::Set(d, 0.5f))), hn::Set(d, 0x1p-16f));
  const VU code = hn::IfThenElse(hn::RebindMask(DU(), hn::Lt(y, least)), OneWhere(hn::Gt(y, chance)), Code<m_code_bias>(y, random));
  StoreCodes(to, hn::Or(code, hn::ShiftLeft<7>(hn::ShiftRight<31>(hn::BitCast(DU(), x)))));
}
HWY_INLINE void EncodeV(std::uint8_t* to, V x, V inverse, VU random) {
  const D d;
  const V y = hn::Mul(x, inverse);
  StoreCodes(to, hn::IfThenElse(hn::RebindMask(DU(), hn::Lt(y, hn::Set(d, v_code_least))), OneWhere(hn::Gt(y, hn::Zero(d))), Code<v_code_bias>(y, random)));
}

void adamw_f32(const AdamwTask& t) {
  const Adamw a(t);
  float *const ms = t.m.floats(), *const vs = t.v.floats();
  Strips(t.n, [&](index_t i, index_t count) HWY_ATTR {
    V m = LoadSome(ms + i, count), v = LoadSome(vs + i, count);
    StoreSome(t.p + i, a.Step(LoadSome(t.p + i, count), LoadSome(t.gradient + i, count), m, v), count);
    StoreSome(ms + i, m, count), StoreSome(vs + i, v, count);
  });
}

void adamw_bf16(const AdamwTask& t) {
  const Adamw a(t);
  bf16 *const ms = t.m.halves(), *const vs = t.v.halves();
  Strips(t.n, [&](index_t i, index_t count) HWY_ATTR {
    V m = LoadSome(ms + i, count), v = LoadSome(vs + i, count);
    StoreSome(t.p + i, a.Step(LoadSome(t.p + i, count), LoadSome(t.gradient + i, count), m, v), count);
    const VU random = RoundingBits(t.key, t.place + static_cast<std::uint32_t>(i));
    StoreRounded(ms + i, m, LowerHalves(random), count), StoreRounded(vs + i, v, hn::ShiftRight<16>(random), count);
  });
}

// A block: its new moments in f32 and their largest, then their codes. What pads the last block is 0 and stays so.
void adamw_int8(const AdamwTask& t) {
  const D d;
  const Adamw a(t);
  alignas(64) float ms[moment_block], vs[moment_block];
  for (index_t at = 0; at < t.n; at += moment_block) {
    const index_t n = t.n - at < moment_block ? t.n - at : moment_block;
    const MomentArray m_to = t.m.from(at), v_to = t.v.from(at);
    std::uint8_t *const m_codes = m_to.codes(), *const v_codes = v_to.codes();
    const V m_scale = hn::Set(d, *m_to.scales), v_scale = hn::Set(d, *v_to.scales);
    V m_most = hn::Zero(d), v_most = m_most;
    Strips(n, [&](index_t i, index_t count) HWY_ATTR {
      V m = hn::Mul(Decode<m_code_bias, true>(m_codes + i), m_scale), v = hn::Mul(Decode<v_code_bias, false>(v_codes + i), v_scale);
      StoreSome(t.p + at + i, a.Step(LoadSome(t.p + at + i, count), LoadSome(t.gradient + at + i, count), m, v), count);
      hn::Store(m, d, ms + i), hn::Store(v, d, vs + i);
      m_most = hn::Max(m_most, hn::Abs(m)), v_most = hn::Max(v_most, v);
    });
    *m_to.scales = moment_scale(hn::GetLane(hn::MaxOfLanes(d, m_most))), *v_to.scales = moment_scale(hn::GetLane(hn::MaxOfLanes(d, v_most)));
    const V m_inverse = hn::Set(d, inverse_scale(*m_to.scales)), v_inverse = hn::Set(d, inverse_scale(*v_to.scales));
    Strips(n, [&](index_t i, index_t) HWY_ATTR {
      const VU random = RoundingBits(t.key, t.place + static_cast<std::uint32_t>(at + i));
      EncodeM(m_codes + i, hn::Load(d, ms + i), m_inverse, LowerHalves(random)), EncodeV(v_codes + i, hn::Load(d, vs + i), v_inverse, hn::ShiftRight<16>(random));
    });
  }
}

void adamw(const AdamwTask& t) {
  if (t.m.format == Moments::f32) adamw_f32(t);
  else if (t.m.format == Moments::bf16) adamw_bf16(t);
  else adamw_int8(t);
}

}  // namespace
}  // namespace TINYLLAMA_ISA
}  // namespace tinyllama
HWY_AFTER_NAMESPACE();
