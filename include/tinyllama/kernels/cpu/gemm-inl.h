// Matrix products of training: both operands in panels of 16 rows, packed from f32 as they lie, transposed or not.
//
// A panel of A gives the broadcasts and one of B the lanes, so that an operand is packed in one way wherever it stands. Forward, the gradient
// of the input and that of the weights are the same product of other views.

#include "tinyllama/kernels/cpu/isa-inl.h"

#include <cstring>

#include "tinyllama/kernels/training.hpp"

TINYLLAMA_BEFORE_NAMESPACE();
namespace tinyllama {
namespace TINYLLAMA_ISA {
namespace {

// ---- packing -----------------------------------------------------------------------------------------------------------------------

#if HWY_TARGET != HWY_SCALAR
using D4 = hn::CappedTag<std::uint32_t, 4>;
/// to[i 16 + r] = from[r ld + i] for 16 rows of 4 columns of 32 bits.
HWY_INLINE void Transpose16x4(const std::uint32_t* from, index_t ld, std::uint32_t* to) {
  const D4 d;
  const hn::Repartition<std::uint64_t, D4> d64;
  for (index_t r = 0; r < 16; r += 4) {
    const auto a = hn::LoadU(d, from + r * ld), b = hn::LoadU(d, from + (r + 1) * ld);
    const auto c = hn::LoadU(d, from + (r + 2) * ld), e = hn::LoadU(d, from + (r + 3) * ld);
    const auto ab = hn::BitCast(d64, hn::InterleaveLower(d, a, b)), AB = hn::BitCast(d64, hn::InterleaveUpper(d, a, b));
    const auto ce = hn::BitCast(d64, hn::InterleaveLower(d, c, e)), CE = hn::BitCast(d64, hn::InterleaveUpper(d, c, e));
    hn::StoreU(hn::BitCast(d, hn::InterleaveLower(d64, ab, ce)), d, to + r);
    hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(d64, ab, ce)), d, to + 16 + r);
    hn::StoreU(hn::BitCast(d, hn::InterleaveLower(d64, AB, CE)), d, to + 32 + r);
    hn::StoreU(hn::BitCast(d, hn::InterleaveUpper(d64, AB, CE)), d, to + 48 + r);
  }
}
#endif

// Columns [i0, i1) of `count` rows, one element at a time: tails, and panels that are not full.
template <class E>
void PackRest(E* panel, const float* rows, const Operand& from, index_t count, index_t i0, index_t i1) {
  for (index_t i = i0; i < (i1 == from.k ? even(i1) : i1); ++i)
    for (index_t r = 0; r < panel_rows; ++r)
      panel[sizeof(E) == 2 ? i / 2 * 32 + r * 2 + i % 2 : i * 16 + r] =
          static_cast<E>(r < count && i < from.k ? rows[r * from.row_stride + i * from.column_stride] : 0.0f);
}

/// Columns [i0, i1) of panel p, i0 even; the last part, where i1 = from.k, makes k even.
HWY_INLINE void PackPanel(float* panel, const Operand& from, index_t p, index_t i0, index_t i1) {
  const float* rows = from.data + p * panel_rows * from.row_stride;
  const index_t count = from.rows - p * panel_rows < panel_rows ? from.rows - p * panel_rows : panel_rows;
  index_t i = i0;
  if (count == panel_rows) {
    if (from.row_stride == 1) {
      for (; i < i1; ++i) std::memcpy(panel + i * 16, rows + i * from.column_stride, 16 * sizeof(float));
    } else {
#if HWY_TARGET != HWY_SCALAR
      for (; i + 4 <= i1; i += 4)
        Transpose16x4(reinterpret_cast<const std::uint32_t*>(rows + i), from.row_stride, reinterpret_cast<std::uint32_t*>(panel + i * 16));
#endif
    }
  }
  PackRest(panel, rows, from, count, i, i1);
}

HWY_INLINE void PackPanel(bf16* panel, const Operand& from, index_t p, index_t i0, index_t i1) {
  const float* rows = from.data + p * panel_rows * from.row_stride;
  const index_t count = from.rows - p * panel_rows < panel_rows ? from.rows - p * panel_rows : panel_rows;
  index_t i = i0;
#if HWY_TARGET != HWY_SCALAR
  const D d;
  const DU du;
  auto* to = reinterpret_cast<std::uint32_t*>(panel);
  if (count == panel_rows) {
    if (from.row_stride == 1) {
      for (; i + 2 <= i1; i += 2)
        for (index_t s = 0; s < 16; s += lanes) {
          const float* at = rows + i * from.column_stride + s;
          hn::StoreU(RoundedPairs(hn::LoadU(d, at), hn::LoadU(d, at + from.column_stride)), du, to + i * 8 + s);
        }
    } else {
      alignas(64) std::uint32_t pairs[16 * lanes];
      for (; i + 2 * lanes <= i1; i += 2 * lanes) {
        for (index_t r = 0; r < 16; ++r) {
          const float* at = rows + r * from.row_stride + i;
          const V low = hn::LoadU(d, at), high = hn::LoadU(d, at + lanes);
          hn::Store(RoundedPairs(hn::ConcatEven(d, high, low), hn::ConcatOdd(d, high, low)), du, pairs + r * lanes);
        }
        for (index_t j = 0; j < lanes; j += 4) Transpose16x4(pairs + j, lanes, to + (i / 2 + j) * 16);
      }
    }
  }
#endif
  PackRest(panel, rows, from, count, i, i1);
}

/// A transposed operand is read some columns at a time for all panels: its rows lie pages apart, and each page is then visited once.
/// (Asking for the rows ahead of their turn gave nothing, Zen 4.)
template <class E>
void PackPanels(E* panels, const Operand& from, index_t first, index_t last) {
  const index_t step = from.row_stride == 1 ? 32 : from.k;
  for (index_t i = 0; i < from.k; i += step)
    for (index_t p = first; p < last; ++p) PackPanel(panels + p * panel_elements(from.k), from, p, i, from.k - i < step ? from.k : i + step);
}
void pack_f32(float* panels, const Operand& from, index_t first, index_t last) { PackPanels(panels, from, first, last); }
void pack_bf16(bf16* panels, const Operand& from, index_t first, index_t last) { PackPanels(panels, from, first, last); }

// ---- tiles -------------------------------------------------------------------------------------------------------------------------

/// Where a tile finds A: element (row i, pair kp) at data[i row + kp pair], the second of an f32 pair `second` further.
template <class E>
struct TileRows {
  const E* data;
  index_t row, pair, second;
};
/// Rows of a panel, from row `i` of its 16.
template <class E>
HWY_INLINE TileRows<E> InPanel(const E* panel, index_t i) {
  return sizeof(E) == 2 ? TileRows<E>{panel + 2 * i, 2, 32, 1} : TileRows<E>{panel + i, 1, 32, 16};
}
/// Rows ld apart, as they are.
template <class E>
HWY_INLINE TileRows<E> InRows(const E* rows, index_t ld) { return {rows, ld, 2, 1}; }

// y [MR, NP x 16] (+)= a [MR, kc] b^T
template <int MR, int NP>
HWY_INLINE void GemmTile(TileRows<float> a, const float* b, index_t panel_stride, index_t kc, float* y, index_t ldy, index_t valid, bool accumulate) {
  const D d;
  V acc[MR][NP * subs];
  TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i)
    TINYLLAMA_UNROLL for (int j = 0; j < NP * subs; ++j) acc[i][j] = hn::Zero(d);
  for (index_t kp = 0; kp < (kc + 1) / 2; ++kp) {
    V w0[NP * subs], w1[NP * subs];
    TINYLLAMA_UNROLL for (int j = 0; j < NP * subs; ++j) {
      const float* at = b + j / subs * panel_stride + kp * 32 + j % subs * lanes;
      w0[j] = hn::LoadU(d, at), w1[j] = hn::LoadU(d, at + 16);
    }
    TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i) {
      const float* at = a.data + i * a.row + kp * a.pair;
      const V a0 = hn::Set(d, at[0]), a1 = hn::Set(d, at[a.second]);
      TINYLLAMA_UNROLL for (int j = 0; j < NP * subs; ++j) acc[i][j] = hn::MulAdd(w1[j], a1, hn::MulAdd(w0[j], a0, acc[i][j]));
    }
  }
  TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i)
    TINYLLAMA_UNROLL for (int j = 0; j < NP * subs; ++j) StoreRows(y + i * ldy + j * lanes, acc[i][j], valid - j * lanes, accumulate);
}

#if TINYLLAMA_BF16_VNNI
template <int MR, int NP>
HWY_INLINE void GemmTile(TileRows<bf16> a, const bf16* b, index_t panel_stride, index_t kc, float* y, index_t ldy, index_t valid, bool accumulate) {
  __m512 acc[MR][NP];
  TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i)
    TINYLLAMA_UNROLL for (int j = 0; j < NP; ++j) acc[i][j] = _mm512_setzero_ps();
  for (index_t kp = 0; kp < (kc + 1) / 2; ++kp) {
    __m512i w[NP];
    TINYLLAMA_UNROLL for (int j = 0; j < NP; ++j) w[j] = _mm512_loadu_si512(b + j * panel_stride + kp * 32);
    TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i) {
      const __m512i x = _mm512_set1_epi32(static_cast<int>(Two(a.data + i * a.row + kp * a.pair)));
      TINYLLAMA_UNROLL for (int j = 0; j < NP; ++j) acc[i][j] = _mm512_dpbf16_ps(acc[i][j], (__m512bh)x, (__m512bh)w[j]);
    }
  }
  TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i)
    TINYLLAMA_UNROLL for (int j = 0; j < NP; ++j) StoreRows(y + i * ldy + j * 16, V{acc[i][j]}, valid - j * 16, accumulate);
}
#endif

/// MR rows of A from row i on, within one of its panels, against NP panels of B.
template <class E, int MR, int NP>
HWY_INLINE void GemmTileAt(const GemmTask& t, const E* a, const E* b, index_t i, index_t panel, index_t kc, bool accumulate) {
  const index_t stride = panel_elements(t.k), column = panel * panel_rows;
  GemmTile<MR, NP>(InPanel(a + i / panel_rows * stride, i % panel_rows), b, stride, kc, t.y + i * t.ldy + column, t.ldy, t.n - column, accumulate);
}

/// Rows [first_row, last_row) against NP panels of B, columns [k0, k0 + kc): 8 rows at a time, as many as half a panel of A has.
template <class E, int NP>
void GemmRows(const GemmTask& t, index_t first_row, index_t last_row, index_t panel, index_t k0, index_t kc) {
  const E* a = reinterpret_cast<const E*>(t.a) + k0 * panel_rows;
  const E* b = reinterpret_cast<const E*>(t.b) + panel * panel_elements(t.k) + k0 * panel_rows;
  const bool accumulate = t.accumulate || k0 > 0;
  constexpr int most = NP == tile_panels ? tile_rows : 4;
  index_t i = first_row;
  if constexpr (16 % most == 0)
    for (; i + most <= last_row; i += most) GemmTileAt<E, most, NP>(t, a, b, i, panel, kc, accumulate);
  for (; i + 4 <= last_row; i += 4) GemmTileAt<E, 4, NP>(t, a, b, i, panel, kc, accumulate);
  for (; i < last_row; ++i) GemmTileAt<E, 1, NP>(t, a, b, i, panel, kc, accumulate);
}

template <class E>
void Gemm(const GemmTask& t, index_t first_row, index_t last_row, index_t first, index_t last) {
  constexpr index_t step = tile_k * 4 / static_cast<index_t>(sizeof(E));  // 3 panels of it are 192 KB, within a core's L2
  if (last_row > t.m) last_row = t.m;
  // The rows' columns [k0, k0 + kc) stay in L2 for all panels of B.
  for (index_t k0 = 0; k0 < t.k; k0 += step) {
    const index_t kc = t.k - k0 < step ? t.k - k0 : step;
    index_t p = first;
    if constexpr (tile_panels > 1)
      for (; p + tile_panels <= last; p += tile_panels) GemmRows<E, tile_panels>(t, first_row, last_row, p, k0, kc);
    for (; p < last; ++p) GemmRows<E, 1>(t, first_row, last_row, p, k0, kc);
  }
}

void gemm_f32(const GemmTask& t, index_t r0, index_t r1, index_t p0, index_t p1) { Gemm<float>(t, r0, r1, p0, p1); }
#if TINYLLAMA_BF16_VNNI
void gemm_bf16(const GemmTask& t, index_t r0, index_t r1, index_t p0, index_t p1) { Gemm<bf16>(t, r0, r1, p0, p1); }
#endif

}  // namespace
}  // namespace TINYLLAMA_ISA
}  // namespace tinyllama
HWY_AFTER_NAMESPACE();
