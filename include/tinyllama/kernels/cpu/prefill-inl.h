// Causal attention of many query rows over a paged cache by bf16 dot products: a page's keys and values are brought into panels, which all
// rows of the task then share. matmul-inl.h comes first.

#include "tinyllama/kernels/cpu/isa-inl.h"

#include <cmath>
#include <cstring>
#include <limits>

TINYLLAMA_BEFORE_NAMESPACE();
namespace tinyllama {
namespace TINYLLAMA_ISA {
namespace {

#if TINYLLAMA_BF16_VNNI

/// Rows a and b (none: zeros), interleaved in pairs of bf16: [16][2].
template <class E>
HWY_INLINE void PairRows(const E* a, const E* b, bf16* to) {
  const D d;
  hn::StoreU(RoundedPairs(Widen(d, a), b ? Widen(d, b) : hn::Zero(d)), DU(), reinterpret_cast<std::uint32_t*>(to));
}

/// y [rows, panels x 16] (+)= x [rows, k] b^T
HWY_INLINE void PrefillProduct(const bf16* x, index_t ldx, const bf16* b, index_t panel_stride, index_t panels, index_t k, index_t rows, float* y,
                               index_t ldy, bool accumulate) {
  index_t p = 0;
  for (; p + 4 <= panels; p += 4) {
    index_t i = 0;
    for (; i + 4 <= rows; i += 4) Bf16Tile<4, 4>(x + i * ldx, ldx, b + p * panel_stride, panel_stride, k, y + i * ldy + p * 16, ldy, 64, accumulate);
    for (; i < rows; ++i) Bf16Tile<1, 4>(x + i * ldx, ldx, b + p * panel_stride, panel_stride, k, y + i * ldy + p * 16, ldy, 64, accumulate);
  }
  for (; p < panels; ++p) {
    index_t i = 0;
    for (; i + 4 <= rows; i += 4) Bf16Tile<4, 1>(x + i * ldx, ldx, b + p * panel_stride, 0, k, y + i * ldy + p * 16, ldy, 16, accumulate);
    for (; i < rows; ++i) Bf16Tile<1, 1>(x + i * ldx, ldx, b + p * panel_stride, 0, k, y + i * ldy + p * 16, ldy, 16, accumulate);
  }
}

template <class E>
void AttendBf16(const AttentionTask& t) {
  const D d;
  const index_t hd = t.head_dim, ldq = even(hd), stride = head_stride(hd), k_panel = ldq * 16, v_panel = page_tokens * 16;
  alignas(64) bf16 q[prefill_elements], k[page_tokens * max_head_stride], v[page_tokens * max_head_stride], weights[prefill_rows(1) * page_tokens];
  alignas(64) float s[prefill_rows(1) * page_tokens];
  const V lowest = hn::Set(d, -std::numeric_limits<float>::infinity()), scale = hn::Set(d, t.scale);
  for (index_t r = 0; r < t.rows; ++r) {
    const float* from = t.q + r / t.group * t.ldq + r % t.group * hd;
    for (index_t i = 0; i < hd; ++i) q[r * ldq + i] = bf16(from[i]);
    if (hd % 2) q[r * ldq + hd] = bf16();
    t.max[r] = -std::numeric_limits<float>::infinity(), t.sum[r] = 0;
  }
  std::memset(t.o, 0, static_cast<std::size_t>(t.rows * stride) * sizeof(float));
  const index_t last = t.position + (t.rows - 1) / t.group + 1, end = last < t.end ? last : t.end;
  for (index_t p0 = t.begin; p0 < end; p0 += page_tokens) {
    const std::byte* page = t.pages[p0 / page_tokens];
    const E *page_k = reinterpret_cast<const E*>(page + t.k_offset), *page_v = reinterpret_cast<const E*>(page + t.v_offset);
    const index_t keys = end - p0 < page_tokens ? end - p0 : page_tokens, panels = (keys + 15) / 16;
    for (index_t p = 0; p < panels; ++p)
      for (index_t i = 0; i < hd; i += 2)
        PairRows(page_k + i * page_tokens + p * 16, i + 1 < hd ? page_k + (i + 1) * page_tokens + p * 16 : nullptr, k + p * k_panel + i * 16);
    for (index_t i = 0; i < keys; i += 2)  // past the last key lies memory that was never written
      for (index_t c = 0; c < stride; c += 16) PairRows(page_v + i * stride + c, i + 1 < keys ? page_v + (i + 1) * stride + c : nullptr, v + c / 16 * v_panel + i * 16);
    PrefillProduct(q, ldq, k, k_panel, panels, hd, t.rows, s, page_tokens, false);
    for (index_t r = 0; r < t.rows; ++r) {
      const index_t own = t.position + r / t.group + 1, until = own < t.end ? own : t.end, seen = until < p0 ? 0 : until - p0;
      float* row = s + r * page_tokens;
      bf16* w = weights + r * page_tokens;
      if (seen == 0) {
        std::memset(static_cast<void*>(w), 0, page_tokens * sizeof(bf16));
        continue;
      }
      V m = lowest;
      for (index_t p = 0; p < panels * 16; p += 16) {
        V x = hn::Mul(hn::Load(d, row + p), scale);
        if constexpr (has_scales<E>) x = hn::Mul(x, hn::LoadU(d, PageScales(page_k, hd) + p));
        if (seen < p + 16) x = hn::IfThenElse(hn::Lt(hn::Iota(d, static_cast<float>(p)), hn::Set(d, static_cast<float>(seen))), x, lowest);
        hn::Store(x, d, row + p);
        m = hn::Max(m, x);
      }
      const float before = t.max[r], found = hn::GetLane(hn::MaxOfLanes(d, m)), max = found > before ? found : before;
      const float factor = max == before ? 1.0f : std::exp(before - max);
      V sum = hn::Zero(d);
      for (index_t p = 0; p < panels * 16; p += 16) {
        const V e = math::ExpNonPositive(d, hn::Sub(hn::Load(d, row + p), hn::Set(d, max)));
        // Past the last key the scales were never written: 0 times what may be a NaN.
        if constexpr (has_scales<E>)
          StoreBf16(hn::IfThenElseZero(hn::Gt(e, hn::Zero(d)), hn::Mul(e, hn::LoadU(d, PageScales(page_v, stride) + p))), w + p);
        else StoreBf16(e, w + p);
        sum = hn::Add(sum, e);
      }
      t.sum[r] = t.sum[r] * factor + hn::GetLane(hn::SumOfLanes(d, sum));
      t.max[r] = max;
      if (factor != 1.0f)
        for (index_t c = 0; c < stride; c += 16) hn::StoreU(hn::Mul(hn::LoadU(d, t.o + r * stride + c), hn::Set(d, factor)), d, t.o + r * stride + c);
    }
    PrefillProduct(weights, page_tokens, v, v_panel, stride / 16, keys, t.rows, t.o, stride, true);
  }
}

void attention_bf16(const AttentionTask& t) {
  if (t.format == Format::f32) AttendBf16<float>(t);
  else if (t.format == Format::f16) AttendBf16<f16>(t);
  else if (t.format == Format::bf16) AttendBf16<bf16>(t);
  else if (t.format == Format::f8_e4m3) AttendBf16<e4m3>(t);
  else AttendBf16<std::int8_t>(t);
}

#else

/// Without the instruction f32 is no slower.
void attention_bf16(const AttentionTask& t) { attention(t); }

#endif

}  // namespace
}  // namespace TINYLLAMA_ISA
}  // namespace tinyllama
HWY_AFTER_NAMESPACE();
