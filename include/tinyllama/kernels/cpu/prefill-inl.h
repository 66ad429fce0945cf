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
  alignas(64) static constexpr std::uint16_t order[] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  const __m512bh both = _mm512_cvtne2ps_pbh((b ? Widen(d, b) : hn::Zero(d)).raw, Widen(d, a).raw);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(order), (__m512i)both));
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

/// How many keys of the page from position p0 on a row sees.
HWY_INLINE index_t Seen(const AttentionTask& t, index_t row, index_t p0) {
  const index_t own = t.position + row / t.group + 1, until = own < t.end ? own : t.end;
  return until < p0 ? 0 : until - p0 < page_tokens ? until - p0 : page_tokens;
}

/// Of R rows from `first` on: weights = exp(scale s - max) in bf16, with max, sum and o brought to the new maximum. Several rows at a time, because one is a
/// chain of two sums over lanes. Each sees a key at least, of this page or one before.
template <int R, class E>
HWY_INLINE void SoftmaxRows(const AttentionTask& t, const E* page_k, const E* page_v, const float* s, bf16* weights, index_t first, index_t p0) {
  constexpr int panels = page_tokens / 16;
  const D d;
  const index_t hd = t.head_dim, stride = head_stride(hd);
  V x[R][panels];
  float max[R];
  TINYLLAMA_UNROLL for (int i = 0; i < R; ++i) {
    const index_t seen = Seen(t, first + i, p0);
    TINYLLAMA_UNROLL for (int p = 0; p < panels; ++p) {
      x[i][p] = hn::Mul(hn::Load(d, s + (first + i) * page_tokens + 16 * p), hn::Set(d, t.scale));
      if constexpr (has_scales<E>) x[i][p] = hn::Mul(x[i][p], hn::LoadU(d, PageScales(page_k, hd) + 16 * p));
    }
    if (seen < page_tokens)  // behind them lies anything
      TINYLLAMA_UNROLL for (int p = 0; p < panels; ++p)
        x[i][p] = hn::IfThenElse(hn::Lt(hn::Iota(d, static_cast<float>(16 * p)), hn::Set(d, static_cast<float>(seen))), x[i][p],
                                 hn::Set(d, -std::numeric_limits<float>::infinity()));
    const float found = hn::GetLane(hn::MaxOfLanes(d, hn::Max(hn::Max(x[i][0], x[i][1]), hn::Max(x[i][2], x[i][3]))));
    max[i] = found > t.max[first + i] ? found : t.max[first + i];
  }
  TINYLLAMA_UNROLL for (int i = 0; i < R; ++i) {
    const index_t r = first + i;
    V sum[panels];
    TINYLLAMA_UNROLL for (int p = 0; p < panels; ++p) {
      const V e = sum[p] = math::ExpNonPositive(d, hn::Sub(x[i][p], hn::Set(d, max[i])));
      V w = e;
      // Past the last key the scales were never written: 0 times what may be a NaN.
      if constexpr (has_scales<E>) w = hn::IfThenElseZero(hn::Gt(e, hn::Zero(d)), hn::Mul(e, hn::LoadU(d, PageScales(page_v, stride) + 16 * p)));
      _mm256_store_si256(reinterpret_cast<__m256i*>(weights + r * page_tokens + 16 * p), (__m256i)_mm512_cvtneps_pbh(w.raw));
    }
    const float all = hn::GetLane(hn::SumOfLanes(d, hn::Add(hn::Add(sum[0], sum[1]), hn::Add(sum[2], sum[3]))));
    if (max[i] == t.max[r]) {
      t.sum[r] += all;
      continue;
    }
    const float factor = std::exp(t.max[r] - max[i]);
    t.sum[r] = t.sum[r] * factor + all, t.max[r] = max[i];
    for (index_t c = 0; c < stride; c += 16) hn::StoreU(hn::Mul(hn::LoadU(d, t.o + r * stride + c), hn::Set(d, factor)), d, t.o + r * stride + c);
  }
}

template <class E>
void AttendBf16(const AttentionTask& t) {
  const index_t hd = t.head_dim, ldq = even(hd), stride = head_stride(hd), k_panel = ldq * 16, v_panel = page_tokens * 16;
  alignas(64) bf16 q[prefill_elements], k[page_tokens * max_head_stride], v[page_tokens * max_head_stride], weights[prefill_rows(1) * page_tokens];
  alignas(64) float s[prefill_rows(1) * page_tokens];
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
    index_t r = 0;
    for (; r + 4 <= t.rows && Seen(t, r, p0) > 0; r += 4) SoftmaxRows<4>(t, page_k, page_v, s, weights, r, p0);
    for (; r < t.rows; ++r) {
      if (Seen(t, r, p0) > 0) SoftmaxRows<1>(t, page_k, page_v, s, weights, r, p0);
      else std::memset(static_cast<void*>(weights + r * page_tokens), 0, page_tokens * sizeof(bf16));
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
