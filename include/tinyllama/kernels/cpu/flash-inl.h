// Attention of training, forward and backward, in blocks of 64 queries by 64 keys: no T x T matrix (arXiv 2205.14135).
// A unit is one query head of one sequence. gemm-inl.h comes first: all five products run through its tiles, in f32 or bf16.

#include "tinyllama/kernels/cpu/isa-inl.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "tinyllama/kernels/training.hpp"

TINYLLAMA_BEFORE_NAMESPACE();
namespace tinyllama {
namespace TINYLLAMA_ISA {
namespace {

// Heads of 64 are 4 panels: 4 x 4 accumulators of 16 lanes fill the multiply units (Zen 4) and leave no panel over, as tiles of 3 would.
inline constexpr int flash_rows = lanes >= 8 ? 4 : 2;
inline constexpr int flash_panels = lanes >= 16 ? 4 : 1;

/// Rows of A: in panels of 16 that lie `stride` apart, or as they are.
template <class E>
struct PanelRows {
  const E* panels;
  index_t stride;
  HWY_INLINE TileRows<E> from(index_t i) const { return InPanel(panels + i / 16 * stride, i % 16); }
};
template <class E>
struct BlockRows {
  const E* rows;
  HWY_INLINE TileRows<E> from(index_t i) const { return InRows(rows + i * flash_block, flash_block); }
};

/// y [64, panels x 16] (+)= a b^T
template <class E, class Rows>
HWY_INLINE void FlashProduct(Rows a, const E* b, index_t panel_stride, index_t panels, index_t k, index_t rows, float* y, index_t ldy, bool accumulate) {
  index_t p = 0;
  for (; p + flash_panels <= panels; p += flash_panels)
    for (index_t i = 0; i < rows; i += flash_rows)
      GemmTile<flash_rows, flash_panels>(a.from(i), b + p * panel_stride, panel_stride, k, y + i * ldy + p * 16, ldy, flash_panels * 16, accumulate);
  if constexpr (flash_panels > 1)
    for (; p < panels; ++p)
      for (index_t i = 0; i < rows; i += flash_rows)
        GemmTile<flash_rows, 1>(a.from(i), b + p * panel_stride, panel_stride, k, y + i * ldy + p * 16, ldy, 16, accumulate);
}

/// Packs `rows` rows of k columns, and zeros up to whole blocks of 64 rows.
template <class E>
void FlashPackRows(E* panels, const float* data, index_t ld, index_t rows, index_t k) {
  const index_t stride = panel_elements(k), used = (rows + 15) / 16;
  const Operand from{data, ld, 1, rows, k};
  for (index_t p = 0; p < used; ++p) PackPanel(panels + p * stride, from, p, 0, k);
  std::memset(static_cast<void*>(panels + used * stride), 0, static_cast<std::size_t>((flash_padded(rows) / 16 - used) * stride) * sizeof(E));
}
/// Packs `rows` rows of `columns` columns transposed: a panel is 16 columns, its k the rows, zeros up to whole blocks of 64.
template <class E>
void FlashPackColumns(E* panels, const float* data, index_t ld, index_t rows, index_t columns) {
  const index_t stride = flash_padded(rows) * 16, used = even(rows) * 16;
  const Operand from{data, 1, ld, columns, rows};
  for (index_t p = 0; p < (columns + 15) / 16; ++p) {
    PackPanel(panels + p * stride, from, p, 0, rows);
    std::memset(static_cast<void*>(panels + p * stride + used), 0, static_cast<std::size_t>(stride - used) * sizeof(E));
  }
}

/// One row's weights of 64 keys as A's rows: e[0, 64).
HWY_INLINE void StoreWeights(float* to, index_t p, V v) { hn::StoreU(v, D(), to + p); }
HWY_INLINE void StoreWeights(bf16* to, index_t p, V v) { StoreBf16(v, to + p); }
/// Two rows' weights, transposed: panels of 16 keys whose k is the query.
HWY_INLINE void StoreTransposed(float* panels, index_t query, index_t key, V even_row, V odd_row) {
  float* to = panels + key / 16 * flash_block * 16 + query * 16 + key % 16;
  hn::StoreU(even_row, D(), to);
  hn::StoreU(odd_row, D(), to + 16);
}
HWY_INLINE void StoreTransposed(bf16* panels, index_t query, index_t key, V even_row, V odd_row) {
  auto* to = reinterpret_cast<std::uint32_t*>(panels + key / 16 * flash_block * 16 + query * 16) + key % 16;
  hn::StoreU(RoundedPairs(even_row, odd_row), DU(), to);
}

/// Takes pieces of scratch.
struct FlashScratch {
  std::byte* at;
  template <class T>
  T* take(index_t n) {
    T* p = reinterpret_cast<T*>(at);
    at += (static_cast<std::size_t>(n) * sizeof(T) + 63) / 64 * 64;
    return p;
  }
};

/// v where the key is seen by the row, `other` where not.
HWY_INLINE V Seen(V v, index_t key, index_t seen, V other) {
  const D d;
  return hn::IfThenElse(hn::Lt(hn::Iota(d, static_cast<float>(key)), hn::Set(d, static_cast<float>(seen))), v, other);
}

template <class E>
void FlashForward(const FlashTask& t) {
  const D d;
  const index_t T = t.tokens, hd = t.head_dim, stride = head_stride(hd), head_panels = stride / 16, row_panel = panel_elements(hd), column_panel = flash_padded(T) * 16;
  FlashScratch scratch{t.scratch};
  E* k_rows = scratch.take<E>(flash_padded(T) / 16 * row_panel);
  E* v_columns = scratch.take<E>(head_panels * column_panel);
  E* q_rows = scratch.take<E>(flash_block / 16 * row_panel);
  E* weights = scratch.take<E>(flash_block * flash_block);
  float* s = scratch.take<float>(flash_block * flash_block);
  float* o = scratch.take<float>(flash_block * stride);
  FlashPackRows(k_rows, t.k, t.ld, T, hd);
  FlashPackColumns(v_columns, t.v, t.ld, T, hd);
  const V lowest = hn::Set(d, -std::numeric_limits<float>::infinity()), scale = hn::Set(d, t.scale);
  for (index_t q0 = 0; q0 < T; q0 += flash_block) {
    const index_t rows = T - q0 < flash_block ? T - q0 : flash_block, tiled = (rows + flash_rows - 1) / flash_rows * flash_rows;
    float max[flash_block], sum[flash_block];
    FlashPackRows(q_rows, t.q + q0 * t.ld, t.ld, rows, hd);
    std::memset(static_cast<void*>(weights), 0, sizeof(E) * flash_block * flash_block);
    for (index_t i = 0; i < flash_block * stride; ++i) o[i] = 0;
    for (index_t r = 0; r < rows; ++r) max[r] = -std::numeric_limits<float>::infinity(), sum[r] = 0;
    for (index_t k0 = 0; k0 <= q0; k0 += flash_block) {
      FlashProduct(PanelRows<E>{q_rows, row_panel}, k_rows + k0 / 16 * row_panel, row_panel, flash_block / 16, hd, tiled, s, flash_block, false);
      for (index_t r = 0; r < rows; ++r) {
        const index_t seen = q0 + r - k0 + 1;  // keys of this block that the row sees; above 64: all
        float* row = s + r * flash_block;
        V m = lowest;
        for (index_t p = 0; p < flash_block; p += lanes) {
          V x = hn::Mul(hn::LoadU(d, row + p), scale);
          if (seen < flash_block) x = Seen(x, p, seen, lowest);
          hn::StoreU(x, d, row + p);
          m = hn::Max(m, x);
        }
        const float found = hn::GetLane(hn::MaxOfLanes(d, m)), top = found > max[r] ? found : max[r], factor = std::exp(max[r] - top);
        V total = hn::Zero(d);
        const V vtop = hn::Set(d, top);
        for (index_t p = 0; p < flash_block; p += lanes) {
          const V e = math::ExpNonPositive(d, hn::Sub(hn::LoadU(d, row + p), vtop));
          StoreWeights(weights + r * flash_block, p, e);
          total = hn::Add(total, e);
        }
        sum[r] = sum[r] * factor + hn::GetLane(hn::SumOfLanes(d, total));
        max[r] = top;
        if (factor != 1.0f)
          for (index_t c = 0; c < stride; c += lanes) hn::StoreU(hn::Mul(hn::LoadU(d, o + r * stride + c), hn::Set(d, factor)), d, o + r * stride + c);
      }
      FlashProduct(BlockRows<E>{weights}, v_columns + k0 * 16, column_panel, head_panels, flash_block, tiled, o, stride, true);
    }
    for (index_t r = 0; r < rows; ++r) {
      const float inverse = 1.0f / sum[r];
      for (index_t c = 0; c < hd; ++c) t.o[(q0 + r) * t.ldo + c] = o[r * stride + c] * inverse;
      t.lse[(q0 + r) * t.ld_lse] = max[r] + std::log(sum[r]);
    }
  }
}

template <class E>
void FlashBackward(const FlashGradTask& g) {
  const D d;
  const FlashTask& t = g.forward;
  const index_t T = t.tokens, hd = t.head_dim, stride = head_stride(hd), head_panels = stride / 16, row_panel = panel_elements(hd), column_panel = flash_padded(T) * 16;
  const index_t padded = flash_padded(T);
  FlashScratch scratch{t.scratch};
  const auto rows_of = [&](const float* from, index_t ld) {
    E* to = scratch.take<E>(padded / 16 * row_panel);
    FlashPackRows(to, from, ld, T, hd);
    return to;
  };
  const auto columns_of = [&](const float* from, index_t ld) {
    E* to = scratch.take<E>(head_panels * column_panel);
    FlashPackColumns(to, from, ld, T, hd);
    return to;
  };
  const E *q_rows = rows_of(t.q, t.ld), *k_rows = rows_of(t.k, t.ld), *v_rows = rows_of(t.v, t.ld), *do_rows = rows_of(g.d_o, t.ldo);
  const E *q_columns = columns_of(t.q, t.ld), *k_columns = columns_of(t.k, t.ld), *do_columns = columns_of(g.d_o, t.ldo);
  float* dq = scratch.take<float>(padded * stride);
  float* delta = scratch.take<float>(padded);  // do . o
  E* p_t = scratch.take<E>(flash_block * flash_block);
  E* ds_t = scratch.take<E>(flash_block * flash_block);
  E* ds_rows = scratch.take<E>(flash_block * flash_block);
  float* s = scratch.take<float>(flash_block * flash_block);
  float* dp = scratch.take<float>(flash_block * flash_block);
  float* dk = scratch.take<float>(flash_block * stride);
  float* dv = scratch.take<float>(flash_block * stride);
  for (index_t i = 0; i < padded * stride; ++i) dq[i] = 0;
  for (index_t i = 0; i < T; ++i) {
    float sum = 0;
    for (index_t c = 0; c < hd; ++c) sum += g.d_o[i * t.ldo + c] * t.o[i * t.ldo + c];
    delta[i] = sum;
  }
  const V zero = hn::Zero(d), scale = hn::Set(d, t.scale);
  for (index_t k0 = 0; k0 < T; k0 += flash_block) {
    for (index_t i = 0; i < flash_block * stride; ++i) dk[i] = dv[i] = 0;
    for (index_t q0 = k0; q0 < T; q0 += flash_block) {
      const index_t rows = T - q0 < flash_block ? T - q0 : flash_block, tiled = (rows + flash_rows - 1) / flash_rows * flash_rows;
      const index_t q_panel = q0 / 16 * row_panel, k_panel = k0 / 16 * row_panel;
      FlashProduct(PanelRows<E>{q_rows + q_panel, row_panel}, k_rows + k_panel, row_panel, flash_block / 16, hd, tiled, s, flash_block, false);
      FlashProduct(PanelRows<E>{do_rows + q_panel, row_panel}, v_rows + k_panel, row_panel, flash_block / 16, hd, tiled, dp, flash_block, false);
      for (index_t r = 0; r < flash_block; r += 2) {
        V p[2], ds[2];
        float lse[2] = {}, dot[2] = {};
        index_t seen[2] = {};  // none for rows past the sequence
        for (index_t i = 0; i < 2; ++i)
          if (r + i < rows) lse[i] = t.lse[(q0 + r + i) * t.ld_lse], dot[i] = delta[q0 + r + i], seen[i] = q0 + r + i - k0 + 1;
        for (index_t c = 0; c < flash_block; c += lanes) {
          for (index_t i = 0; i < 2; ++i) {
            p[i] = ds[i] = zero;
            if (seen[i] <= c) continue;
            const index_t place = (r + i) * flash_block + c;
            const V e = math::ExpNonPositive(d, hn::MulSub(hn::LoadU(d, s + place), scale, hn::Set(d, lse[i])));
            p[i] = seen[i] < c + lanes ? Seen(e, c, seen[i], zero) : e;
            ds[i] = hn::Mul(hn::Mul(p[i], hn::Sub(hn::LoadU(d, dp + place), hn::Set(d, dot[i]))), scale);
          }
          StoreTransposed(p_t, r, c, p[0], p[1]);
          StoreTransposed(ds_t, r, c, ds[0], ds[1]);
          StoreWeights(ds_rows + r * flash_block, c, ds[0]);
          StoreWeights(ds_rows + (r + 1) * flash_block, c, ds[1]);
        }
      }
      const PanelRows<E> p_columns{p_t, flash_block * 16}, ds_columns{ds_t, flash_block * 16};
      FlashProduct(p_columns, do_columns + q0 * 16, column_panel, head_panels, flash_block, flash_block, dv, stride, true);
      FlashProduct(ds_columns, q_columns + q0 * 16, column_panel, head_panels, flash_block, flash_block, dk, stride, true);
      FlashProduct(BlockRows<E>{ds_rows}, k_columns + k0 * 16, column_panel, head_panels, flash_block, tiled, dq + q0 * stride, stride, true);
    }
    for (index_t r = 0; r < flash_block && k0 + r < T; ++r)
      for (index_t c = 0; c < hd; ++c) {
        g.dk[(k0 + r) * g.ld_dkv + c] = dk[r * stride + c];
        g.dv[(k0 + r) * g.ld_dkv + c] = dv[r * stride + c];
      }
  }
  for (index_t i = 0; i < T; ++i)
    for (index_t c = 0; c < hd; ++c) g.dq[i * g.ld_dq + c] = dq[i * stride + c];
}

void flash_forward(const FlashTask& t) {
#if TINYLLAMA_BF16_VNNI
  if (t.bf16) return FlashForward<bf16>(t);
#endif
  FlashForward<float>(t);
}
void flash_backward(const FlashGradTask& g) {
#if TINYLLAMA_BF16_VNNI
  if (g.forward.bf16) return FlashBackward<bf16>(g);
#endif
  FlashBackward<float>(g);
}

}  // namespace
}  // namespace TINYLLAMA_ISA
}  // namespace tinyllama
HWY_AFTER_NAMESPACE();
