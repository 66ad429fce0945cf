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

/// Rows a and b (none: zeros) of 16 Vectors elements, interleaved in pairs of bf16, [16][2] for each vector, `step` apart.
template <int Vectors, class E>
HWY_INLINE void PairRows(const E* a, const E* b, bf16* to, index_t step) {
  const D d;
  alignas(64) static constexpr std::uint16_t order[] = {0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  TINYLLAMA_UNROLL for (int i = 0; i < Vectors; ++i) {
    const __m512bh both = _mm512_cvtne2ps_pbh((b ? Widen(d, b + 16 * i) : hn::Zero(d)).raw, Widen(d, a + 16 * i).raw);
    _mm512_storeu_si512(to + i * step, _mm512_permutexvar_epi16(_mm512_load_si512(order), (__m512i)both));
  }
}
template <class E>
HWY_INLINE void PairRows(const E* a, const E* b, index_t vectors, bf16* to, index_t step) {
  for (; vectors >= 4; vectors -= 4, a += 64, b += b ? 64 : 0, to += 4 * step) PairRows<4>(a, b, to, step);
  for (; vectors > 0; --vectors, a += 16, b += b ? 16 : 0, to += step) PairRows<1>(a, b, to, step);
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

/// 2^y within 3e-6, which a rounding to bf16 does not see; 0 at -inf. The polynomial is minimax on [0, 1], by Lawson's iteration.
HWY_INLINE V Exp2ForBf16(V y) {
  constexpr int down = 1, quiet = 8;
  const D d;
  const V f = V{_mm512_reduce_ps(y.raw, down | quiet)};  // y - floor(y)
  V p = hn::MulAdd(hn::Set(d, 0.0135341678f), f, hn::Set(d, 0.0520114601f));
  p = hn::MulAdd(p, f, hn::Set(d, 0.241442755f));
  p = hn::MulAdd(p, f, hn::Set(d, 0.693003833f));
  return V{_mm512_scalef_ps(hn::MulAdd(p, f, hn::Set(d, 1.00000262f)).raw, y.raw)};
}

/// op over the lanes of each of four vectors.
template <class Op>
HWY_INLINE __m128 OfLanes(const V (&x)[4], const Op& op) {
  const auto pair = [&](const V& a, const V& b) HWY_ATTR { return op(V{_mm512_unpacklo_ps(a.raw, b.raw)}, V{_mm512_unpackhi_ps(a.raw, b.raw)}).raw; };  // a, b, a, b
  const __m512 ab = pair(x[0], x[1]), cd = pair(x[2], x[3]);
  const V all = op(V{_mm512_shuffle_ps(ab, cd, 0x44)}, V{_mm512_shuffle_ps(ab, cd, 0xee)});  // a, b, c, d in each 128 bits
  const V half = op(all, V{_mm512_shuffle_f32x4(all.raw, all.raw, 0xee)});
  return _mm512_castps512_ps128(op(half, V{_mm512_shuffle_f32x4(half.raw, half.raw, 0x55)}).raw);
}

/// Of R rows from `first` on: weights = exp(scale s - max) in bf16, with max, sum and o brought to the new maximum. Four rows at a time, because what is added
/// up over lanes is a chain for one, and hardly longer for four. Each sees a key at least, of this page or one before.
template <int R, class E>
HWY_INLINE void SoftmaxRows(const AttentionTask& t, const E* page_k, const E* page_v, const float* s, bf16* weights, index_t first, index_t p0) {
  static_assert(R <= 4);
  constexpr int panels = page_tokens / 16;
  constexpr float log2e = 1.44269504f;
  const D d;
  const index_t hd = t.head_dim, stride = head_stride(hd);
  V x[R][panels], most[4], sums[4];
  TINYLLAMA_UNROLL for (int i = 0; i < R; ++i) {
    const index_t seen = Seen(t, first + i, p0);
    TINYLLAMA_UNROLL for (int p = 0; p < panels; ++p) {
      x[i][p] = hn::Load(d, s + (first + i) * page_tokens + 16 * p);
      if constexpr (has_scales<E>) x[i][p] = hn::Mul(x[i][p], hn::LoadU(d, PageScales(page_k, hd) + 16 * p));
    }
    if (seen < page_tokens)  // behind them lies anything
      TINYLLAMA_UNROLL for (int p = 0; p < panels; ++p)
        x[i][p] = hn::IfThenElse(hn::Lt(hn::Iota(d, static_cast<float>(16 * p)), hn::Set(d, static_cast<float>(seen))), x[i][p],
                                 hn::Set(d, -std::numeric_limits<float>::infinity()));
    most[i] = hn::Max(hn::Max(x[i][0], x[i][1]), hn::Max(x[i][2], x[i][3]));
  }
  TINYLLAMA_UNROLL for (int i = R; i < 4; ++i) most[i] = sums[i] = hn::Zero(d);
  alignas(16) float before[4] = {}, max[4], sum[4], less[4];
  for (int i = 0; i < R; ++i) before[i] = t.max[first + i];
  const __m128 found = OfLanes(most, [](V a, V b) HWY_ATTR { return hn::Max(a, b); });
  _mm_store_ps(max, _mm_max_ps(_mm_mul_ps(found, _mm_set1_ps(t.scale)), _mm_load_ps(before)));
  const V factor = hn::Set(d, t.scale * log2e);
  TINYLLAMA_UNROLL for (int i = 0; i < R; ++i) {
    V e[panels];
    const V top = hn::Set(d, max[i] * log2e);
    TINYLLAMA_UNROLL for (int p = 0; p < panels; ++p) {
      V w = e[p] = Exp2ForBf16(hn::MulSub(x[i][p], factor, top));
      // Past the last key the scales were never written: 0 times what may be a NaN.
      if constexpr (has_scales<E>) w = hn::IfThenElseZero(hn::Gt(w, hn::Zero(d)), hn::Mul(w, hn::LoadU(d, PageScales(page_v, stride) + 16 * p)));
      _mm256_store_si256(reinterpret_cast<__m256i*>(weights + (first + i) * page_tokens + 16 * p), (__m256i)_mm512_cvtneps_pbh(w.raw));
    }
    sums[i] = hn::Add(hn::Add(e[0], e[1]), hn::Add(e[2], e[3]));
  }
  _mm_store_ps(sum, OfLanes(sums, [](V a, V b) HWY_ATTR { return hn::Add(a, b); }));
  if (_mm_movemask_ps(_mm_cmplt_ps(_mm_load_ps(before), _mm_load_ps(max))) == 0) {
    for (int i = 0; i < R; ++i) t.sum[first + i] += sum[i];
    return;
  }
  const hn::CappedTag<float, 4> d4;
  hn::Store(math::Exp(d4, hn::Sub(hn::Load(d4, before), hn::Load(d4, max))), d4, less);
  for (int i = 0; i < R; ++i) {
    const index_t r = first + i;
    t.sum[r] = t.sum[r] * less[i] + sum[i], t.max[r] = max[i];
    if (before[i] == -std::numeric_limits<float>::infinity() || less[i] == 1) continue;  // a row's first page, where o is 0; the same maximum
    for (index_t c = 0; c < stride; c += 16) hn::StoreU(hn::Mul(hn::LoadU(d, t.o + r * stride + c), hn::Set(d, less[i])), d, t.o + r * stride + c);
  }
}

template <class E>
void AttendBf16(const AttentionTask& t) {
  const index_t hd = t.head_dim, ldq = even(hd), stride = head_stride(hd), k_panel = ldq * 16, v_panel = page_tokens * 16;
  alignas(64) bf16 q[prefill_elements], k[page_tokens * max_head_stride], v[page_tokens * max_head_stride], weights[prefill_rows(1) * page_tokens];
  alignas(64) float s[prefill_rows(1) * page_tokens];
  for (index_t r = 0; r < t.rows; ++r) {
    const float* from = t.q + r / t.group * t.ldq + r % t.group * hd;
    index_t i = 0;
    for (; i + 16 <= hd; i += 16) _mm256_storeu_si256(reinterpret_cast<__m256i*>(q + r * ldq + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
    for (; i < hd; ++i) q[r * ldq + i] = bf16(from[i]);
    if (hd % 2) q[r * ldq + hd] = bf16();
    t.max[r] = -std::numeric_limits<float>::infinity(), t.sum[r] = 0;
  }
  std::memset(t.o, 0, static_cast<std::size_t>(t.rows * stride) * sizeof(float));
  const index_t last = t.position + (t.rows - 1) / t.group + 1, end = last < t.end ? last : t.end;
  for (index_t p0 = t.begin; p0 < end; p0 += page_tokens) {
    const std::byte* page = t.pages[p0 / page_tokens];
    const E *page_k = reinterpret_cast<const E*>(page + t.k_offset), *page_v = reinterpret_cast<const E*>(page + t.v_offset);
    const index_t keys = end - p0 < page_tokens ? end - p0 : page_tokens, panels = (keys + 15) / 16;
    for (index_t i = 0; i < hd; i += 2) PairRows(page_k + i * page_tokens, i + 1 < hd ? page_k + (i + 1) * page_tokens : nullptr, panels, k + i * 16, k_panel);
    for (index_t i = 0; i < keys; i += 2)  // past the last key lies memory that was never written
      PairRows(page_v + i * stride, i + 1 < keys ? page_v + (i + 1) * stride : nullptr, stride / 16, v + i * 16, v_panel);
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
