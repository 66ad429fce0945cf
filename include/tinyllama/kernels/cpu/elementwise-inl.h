// rmsnorm, rope, swiglu, softmax and conversions of activations, a row at a time.

#include "tinyllama/kernels/cpu/isa-inl.h"

#include <cmath>
#include <cstring>

TINYLLAMA_BEFORE_NAMESPACE();
namespace tinyllama {
namespace TINYLLAMA_ISA {
namespace {

// Whole vectors, then the tail through a padded copy: the one place where tails are handled.
template <class F>
HWY_INLINE void Map1(float* out, const float* a, index_t n, F f) {
  const D d;
  index_t i = 0;
  for (; i + lanes <= n; i += lanes) hn::StoreU(f(hn::LoadU(d, a + i)), d, out + i);
  if (i == n) return;
  alignas(64) float x[lanes] = {};
  std::memcpy(x, a + i, static_cast<std::size_t>(n - i) * sizeof(float));
  hn::Store(f(hn::Load(d, x)), d, x);
  std::memcpy(out + i, x, static_cast<std::size_t>(n - i) * sizeof(float));
}
template <class F>
HWY_INLINE void Map2(float* out, const float* a, const float* b, index_t n, F f) {
  const D d;
  index_t i = 0;
  for (; i + lanes <= n; i += lanes) hn::StoreU(f(hn::LoadU(d, a + i), hn::LoadU(d, b + i)), d, out + i);
  if (i == n) return;
  alignas(64) float x[lanes] = {}, y[lanes] = {};
  std::memcpy(x, a + i, static_cast<std::size_t>(n - i) * sizeof(float));
  std::memcpy(y, b + i, static_cast<std::size_t>(n - i) * sizeof(float));
  hn::Store(f(hn::Load(d, x), hn::Load(d, y)), d, x);
  std::memcpy(out + i, x, static_cast<std::size_t>(n - i) * sizeof(float));
}

struct AddOp {
  HWY_INLINE V operator()(V a, V b) const { return hn::Add(a, b); }
};
struct MulOp {
  HWY_INLINE V operator()(V a, V b) const { return hn::Mul(a, b); }
};
struct ScaleOp {
  V by;
  HWY_INLINE V operator()(V a) const { return hn::Mul(a, by); }
};
struct ScaledMulOp {
  V by;
  HWY_INLINE V operator()(V a, V b) const { return hn::Mul(hn::Mul(a, by), b); }
};
struct SwigluOp {
  HWY_INLINE V operator()(V gate, V up) const { return hn::Mul(math::Silu(D(), gate), up); }
};

HWY_INLINE float SumOfSquares(const float* x, index_t n) {
  const D d;
  V s0 = hn::Zero(d), s1 = s0, s2 = s0, s3 = s0;
  index_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
    const V a = hn::LoadU(d, x + i), b = hn::LoadU(d, x + i + lanes), c = hn::LoadU(d, x + i + 2 * lanes), e = hn::LoadU(d, x + i + 3 * lanes);
    s0 = hn::MulAdd(a, a, s0), s1 = hn::MulAdd(b, b, s1), s2 = hn::MulAdd(c, c, s2), s3 = hn::MulAdd(e, e, s3);
  }
  for (; i + lanes <= n; i += lanes) {
    const V a = hn::LoadU(d, x + i);
    s0 = hn::MulAdd(a, a, s0);
  }
  float total = hn::GetLane(hn::SumOfLanes(d, hn::Add(hn::Add(s0, s1), hn::Add(s2, s3))));
  for (; i < n; ++i) total += x[i] * x[i];
  return total;
}

void add(float* x, const float* residual, index_t n) { Map2(x, x, residual, n, AddOp()); }

void rmsnorm(float* out, const float* x, const float* gain, index_t n, float eps) {
  const float scale = 1.0f / std::sqrt(SumOfSquares(x, n) / static_cast<float>(n) + eps);
  Map2(out, x, gain, n, ScaledMulOp{hn::Set(D(), scale)});
}

void add_rmsnorm(float* out, float* x, const float* residual, const float* gain, index_t n, float eps) {
  add(x, residual, n);
  rmsnorm(out, x, gain, n, eps);
}

void rope(float* x, const float* cos, const float* sin, index_t heads, index_t head_dim, RopeLayout layout) {
  const D d;
  const index_t half = head_dim / 2;
  for (index_t h = 0; h < heads; ++h, x += head_dim) {
    index_t i = 0;
    if (layout == RopeLayout::half) {
      for (; i + lanes <= half; i += lanes) {
        const V a = hn::LoadU(d, x + i), b = hn::LoadU(d, x + half + i), c = hn::LoadU(d, cos + i), s = hn::LoadU(d, sin + i);
        hn::StoreU(hn::NegMulAdd(b, s, hn::Mul(a, c)), d, x + i);
        hn::StoreU(hn::MulAdd(a, s, hn::Mul(b, c)), d, x + half + i);
      }
    } else {
#if HWY_TARGET != HWY_SCALAR
      for (; i + lanes <= half; i += lanes) {
        V a, b;
        hn::LoadInterleaved2(d, x + 2 * i, a, b);
        const V c = hn::LoadU(d, cos + i), s = hn::LoadU(d, sin + i);
        hn::StoreInterleaved2(hn::NegMulAdd(b, s, hn::Mul(a, c)), hn::MulAdd(a, s, hn::Mul(b, c)), d, x + 2 * i);
      }
#endif
    }
    const index_t first = layout == RopeLayout::half ? 1 : 2, second = layout == RopeLayout::half ? half : 1;
    for (; i < half; ++i) {
      const float a = x[first * i], b = x[first * i + second];
      x[first * i] = a * cos[i] - b * sin[i];
      x[first * i + second] = b * cos[i] + a * sin[i];
    }
  }
}

void swiglu(float* out, const float* gate, const float* up, index_t n) { Map2(out, gate, up, n, SwigluOp()); }

void softmax(float* out, const float* x, index_t n, float scale) {
  if (n == 0) return;
  const D d;
  const V vs = hn::Set(d, scale);
  Map1(out, x, n, ScaleOp{vs});
  V m = hn::Set(d, out[0]);
  index_t i = 0;
  for (; i + lanes <= n; i += lanes) m = hn::Max(m, hn::LoadU(d, out + i));
  float max = hn::GetLane(hn::MaxOfLanes(d, m));
  for (; i < n; ++i) max = out[i] > max ? out[i] : max;
  V sum = hn::Zero(d);
  const V vmax = hn::Set(d, max);
  for (i = 0; i + lanes <= n; i += lanes) {
    const V e = math::ExpNonPositive(d, hn::Sub(hn::LoadU(d, out + i), vmax));
    hn::StoreU(e, d, out + i);
    sum = hn::Add(sum, e);
  }
  float total = hn::GetLane(hn::SumOfLanes(d, sum));
  if (i < n) {
    alignas(64) float t[lanes];
    for (index_t l = 0; l < lanes; ++l) t[l] = i + l < n ? out[i + l] - max : 0.0f;
    hn::Store(math::ExpNonPositive(d, hn::Load(d, t)), d, t);
    for (; i < n; ++i) total += out[i] = t[i % lanes];
  }
  Map1(out, out, n, ScaleOp{hn::Set(d, 1.0f / total)});
}

void round_bf16(bf16* out, const float* x, index_t n) {
  // By hand: DemoteTo of Highway 1.0.3 truncates. A NaN keeps its upper bits, with the quiet bit set.
  index_t i = 0;
#if HWY_TARGET != HWY_SCALAR
  const D d;
  const DU du;
  const hn::Rebind<std::uint16_t, D> d16;
  for (; i + lanes <= n; i += lanes) {
    const V v = hn::LoadU(d, x + i);
    const auto u = hn::BitCast(du, v);
    const auto rounded = hn::ShiftRight<16>(hn::Add(u, hn::Add(hn::Set(du, 0x7fffu), hn::And(hn::ShiftRight<16>(u), hn::Set(du, 1u)))));
    const auto nan = hn::Or(hn::ShiftRight<16>(u), hn::Set(du, 0x40u));
    const auto r = hn::IfThenElse(hn::RebindMask(du, hn::IsNaN(v)), nan, rounded);
    hn::StoreU(hn::TruncateTo(d16, r), d16, reinterpret_cast<std::uint16_t*>(out + i));
  }
#endif
  for (; i < n; ++i) out[i] = bf16(x[i]);
}

void quantise_activations(std::int8_t* q, float* scale, float* sum32, float* sum16, const float* x, index_t n) {
  const D d;
  const DI di;
  const hn::Rebind<std::int8_t, DI> d8;
  for (index_t g = 0; g < n / 32; ++g, x += 32, q += 32) {
    // Magnitudes compared as integers: a NaN is then the largest, and the scale becomes NaN with it.
    VI m = hn::Zero(di);
    for (index_t i = 0; i < 32; i += lanes) m = hn::Max(m, hn::BitCast(di, hn::Abs(hn::LoadU(d, x + i))));
    const float max = hn::GetLane(hn::BitCast(d, hn::MaxOfLanes(di, m))), inverse = quantise_inverse(max);
    scale[g] = max / 127.0f;
    VI sums[2];
    for (index_t h = 0; h < 2; ++h) {
      sums[h] = hn::Zero(di);
      for (index_t i = 16 * h; i < 16 * h + 16; i += lanes) {
        const V code = hn::Mul(hn::LoadU(d, x + i), hn::Set(d, inverse));
        const VI r = hn::NearestInt(hn::IfThenElseZero(hn::Eq(code, code), code));  // 0 for a NaN, which no integer can be
        hn::StoreU(hn::DemoteTo(d8, r), d8, q + i);
        sums[h] = hn::Add(sums[h], r);
      }
    }
    const auto sum_of = [&](VI v) HWY_ATTR { return scale[g] * static_cast<float>(hn::GetLane(hn::SumOfLanes(di, v))); };
    sum32[g] = sum_of(hn::Add(sums[0], sums[1]));
    sum16[2 * g] = sum_of(sums[0]), sum16[2 * g + 1] = sum_of(sums[1]);
  }
}

void quantise_columns(Int8Columns* to, index_t stride, const float* x, index_t n) {
  const D d;
  const DI di;
  const hn::Rebind<std::int8_t, DI> d8;
  for (index_t c = 0; c < n; c += int8_columns, to += stride) {
    const index_t groups = (n - c < int8_columns ? n - c : int8_columns) / 32;
    // Magnitudes compared as integers, as above.
    VI most = hn::Zero(di);
    float own[int8_columns / 32];
    for (index_t g = 0; g < groups; ++g) {
      VI m = hn::Zero(di);
      for (index_t i = 0; i < 32; i += lanes) m = hn::Max(m, hn::BitCast(di, hn::Abs(hn::LoadU(d, x + c + 32 * g + i))));
      m = hn::MaxOfLanes(di, m);
      own[g] = hn::GetLane(hn::BitCast(d, m));
      most = hn::Max(most, m);
    }
    const float all = hn::GetLane(hn::BitCast(d, most)), to_ratio = ratio_inverse(all);
    if (groups < int8_columns / 32) *to = {};
    to->scale = all / 127.0f * (32768.0f / 32767.0f);
    for (index_t g = 0; g < groups; ++g) {
      const V by = hn::Set(d, quantise_inverse(own[g]));
      std::int32_t sum[2];
      for (index_t h = 0; h < 2; ++h) {
        VI sums = hn::Zero(di);
        for (index_t i = 32 * g + 16 * h; i < 32 * g + 16 * h + 16; i += lanes) {
          const V code = hn::Mul(hn::LoadU(d, x + c + i), by);
          const VI r = hn::NearestInt(hn::IfThenElseZero(hn::Eq(code, code), code));
          hn::StoreU(hn::DemoteTo(d8, r), d8, to->codes + i);
          sums = hn::Add(sums, r);
        }
        sum[h] = hn::GetLane(hn::SumOfLanes(di, sums));
        to->sum16[h][g] = static_cast<std::int16_t>(sum[h]);
      }
      to->sum32[g] = sum[0] + sum[1];
      const float part = own[g] * to_ratio;
      const std::int32_t ratio = hn::GetLane(hn::NearestInt(hn::Set(d, part == part ? part : 0.0f)));
      const std::int32_t eighths = (to->sum32[g] * ratio + (1 << 11)) >> 12;
      if (g % 2 == 0) to->ratios[g / 2] = ratio * 65536, to->sums[g / 2] = eighths * 65536;
      else to->ratios[g / 2] |= ratio, to->sums[g / 2] |= eighths & 0xffff;
    }
  }
}

}  // namespace
}  // namespace TINYLLAMA_ISA
}  // namespace tinyllama
HWY_AFTER_NAMESPACE();
