// Products of activations with packed panels of floats: one row (decode, bound by memory) and several (prefill, bound by multiplies).
// A lane owns a row of W, so no sum runs across lanes and each output's order of summation is fixed by k alone.

#include "tinyllama/kernels/cpu/isa-inl.h"

#include <cstring>

TINYLLAMA_BEFORE_NAMESPACE();
namespace tinyllama {
namespace TINYLLAMA_ISA {
namespace {

/// Two columns of a panel, widened: columns 2 kp and 2 kp + 1 of rows [s lanes, (s + 1) lanes).
HWY_INLINE void LoadPair(const float* w, index_t kp, index_t s, V& w0, V& w1) {
  w0 = hn::LoadU(D(), w + kp * 32 + s * lanes), w1 = hn::LoadU(D(), w + kp * 32 + 16 + s * lanes);
}
HWY_INLINE void LoadPair(const f16* w, index_t kp, index_t s, V& w0, V& w1) {
  w0 = Widen(D(), w + kp * 32 + s * lanes), w1 = Widen(D(), w + kp * 32 + 16 + s * lanes);
}
HWY_INLINE void LoadPair(const e4m3* w, index_t kp, index_t s, V& w0, V& w1) {
  w0 = Widen(D(), w + kp * 32 + s * lanes), w1 = Widen(D(), w + kp * 32 + 16 + s * lanes);
}
HWY_INLINE void LoadPair(const bf16* w, index_t kp, index_t s, V& w0, V& w1) {
  const auto u = hn::LoadU(DU(), reinterpret_cast<const std::uint32_t*>(w + kp * 32 + s * 2 * lanes));
  w0 = hn::BitCast(D(), hn::ShiftLeft<16>(u)), w1 = hn::BitCast(D(), hn::And(u, hn::Set(DU(), 0xffff0000u)));
}

// y [MR, NP x 16] (+)= x [MR, kc] w^T
template <int MR, int NP, class W>
void FloatTile(const float* x, index_t ldx, const W* w, index_t panel_stride, index_t kc, float* y, index_t ldy, index_t valid, bool accumulate) {
  const D d;
  V acc[MR][NP * subs];
  TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i)
    TINYLLAMA_UNROLL for (int j = 0; j < NP * subs; ++j) acc[i][j] = hn::Zero(d);
  for (index_t kp = 0; kp < (kc + 1) / 2; ++kp) {
    V w0[NP * subs], w1[NP * subs];
    TINYLLAMA_UNROLL for (int j = 0; j < NP * subs; ++j) LoadPair(w + j / subs * panel_stride, kp, j % subs, w0[j], w1[j]);
    TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i) {
      const V a0 = hn::Set(d, x[i * ldx + 2 * kp]), a1 = hn::Set(d, x[i * ldx + 2 * kp + 1]);
      TINYLLAMA_UNROLL for (int j = 0; j < NP * subs; ++j) acc[i][j] = hn::MulAdd(w1[j], a1, hn::MulAdd(w0[j], a0, acc[i][j]));
    }
  }
  TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i)
    TINYLLAMA_UNROLL for (int j = 0; j < NP * subs; ++j) StoreRows(y + i * ldy + j * lanes, acc[i][j], valid - j * lanes, accumulate);
}

// One row of X: the panel is one sequential stream, its sum split over four chains to cover the latency of the multiply-add.
template <class W>
void FloatVector(const float* x, const W* w, index_t kc, float* y, index_t valid, bool accumulate) {
  const D d;
  V acc[4][subs];
  TINYLLAMA_UNROLL for (int i = 0; i < 4; ++i)
    TINYLLAMA_UNROLL for (int s = 0; s < subs; ++s) acc[i][s] = hn::Zero(d);
  const index_t pairs = (kc + 1) / 2;
  index_t kp = 0;
  for (; kp + 2 <= pairs; kp += 2) {
    const std::byte* next = reinterpret_cast<const std::byte*>(w + kp * 32) + ahead;
    for (index_t line = 0; line < 64 * static_cast<index_t>(sizeof(W)); line += 64) hwy::Prefetch(next + line);
    TINYLLAMA_UNROLL for (int u = 0; u < 2; ++u) {
      const V a0 = hn::Set(d, x[2 * (kp + u)]), a1 = hn::Set(d, x[2 * (kp + u) + 1]);
      TINYLLAMA_UNROLL for (int s = 0; s < subs; ++s) {
        V w0, w1;
        LoadPair(w, kp + u, s, w0, w1);
        acc[2 * u][s] = hn::MulAdd(w0, a0, acc[2 * u][s]);
        acc[2 * u + 1][s] = hn::MulAdd(w1, a1, acc[2 * u + 1][s]);
      }
    }
  }
  if (kp < pairs) {
    const V a0 = hn::Set(d, x[2 * kp]), a1 = hn::Set(d, x[2 * kp + 1]);
    TINYLLAMA_UNROLL for (int s = 0; s < subs; ++s) {
      V w0, w1;
      LoadPair(w, kp, s, w0, w1);
      acc[0][s] = hn::MulAdd(w0, a0, acc[0][s]);
      acc[1][s] = hn::MulAdd(w1, a1, acc[1][s]);
    }
  }
  TINYLLAMA_UNROLL for (int s = 0; s < subs; ++s)
    StoreRows(y + s * lanes, hn::Add(hn::Add(acc[0][s], acc[1][s]), hn::Add(acc[2][s], acc[3][s])), valid - s * lanes, accumulate);
}

/// All rows of X against columns [k0, k0 + kc) of NP panels at w: as many rows as a tile takes, then 4, then one by one.
template <int NP, class W>
void FloatRows(const MatmulTask& t, const W* w, index_t panel_stride, index_t k0, index_t kc, index_t column) {
  // Other tiles keep to 4 rows: they reach 98% of the multiply units' rate too (Zen 4), and more of them would take seconds to compile.
  constexpr int most = NP == tile_panels && sizeof(W) == sizeof(float) ? tile_rows : 4;
  const index_t valid = t.n - column;
  const bool accumulate = k0 > 0;
  index_t i = 0;
  const auto x = [&] { return t.x + i * t.ldx + k0; };
  const auto y = [&] { return t.y + i * t.ldy + column; };
  if constexpr (most > 4)
    for (; i + most <= t.m; i += most) FloatTile<most, NP>(x(), t.ldx, w, panel_stride, kc, y(), t.ldy, valid, accumulate);
  for (; i + 4 <= t.m; i += 4) FloatTile<4, NP>(x(), t.ldx, w, panel_stride, kc, y(), t.ldy, valid, accumulate);
  for (; i < t.m; ++i)
    for (int p = 0; p < NP; ++p) FloatVector(x(), w + p * panel_stride, kc, y() + p * panel_rows, valid - p * panel_rows, accumulate);
}

/// Panels of other formats, some columns at a time made floats that all rows then share; expand(p, k0, kc, to): columns [k0, k0 + kc) of panel p, and one more where
/// kc is odd. In tiles of one panel, each row of which widens it for itself, f16 had a quarter of the multiply units' rate (Zen 5, 512 rows).
template <class Expand>
void ExpandedPanels(const MatmulTask& t, index_t first, index_t last, const Expand& expand) {
  constexpr index_t chunk = 256, stride = chunk * panel_rows;
  alignas(64) float wide[tile_panels * stride];
  for (index_t p = first; p < last; p += tile_panels) {
    const index_t panels = last - p < tile_panels ? last - p : tile_panels;
    for (index_t k0 = 0; k0 < t.k; k0 += chunk) {
      const index_t kc = t.k - k0 < chunk ? t.k - k0 : chunk;
      for (index_t i = 0; i < panels; ++i) expand(p + i, k0, kc, wide + i * stride);
      if (panels == tile_panels) FloatRows<tile_panels>(t, wide, stride, k0, kc, p * panel_rows);
      else
        for (index_t i = 0; i < panels; ++i) FloatRows<1>(t, wide + i * stride, 0, k0, kc, (p + i) * panel_rows);
    }
  }
}

template <class W>
void FloatPanels(const MatmulTask& t, index_t first, index_t last) {
  if constexpr (sizeof(W) < sizeof(float))
    if (t.m >= 8)
      return ExpandedPanels(t, first, last, [&](index_t p, index_t k0, index_t kc, float* to) HWY_ATTR {
        const W* const from = reinterpret_cast<const W*>(t.w) + (p * even(t.k) + k0) * panel_rows;
        for (index_t kp = 0; kp < (kc + 1) / 2; ++kp)
          for (index_t s = 0; s < subs; ++s) {
            V w0, w1;
            LoadPair(from, kp, s, w0, w1);
            hn::Store(w0, D(), to + kp * 32 + s * lanes), hn::Store(w1, D(), to + kp * 32 + 16 + s * lanes);
          }
      });
  constexpr int wide = sizeof(W) == sizeof(float) ? tile_panels : 1;
  const index_t panel_stride = even(t.k) * panel_rows;
  const index_t step = t.m == 1 ? t.k : tile_k;  // a single row streams whole panels
  const auto* w = reinterpret_cast<const W*>(t.w);
  const auto rest = [&](index_t k0) { return t.k - k0 < step ? t.k - k0 : step; };
  index_t p = first;
  if constexpr (wide > 1)
    for (; t.m > 1 && p + wide <= last; p += wide)
      for (index_t k0 = 0; k0 < t.k; k0 += step) FloatRows<wide>(t, w + p * panel_stride + k0 * panel_rows, panel_stride, k0, rest(k0), p * panel_rows);
  for (; p < last; ++p)
    for (index_t k0 = 0; k0 < t.k; k0 += step) FloatRows<1>(t, w + p * panel_stride + k0 * panel_rows, 0, k0, rest(k0), p * panel_rows);
}

// ---- bf16 dot products -------------------------------------------------------------------------------------------------------------

#if TINYLLAMA_BF16_VNNI

// As FloatTile, two columns an instruction: _mm512_dpbf16_ps adds both products of a pair to the f32 lane.
template <int MR, int NP>
void Bf16Tile(const bf16* x, index_t ldx, const bf16* w, index_t panel_stride, index_t kc, float* y, index_t ldy, index_t valid, bool accumulate) {
  __m512 acc[MR][NP];
  TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i)
    TINYLLAMA_UNROLL for (int j = 0; j < NP; ++j) acc[i][j] = _mm512_setzero_ps();
  for (index_t kp = 0; kp < (kc + 1) / 2; ++kp) {
    if constexpr (NP == 1) hwy::Prefetch(reinterpret_cast<const std::byte*>(w + kp * 32) + ahead);
    __m512i b[NP];
    TINYLLAMA_UNROLL for (int j = 0; j < NP; ++j) b[j] = _mm512_loadu_si512(w + j * panel_stride + kp * 32);
    TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i) {
      const __m512i a = _mm512_set1_epi32(static_cast<int>(Two(x + i * ldx + 2 * kp)));
      TINYLLAMA_UNROLL for (int j = 0; j < NP; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], (__m512bh)a, (__m512bh)b[j]);
    }
  }
  TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i)
    TINYLLAMA_UNROLL for (int j = 0; j < NP; ++j) StoreRows(y + i * ldy + j * 16, V{acc[i][j]}, valid - j * 16, accumulate);
}

template <int NP>
void Bf16Rows(const MatmulTask& t, const bf16* w, index_t panel_stride, index_t k0, index_t kc, index_t column) {
  index_t i = 0;
  const auto tile = [&]<int MR>() HWY_ATTR {
    for (; i + MR <= t.m; i += MR)
      Bf16Tile<MR, NP>(t.x_bf16 + i * t.ldx + k0, t.ldx, w, panel_stride, kc, t.y + i * t.ldy + column, t.ldy, t.n - column, k0 > 0);
  };
  if constexpr (NP > 1) tile.template operator()<tile_rows>();
  tile.template operator()<4>();
  tile.template operator()<1>();
}

void matmul_bf16(const MatmulTask& t, index_t first, index_t last) {
  const index_t panel_stride = even(t.k) * panel_rows, step = 2 * tile_k;
  const auto* w = reinterpret_cast<const bf16*>(t.w);
  const auto rest = [&](index_t k0) { return t.k - k0 < step ? t.k - k0 : step; };
  index_t p = first;
  for (; p + tile_panels <= last; p += tile_panels)
    for (index_t k0 = 0; k0 < t.k; k0 += step)
      Bf16Rows<tile_panels>(t, w + p * panel_stride + k0 * panel_rows, panel_stride, k0, rest(k0), p * panel_rows);
  for (; p < last; ++p)
    for (index_t k0 = 0; k0 < t.k; k0 += step) Bf16Rows<1>(t, w + p * panel_stride + k0 * panel_rows, 0, k0, rest(k0), p * panel_rows);
}

#else

/// Without the instruction: exact products of the rounded activations in f32, a row at a time through matmul_f32's tiles.
void matmul_bf16(const MatmulTask& t, index_t first, index_t last) {
  alignas(64) float x[2048];
  const index_t panel_stride = even(t.k) * panel_rows;
  for (index_t i = 0; i < t.m; ++i)
    for (index_t k0 = 0; k0 < t.k; k0 += 2048) {
      const index_t kc = t.k - k0 < 2048 ? t.k - k0 : 2048;
      for (index_t k = 0; k < kc; ++k) x[k] = t.x_bf16[i * t.ldx + k0 + k];
      if (kc % 2) x[kc] = 0;
      for (index_t p = first; p < last; ++p)
        FloatVector(x, reinterpret_cast<const bf16*>(t.w) + p * panel_stride + k0 * panel_rows, kc, t.y + i * t.ldy + p * panel_rows,
                    t.n - p * panel_rows, k0 > 0);
    }
}

#endif

}  // namespace
}  // namespace TINYLLAMA_ISA
}  // namespace tinyllama
HWY_AFTER_NAMESPACE();
