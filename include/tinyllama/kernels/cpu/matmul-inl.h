// Products of activations with packed panels of weights: one row (decode, bound by memory) and several (prefill, bound by multiplies).
// A lane owns a row of W, so no sum runs across lanes and each output's order of summation is fixed by k alone.

#include "tinyllama/kernels/cpu/isa-inl.h"

#include <cstring>

TINYLLAMA_BEFORE_NAMESPACE();
namespace tinyllama {
namespace TINYLLAMA_ISA {
namespace {

// Rows of X and panels of W held in registers: 8 x 3 x 16 lanes of f32 with 32 registers, 6 x 16 with 16.
inline constexpr int tile_rows = lanes == 16 ? 8 : lanes == 8 ? 6 : 2;
inline constexpr int tile_panels = lanes == 16 ? 3 : 1;
inline constexpr index_t tile_k = 1024;  // columns at a time: 3 panels of f32 are 192 KB, within a core's L2

/// Two columns of a panel, widened: columns 2 kp and 2 kp + 1 of rows [s lanes, (s + 1) lanes).
HWY_INLINE void LoadPair(const float* w, index_t kp, index_t s, V& w0, V& w1) {
  w0 = hn::LoadU(D(), w + kp * 32 + s * lanes), w1 = hn::LoadU(D(), w + kp * 32 + 16 + s * lanes);
}
HWY_INLINE void LoadPair(const f16* w, index_t kp, index_t s, V& w0, V& w1) {
  w0 = Widen(D(), w + kp * 32 + s * lanes), w1 = Widen(D(), w + kp * 32 + 16 + s * lanes);
}
HWY_INLINE void LoadPair(const bf16* w, index_t kp, index_t s, V& w0, V& w1) {
  const auto u = hn::LoadU(DU(), reinterpret_cast<const std::uint32_t*>(w + kp * 32 + s * 2 * lanes));
  w0 = hn::BitCast(D(), hn::ShiftLeft<16>(u)), w1 = hn::BitCast(D(), hn::And(u, hn::Set(DU(), 0xffff0000u)));
}

/// y[0, valid) (+)= v for one vector of outputs.
HWY_INLINE void StoreRows(float* y, V v, index_t valid, bool accumulate) {
  const D d;
  if (valid >= lanes) {
    hn::StoreU(accumulate ? hn::Add(v, hn::LoadU(d, y)) : v, d, y);
  } else if (valid > 0) {
    alignas(64) float t[lanes];
    hn::Store(v, d, t);
    for (index_t i = 0; i < valid; ++i) y[i] = accumulate ? y[i] + t[i] : t[i];
  }
}

// y [MR, NP x 16] (+)= x [MR, kc] w^T
template <class W, int MR, int NP>
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

/// The rows of one block of k: as many as a tile takes, then halves.
template <class W, int NP>
void FloatRows(const MatmulTask& t, const W* w, index_t panel_stride, index_t k0, index_t kc, index_t column) {
  const index_t valid = t.n - column;
  const bool accumulate = k0 > 0;
  index_t i = 0;
  const auto x = [&](index_t row) { return t.x + row * t.ldx + k0; };
  const auto y = [&](index_t row) { return t.y + row * t.ldy + column; };
  if (t.m == 1) {
    for (int p = 0; p < NP; ++p) FloatVector(x(0), w + p * panel_stride, kc, y(0) + p * 16, valid - p * 16, accumulate);
    return;
  }
  for (; i + tile_rows <= t.m; i += tile_rows) FloatTile<W, tile_rows, NP>(x(i), t.ldx, w, panel_stride, kc, y(i), t.ldy, valid, accumulate);
  if constexpr (tile_rows > 4)
    for (; i + 4 <= t.m; i += 4) FloatTile<W, 4, NP>(x(i), t.ldx, w, panel_stride, kc, y(i), t.ldy, valid, accumulate);
  if constexpr (tile_rows > 2)
    for (; i + 2 <= t.m; i += 2) FloatTile<W, 2, NP>(x(i), t.ldx, w, panel_stride, kc, y(i), t.ldy, valid, accumulate);
  for (; i < t.m; ++i) FloatTile<W, 1, NP>(x(i), t.ldx, w, panel_stride, kc, y(i), t.ldy, valid, accumulate);
}

template <class W>
void FloatPanels(const MatmulTask& t, index_t first, index_t last) {
  const index_t panel_stride = even(t.k) * panel_rows;
  const auto* w = reinterpret_cast<const W*>(t.w);
  const index_t step = t.m == 1 ? t.k : tile_k;  // a single row streams whole panels
  index_t p = first;
  for (; p + tile_panels <= last; p += tile_panels)
    for (index_t k0 = 0; k0 < t.k; k0 += step)
      FloatRows<W, tile_panels>(t, w + p * panel_stride + k0 * panel_rows, panel_stride, k0, t.k - k0 < step ? t.k - k0 : step, p * panel_rows);
  for (; p < last; ++p)
    for (index_t k0 = 0; k0 < t.k; k0 += step)
      FloatRows<W, 1>(t, w + p * panel_stride + k0 * panel_rows, panel_stride, k0, t.k - k0 < step ? t.k - k0 : step, p * panel_rows);
}

// ---- block formats -----------------------------------------------------------------------------------------------------------------

HWY_INLINE VU LoadCodes(const std::byte* p) { return hn::LoadU(DU(), reinterpret_cast<const std::uint32_t*>(p)); }

/// The codes of 32 columns of rows [s lanes, (s + 1) lanes): c[j] holds columns 4 j .. 4 j + 3 of each row in its 32-bit lane.
template <int Bits>
HWY_INLINE void Unpack(const std::byte* codes, index_t s, VU (&c)[8]) {
  const DU du;
  const std::byte* at = codes + s * lanes * 4;
  if constexpr (Bits == 8) {
    TINYLLAMA_UNROLL for (int j = 0; j < 8; ++j) c[j] = LoadCodes(at + j * 64);
    return;
  }
  // Shifts of 32-bit lanes bring in bits of the neighbouring byte; the masks take them out again.
  const VU low = hn::Set(du, 0x0f0f0f0fu);
  TINYLLAMA_UNROLL for (int j = 0; j < 4; ++j) {
    const VU v = LoadCodes(at + j * 64);
    c[j] = hn::And(v, low);
    c[j + 4] = hn::And(hn::ShiftRight<4>(v), low);
  }
  if constexpr (Bits == 5) {
    const VU h = LoadCodes(at + 256), bit = hn::Set(du, 0x10101010u);
    c[0] = hn::Or(c[0], hn::And(hn::ShiftLeft<4>(h), bit));
    c[1] = hn::Or(c[1], hn::And(hn::ShiftLeft<3>(h), bit));
    c[2] = hn::Or(c[2], hn::And(hn::ShiftLeft<2>(h), bit));
    c[3] = hn::Or(c[3], hn::And(hn::ShiftLeft<1>(h), bit));
    c[4] = hn::Or(c[4], hn::And(h, bit));
    c[5] = hn::Or(c[5], hn::And(hn::ShiftRight<1>(h), bit));
    c[6] = hn::Or(c[6], hn::And(hn::ShiftRight<2>(h), bit));
    c[7] = hn::Or(c[7], hn::And(hn::ShiftRight<3>(h), bit));
  }
  if constexpr (Bits == 6) {
    const VU bits = hn::Set(du, 0x30303030u);
    TINYLLAMA_UNROLL for (int half = 0; half < 2; ++half) {
      const VU h = LoadCodes(at + 256 + half * 64);
      VU* to = c + 4 * half;
      to[0] = hn::Or(to[0], hn::And(hn::ShiftLeft<4>(h), bits));
      to[1] = hn::Or(to[1], hn::And(hn::ShiftLeft<2>(h), bits));
      to[2] = hn::Or(to[2], hn::And(h, bits));
      to[3] = hn::Or(to[3], hn::And(hn::ShiftRight<2>(h), bits));
    }
  }
}

HWY_INLINE V F16Row(const std::byte* p, index_t s) { return Widen(D(), reinterpret_cast<const f16*>(p) + s * lanes); }
HWY_INLINE V U8Row(const std::byte* p, index_t s) {
  const hn::Rebind<std::uint8_t, D> d8;
  return hn::ConvertTo(D(), hn::PromoteTo(DI(), hn::LoadU(d8, reinterpret_cast<const std::uint8_t*>(p) + s * lanes)));
}
HWY_INLINE V I8Row(const std::byte* p, index_t s) {
  const hn::Rebind<std::int8_t, D> d8;
  return hn::ConvertTo(D(), hn::PromoteTo(DI(), hn::LoadU(d8, reinterpret_cast<const std::int8_t*>(p) + s * lanes)));
}

/// Scale and minimum of 32 columns (g counts them within the block) for rows [s lanes, (s + 1) lanes): w = scale (code - offset) + min.
template <Format F>
HWY_INLINE void Scales(const std::byte* block, int g, index_t s, V d, V m, V& scale, V& min) {
  constexpr PanelBlock P = panel_block<F>;
  scale = d, min = m;
  if constexpr (P.groups == 8) {
    scale = hn::Mul(d, U8Row(block + 64 + g * 16, s));
    min = hn::Neg(hn::Mul(m, U8Row(block + 64 + 128 + g * 16, s)));
  }
}

HWY_INLINE std::uint32_t Four(const std::int8_t* q) {
  std::uint32_t u;
  std::memcpy(&u, q, 4);
  return u;
}

// y [MR, 16] = x [MR, k] w^T through int8 dot products:
//   sum over blocks of scale (x_scale (codes . q) - offset x_sum) + min x_sum
template <Format F, int MR>
void Int8Tile(const MatmulTask& t, const std::byte* panel, index_t row, index_t column) {
  constexpr PanelBlock P = panel_block<F>;
  const D d;
  const DI di;
  const std::int8_t* q = t.x_q8 + row * t.k;
  const index_t g32 = t.k / 32, g16 = t.k / 16;
  const float *x_scale = t.x_scale + row * g32, *x_sum32 = t.x_sum32 + row * g32, *x_sum16 = t.x_sum16 + row * g16;
  const V offset = hn::Set(d, -static_cast<float>(P.offset));
  V acc[MR][subs];
  TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i)
    TINYLLAMA_UNROLL for (int s = 0; s < subs; ++s) acc[i][s] = hn::Zero(d);
  for (index_t n = 0; n < t.k / P.columns; ++n, panel += P.bytes()) {
    for (int b = 0; b < P.columns / 32; ++b) {
      const index_t g = n * (P.columns / 32) + b;
      TINYLLAMA_UNROLL for (int s = 0; s < subs; ++s) {
        VU c[8];
        Unpack<P.bits>(panel + P.header_bytes() + b * P.code_bytes(), s, c);
        const V block_scale = F16Row(panel, s);
        if constexpr (P.groups == 16) {
          const V scale0 = hn::Mul(block_scale, I8Row(panel + 32 + 32 * b, s)), scale1 = hn::Mul(block_scale, I8Row(panel + 32 + 32 * b + 16, s));
          TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i) {
            VI d0 = hn::Zero(di), d1 = hn::Zero(di);
            TINYLLAMA_UNROLL for (int j = 0; j < 4; ++j) {
              d0 = DotU8S8(d0, c[j], Four(q + i * t.k + 32 * g + 4 * j));
              d1 = DotU8S8(d1, c[j + 4], Four(q + i * t.k + 32 * g + 16 + 4 * j));
            }
            const V xs = hn::Set(d, x_scale[i * g32 + g]);
            const V v0 = hn::MulAdd(offset, hn::Set(d, x_sum16[i * g16 + 2 * g]), hn::Mul(hn::ConvertTo(d, d0), xs));
            const V v1 = hn::MulAdd(offset, hn::Set(d, x_sum16[i * g16 + 2 * g + 1]), hn::Mul(hn::ConvertTo(d, d1), xs));
            acc[i][s] = hn::MulAdd(scale1, v1, hn::MulAdd(scale0, v0, acc[i][s]));
          }
        } else {
          V scale, min, m = hn::Zero(d);
          if constexpr (P.mins == 1) m = F16Row(panel + 32, s);
          Scales<F>(panel, b, s, block_scale, m, scale, min);
          TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i) {
            VI d0 = hn::Zero(di), d1 = hn::Zero(di);
            TINYLLAMA_UNROLL for (int j = 0; j < 4; ++j) {
              d0 = DotU8S8(d0, c[j], Four(q + i * t.k + 32 * g + 4 * j));
              d1 = DotU8S8(d1, c[j + 4], Four(q + i * t.k + 32 * g + 16 + 4 * j));
            }
            const V sum = hn::Set(d, x_sum32[i * g32 + g]);
            V v = hn::Mul(hn::ConvertTo(d, hn::Add(d0, d1)), hn::Set(d, x_scale[i * g32 + g]));
            if constexpr (P.offset != 0) v = hn::MulAdd(offset, sum, v);
            acc[i][s] = hn::MulAdd(scale, v, acc[i][s]);
            if constexpr (P.mins == 1) acc[i][s] = hn::MulAdd(min, sum, acc[i][s]);
          }
        }
      }
    }
  }
  TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i)
    TINYLLAMA_UNROLL for (int s = 0; s < subs; ++s)
      StoreRows(t.y + (row + i) * t.ldy + column + s * lanes, acc[i][s], t.n - column - s * lanes, false);
}

inline constexpr int int8_rows = lanes == 16 ? 16 : lanes == 8 ? 4 : 2;

template <Format F>
void Int8Panels(const MatmulTask& t, index_t first, index_t last) {
  for (index_t p = first; p < last; ++p) {
    const std::byte* panel = t.w + static_cast<std::size_t>(p) * panel_bytes<F>(t.k);
    index_t i = 0;
    for (; i + int8_rows <= t.m; i += int8_rows) Int8Tile<F, int8_rows>(t, panel, i, p * panel_rows);
    if constexpr (int8_rows > 4)
      for (; i + 4 <= t.m; i += 4) Int8Tile<F, 4>(t, panel, i, p * panel_rows);
    for (; i < t.m; ++i) Int8Tile<F, 1>(t, panel, i, p * panel_rows);
  }
}

/// 256 (or fewer) columns of a panel as floats [columns][16], for products that must not round the activations.
template <Format F>
void Dequantise(const std::byte* block, float* out) {
  constexpr PanelBlock P = panel_block<F>;
  const D d;
  const DI di;
  for (int b = 0; b < P.columns / 32; ++b)
    TINYLLAMA_UNROLL for (int s = 0; s < subs; ++s) {
      VU c[8];
      Unpack<P.bits>(block + P.header_bytes() + b * P.code_bytes(), s, c);
      const V block_scale = F16Row(block, s);
      V scale[2], min, m = hn::Zero(d);
      if constexpr (P.mins == 1) m = F16Row(block + 32, s);
      Scales<F>(block, b, s, block_scale, m, scale[0], min);
      scale[1] = scale[0];
      if constexpr (P.groups == 16)
        TINYLLAMA_UNROLL for (int h = 0; h < 2; ++h) scale[h] = hn::Mul(block_scale, I8Row(block + 32 + 32 * b + 16 * h, s));
      for (int j = 0; j < 8; ++j) {
        const VI four = hn::BitCast(di, c[j]);
        for (int i = 0; i < 4; ++i) {
          const VI code = hn::And(hn::ShiftRightSame(four, 8 * i), hn::Set(di, 0xff));
          const V w = hn::MulAdd(scale[j / 4], hn::ConvertTo(d, hn::Sub(code, hn::Set(di, P.offset))), min);
          hn::StoreU(w, d, out + (b * 32 + j * 4 + i) * 16 + s * lanes);
        }
      }
    }
}

template <Format F>
void DequantisedPanels(const MatmulTask& t, index_t first, index_t last) {
  constexpr PanelBlock P = panel_block<F>;
  constexpr index_t most = 256, blocks = most / P.columns;
  alignas(64) float w[most * panel_rows];
  for (index_t p = first; p < last; ++p)
    for (index_t k0 = 0; k0 < t.k; k0 += most) {
      const index_t kc = t.k - k0 < most ? t.k - k0 : most;
      const std::byte* at = t.w + static_cast<std::size_t>(p) * panel_bytes<F>(t.k) + static_cast<std::size_t>(k0 / P.columns * P.bytes());
      for (index_t b = 0; b < blocks && b * P.columns < kc; ++b) Dequantise<F>(at + b * P.bytes(), w + b * P.columns * panel_rows);
      FloatRows<float, 1>(t, w, 0, k0, kc, p * panel_rows);
    }
}

void matmul_f32(const MatmulTask& t, index_t first, index_t last) {
  visit(t.format, [&]<Format F>() {
    if constexpr (is_quantised(F)) DequantisedPanels<F>(t, first, last);
    else FloatPanels<Block<F>>(t, first, last);
  });
}

void matmul_int8(const MatmulTask& t, index_t first, index_t last) {
  visit(t.format, [&]<Format F>() {
    if constexpr (is_quantised(F)) Int8Panels<F>(t, first, last);
  });
}

// ---- bf16 dot products -------------------------------------------------------------------------------------------------------------

#if TINYLLAMA_BF16_VNNI

HWY_INLINE std::uint32_t Two(const bf16* x) {
  std::uint32_t u;
  std::memcpy(&u, x, 4);
  return u;
}

// As FloatTile, two columns an instruction: _mm512_dpbf16_ps adds both products of a pair to the f32 lane.
template <int MR, int NP>
void Bf16Tile(const bf16* x, index_t ldx, const bf16* w, index_t panel_stride, index_t kc, float* y, index_t ldy, index_t valid, bool accumulate) {
  __m512 acc[MR][NP];
  TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i)
    TINYLLAMA_UNROLL for (int j = 0; j < NP; ++j) acc[i][j] = _mm512_setzero_ps();
  for (index_t kp = 0; kp < (kc + 1) / 2; ++kp) {
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
  const auto tile = [&]<int MR>(index_t i) HWY_ATTR {
    Bf16Tile<MR, NP>(t.x_bf16 + i * t.ldx + k0, t.ldx, w, panel_stride, kc, t.y + i * t.ldy + column, t.ldy, t.n - column, k0 > 0);
  };
  index_t i = 0;
  for (; i + tile_rows <= t.m; i += tile_rows) tile.template operator()<tile_rows>(i);
  for (; i + 4 <= t.m; i += 4) tile.template operator()<4>(i);
  for (; i + 2 <= t.m; i += 2) tile.template operator()<2>(i);
  for (; i < t.m; ++i) tile.template operator()<1>(i);
}

void matmul_bf16(const MatmulTask& t, index_t first, index_t last) {
  const index_t panel_stride = even(t.k) * panel_rows, step = 2 * tile_k;
  const auto* w = reinterpret_cast<const bf16*>(t.w);
  index_t p = first;
  for (; p + tile_panels <= last; p += tile_panels)
    for (index_t k0 = 0; k0 < t.k; k0 += step)
      Bf16Rows<tile_panels>(t, w + p * panel_stride + k0 * panel_rows, panel_stride, k0, t.k - k0 < step ? t.k - k0 : step, p * panel_rows);
  for (; p < last; ++p)
    for (index_t k0 = 0; k0 < t.k; k0 += step)
      Bf16Rows<1>(t, w + p * panel_stride + k0 * panel_rows, panel_stride, k0, t.k - k0 < step ? t.k - k0 : step, p * panel_rows);
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
