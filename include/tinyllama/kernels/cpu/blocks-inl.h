// Products of activations with packed panels of block formats: few rows by int8 dot products straight from the stream, or dequantised.
// matmul-inl.h comes first; as there, a lane owns a row of W.

#include "tinyllama/kernels/cpu/isa-inl.h"

#include <cstring>

TINYLLAMA_BEFORE_NAMESPACE();
namespace tinyllama {
namespace TINYLLAMA_ISA {
namespace {

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

/// Scale and minimum of half h (q6_K has two) of block b of 32 columns: w = scale (code - offset) + min, without min: -offset scale.
template <Format F>
HWY_INLINE void Scales(const std::byte* block, int b, int h, index_t s, V& scale, V& min) {
  constexpr PanelBlock P = panel_block<F>;
  scale = F16Row(block, s);
  if constexpr (P.groups == 16) scale = hn::Mul(scale, I8Row(block + 32 + 32 * b + 16 * h, s));
  if constexpr (P.groups == 8) scale = hn::Mul(scale, U8Row(block + 64 + 16 * b, s));
  if constexpr (P.offset != 0) min = hn::Mul(scale, hn::Set(D(), -static_cast<float>(P.offset)));
  else if constexpr (P.groups == 8) min = hn::Neg(hn::Mul(F16Row(block + 32, s), U8Row(block + 64 + 128 + 16 * b, s)));
  else min = F16Row(block + 32, s);
}

/// Four activations, in each lane.
HWY_INLINE VU Four(const std::int8_t* q) {
  std::uint32_t u;
  std::memcpy(&u, q, 4);
  return hn::Set(DU(), u);
}

// ---- few rows: straight from the stream --------------------------------------------------------------------------------------------

// y [MR, 16] = x [MR, k] w^T = sum over blocks of scale x_scale (codes . q) + min x_sum
template <Format F, int MR>
void Int8Stream(const MatmulTask& t, const std::byte* panel, index_t row, index_t column) {
  constexpr PanelBlock P = panel_block<F>;
  constexpr int halves = P.groups == 16 ? 2 : 1, share = P.bytes() / (P.columns / 32);
  const D d;
  const DI di;
  const index_t groups = t.k / 32;
  const std::int8_t* q = t.x_q8 + row * t.k;
  const float *x_scale = t.x_scale + row * groups, *x_sum = (halves == 2 ? t.x_sum16 : t.x_sum32) + row * groups * halves;
  V acc[MR][subs];
  TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i)
    TINYLLAMA_UNROLL for (int s = 0; s < subs; ++s) acc[i][s] = hn::Zero(d);
  for (index_t n = 0, g = 0; n < t.k / P.columns; ++n, panel += P.bytes())
    for (int b = 0; b < P.columns / 32; ++b, ++g)
      TINYLLAMA_UNROLL for (int s = 0; s < subs; ++s) {
        VU c[8];
        if (s == 0)
          for (int line = 0; line < share; line += 64) hwy::Prefetch(panel + ahead + b * share + line);
        Unpack<P.bits>(panel + P.header_bytes() + b * P.code_bytes(), s, c);
        V scale[halves], min[halves];
        TINYLLAMA_UNROLL for (int h = 0; h < halves; ++h) Scales<F>(panel, b, h, s, scale[h], min[h]);
        TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i) {
          VI dot[2] = {hn::Zero(di), hn::Zero(di)};
          TINYLLAMA_UNROLL for (int j = 0; j < 4; ++j) {
            dot[0] = Dot4(dot[0], c[j], Four(q + i * t.k + 32 * g + 4 * j));
            dot[1] = Dot4(dot[1], c[j + 4], Four(q + i * t.k + 32 * g + 16 + 4 * j));
          }
          if constexpr (halves == 1) dot[0] = hn::Add(dot[0], dot[1]);
          const V by = hn::Set(d, x_scale[i * groups + g]);
          TINYLLAMA_UNROLL for (int h = 0; h < halves; ++h) {
            acc[i][s] = hn::MulAdd(min[h], hn::Set(d, x_sum[(i * groups + g) * halves + h]), acc[i][s]);
            acc[i][s] = hn::MulAdd(scale[h], hn::Mul(hn::ConvertTo(d, dot[h]), by), acc[i][s]);
          }
        }
      }
  TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i)
    TINYLLAMA_UNROLL for (int s = 0; s < subs; ++s)
      StoreRows(t.y + (row + i) * t.ldy + column + s * lanes, acc[i][s], t.n - column - s * lanes, false);
}

// Up to so many rows of X (Kernels::int8_stream_rows). With the dot product of one instruction, four rows at a time beat the tiles (block_tiles-inl.h)
// up to some 16 rows (Zen 4, 320 against 220 GOP/s a core at 4 rows of q4_0); without it, unpacking is the smaller part. Narrow vectors take
// tiles always, to compile faster.
inline constexpr index_t stream_rows = TINYLLAMA_BF16_VNNI ? 16 : lanes >= 8 ? 1 : 0;

template <Format F>
void Int8StreamPanels(const MatmulTask& t, index_t first, index_t last) {
  for (index_t p = first; p < last; ++p) {
    const std::byte* panel = t.w + static_cast<std::size_t>(p) * panel_bytes<F>(t.k);
    index_t i = 0;
    if constexpr (stream_rows >= 4) {
      for (; i + 4 <= t.m; i += 4) Int8Stream<F, 4>(t, panel, i, p * panel_rows);
      for (; i + 2 <= t.m; i += 2) Int8Stream<F, 2>(t, panel, i, p * panel_rows);
    }
    for (; i < t.m; ++i) Int8Stream<F, 1>(t, panel, i, p * panel_rows);
  }
}

#if !defined(TINYLLAMA_EXTRA_PASS)
// ---- dequantised -------------------------------------------------------------------------------------------------------------------

/// Columns of a panel as floats [columns][16], for products that must not round the activations.
template <Format F>
void Dequantise(const std::byte* block, index_t columns, float* to) {
  constexpr PanelBlock P = panel_block<F>;
  constexpr int halves = P.groups == 16 ? 2 : 1, per_block = P.columns / 32;
  const D d;
  for (index_t g = 0; g < columns / 32; ++g) {
    const std::byte* at = block + g / per_block * P.bytes();
    const int b = static_cast<int>(g % per_block);
    for (index_t s = 0; s < subs; ++s) {
      VU c[8];
      Unpack<P.bits>(at + P.header_bytes() + b * P.code_bytes(), s, c);
      V scale[halves], min[halves];
      for (int h = 0; h < halves; ++h) Scales<F>(at, b, h, s, scale[h], min[h]);
      for (int j = 0; j < 8; ++j)
        for (int i = 0; i < 4; ++i) {
          const V code = hn::ConvertTo(d, hn::BitCast(DI(), hn::And(hn::ShiftRightSame(c[j], 8 * i), hn::Set(DU(), 255))));
          hn::Store(hn::MulAdd(scale[j * halves / 8], code, min[j * halves / 8]), d, to + (32 * g + 4 * j + i) * panel_rows + s * lanes);
        }
    }
  }
}

template <Format F>
void DequantisedPanels(const MatmulTask& t, index_t first, index_t last) {
  constexpr PanelBlock P = panel_block<F>;
  ExpandedPanels(t, first, last, [&](index_t p, index_t k0, index_t kc, float* to) {
    Dequantise<F>(t.w + static_cast<std::size_t>(p) * panel_bytes<F>(t.k) + k0 / P.columns * P.bytes(), kc, to);
  });
}

void matmul_f32(const MatmulTask& t, index_t first, index_t last) {
  visit(t.format, [&]<Format F>() {
    if constexpr (is_quantised(F)) DequantisedPanels<F>(t, first, last);
    else FloatPanels<Block<F>>(t, first, last);
  });
}
#endif

}  // namespace
}  // namespace TINYLLAMA_ISA
}  // namespace tinyllama
HWY_AFTER_NAMESPACE();
