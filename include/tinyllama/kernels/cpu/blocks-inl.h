// Products of activations with packed panels of block formats, by int8 dot products or dequantised.
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

// Up to so many rows of X, which then are signed (Kernels::int8_signed_rows). With the dot product of one instruction, four rows at a time beat the detour below up to some 16 rows (Zen 4,
// 320 against 220 GOP/s a core at 4 rows of q4_0); without it, unpacking is the smaller part. Narrow vectors take the
// detour always, to compile faster.
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

// ---- many rows: a chunk of a panel is brought to one form first, which all formats share --------------------------------------------

inline constexpr index_t chunk = 256;  // columns at a time: 8 KB of codes for a tile, which stay in L1; 512 were 5% slower (Zen 4)

/// Columns of a panel: w = scale code + min, with signed codes and nothing for min where the format has an offset instead.
struct Spread {
  alignas(64) std::uint32_t codes[chunk / 4][panel_rows];        // four columns of a row
  alignas(64) std::int32_t correction[chunk / 16][panel_rows];   // -128 times the sum of the codes: what 128 added to the activations adds to a dot product
  alignas(64) float scale[chunk / 16][panel_rows], min[chunk / 16][panel_rows];  // of 32 columns, or (q6_K) of 16
};

/// Offset taken from each byte of a lane: their top bits, set meanwhile, keep the bytes from borrowing.
template <int Offset>
HWY_INLINE VU Minus(VU codes) {
  const VU top = hn::Set(DU(), 0x80808080u);
  if constexpr (Offset == 128) return hn::Xor(codes, top);
  else return hn::Xor(hn::Sub(hn::Or(codes, top), hn::Set(DU(), 0x01010101u * Offset)), top);
}

template <Format F>
void SpreadBlocks(const std::byte* block, index_t columns, Spread& to) {
  constexpr PanelBlock P = panel_block<F>;
  constexpr int halves = P.groups == 16 ? 2 : 1, per_block = P.columns / 32, fours = 8 / halves;
  for (index_t g = 0; g < columns / 32; ++g) {
    const std::byte* at = block + g / per_block * P.bytes();
    const int b = static_cast<int>(g % per_block);
    for (index_t s = 0; s < subs; ++s) {
      VU c[8];
      Unpack<P.bits>(at + P.header_bytes() + b * P.code_bytes(), s, c);
      if constexpr (P.offset != 0)
        TINYLLAMA_UNROLL for (int j = 0; j < 8; ++j) c[j] = Minus<P.offset>(c[j]);
      TINYLLAMA_UNROLL for (int j = 0; j < 8; ++j) hn::Store(c[j], DU(), to.codes[8 * g + j] + s * lanes);
      for (int h = 0; h < halves; ++h) {
        VI sum = hn::Zero(DI());
        TINYLLAMA_UNROLL for (int j = 0; j < fours; ++j) sum = Dot4(sum, hn::Set(DU(), 0x80808080u), c[h * fours + j]);
        hn::Store(hn::Neg(sum), DI(), to.correction[g * halves + h] + s * lanes);
        V scale, min;
        Scales<F>(at, b, h, s, scale, min);
        hn::Store(scale, D(), to.scale[g * halves + h] + s * lanes);
        if constexpr (P.offset == 0) hn::Store(min, D(), to.min[g * halves + h] + s * lanes);
      }
    }
  }
}

/// What a format's panels look like to the code that all formats share.
struct SpreadFormat {
  void (*spread)(const std::byte*, index_t, Spread&) = nullptr;
  int columns = 0, bytes = 0, halves = 0;
  bool mins = false;
};
template <Format F>
constexpr SpreadFormat spread_format() {
  if constexpr (!is_quantised(F)) return {};
  else return {&SpreadBlocks<F>, panel_block<F>.columns, panel_block<F>.bytes(), panel_block<F>.groups == 16 ? 2 : 1, panel_block<F>.offset == 0};
}

// Rows of X and panels of W that a tile holds: each broadcast of four activations serves all its panels.
inline constexpr int int8_rows = lanes == 16 ? 6 : 4, int8_panels = lanes == 16 ? 2 : 1;

// y [MR, int8_panels x 16] (+)= x [MR, columns] w^T. For 8 dot products of 4 columns: a conversion, a product, one or two multiply-adds.
template <int Halves, bool Mins, int MR>
void Int8Tile(const MatmulTask& t, const Spread (&w)[int8_panels], index_t row, index_t k0, index_t columns) {
  const D d;
  constexpr int NP = int8_panels, fours = 8 / Halves;
  const index_t groups = t.k / 32;
  const std::int8_t* q = t.x_q8 + row * t.k + k0;
  const float *x_scale = t.x_scale + row * groups + k0 / 32, *x_sum = t.x_sum32 + row * groups + k0 / 32;
  for (index_t s = 0; s < subs; ++s) {
    V acc[MR][NP];
    TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i)
      TINYLLAMA_UNROLL for (int p = 0; p < NP; ++p) acc[i][p] = hn::Zero(d);
    for (index_t g = 0; g < columns / 32; ++g)
      for (int h = 0; h < Halves; ++h) {
        VI dot[MR][NP];
        TINYLLAMA_UNROLL for (int p = 0; p < NP; ++p) {
          const VI correction = hn::Load(DI(), w[p].correction[g * Halves + h] + s * lanes);
          TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i) dot[i][p] = correction;
        }
        TINYLLAMA_UNROLL for (int j = 0; j < fours; ++j) {
          VU c[NP];
          TINYLLAMA_UNROLL for (int p = 0; p < NP; ++p) c[p] = hn::Load(DU(), w[p].codes[8 * g + h * fours + j] + s * lanes);
          TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i) {
            const VU four = Four(q + i * t.k + 32 * g + 4 * (h * fours + j));
            TINYLLAMA_UNROLL for (int p = 0; p < NP; ++p) dot[i][p] = Dot4(dot[i][p], four, c[p]);
          }
        }
        V scale[NP], min[NP];
        TINYLLAMA_UNROLL for (int p = 0; p < NP; ++p) {
          scale[p] = hn::Load(d, w[p].scale[g * Halves + h] + s * lanes);
          if constexpr (Mins) min[p] = hn::Load(d, w[p].min[g * Halves + h] + s * lanes);
        }
        TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i) {
          const V by = hn::Set(d, x_scale[i * groups + g]);
          TINYLLAMA_UNROLL for (int p = 0; p < NP; ++p) {
            acc[i][p] = hn::MulAdd(scale[p], hn::Mul(hn::ConvertTo(d, dot[i][p]), by), acc[i][p]);
            if constexpr (Mins) acc[i][p] = hn::MulAdd(min[p], hn::Set(d, x_sum[i * groups + g]), acc[i][p]);
          }
        }
      }
    TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i)
      TINYLLAMA_UNROLL for (int p = 0; p < NP; ++p)
        StoreRows(t.y + (row + i) * t.ldy + p * panel_rows + s * lanes, acc[i][p], lanes, k0 > 0);
  }
}

template <int Halves, bool Mins>
void Int8Rows(const MatmulTask& t, const Spread (&w)[int8_panels], index_t k0, index_t columns) {
  index_t i = 0;
  for (; i + int8_rows <= t.m; i += int8_rows) Int8Tile<Halves, Mins, int8_rows>(t, w, i, k0, columns);
  for (; i < t.m; ++i) Int8Tile<Halves, Mins, 1>(t, w, i, k0, columns);
}

void Int8Panels(const MatmulTask& t, const SpreadFormat& f, index_t first, index_t last) {
  constexpr index_t width = int8_panels * panel_rows, most = 192;
  const index_t panel_bytes = t.k / f.columns * f.bytes;
  // So many rows at a time that their codes stay in L2 from one pair of panels to the next; beyond, a product runs 10% slower (Zen 4).
  const index_t fit = (index_t{400} << 10) / t.k / int8_rows * int8_rows, block = fit < 48 ? 48 : fit < most ? fit : most;
  Spread w[int8_panels] = {};
  // Sums over the chunks: the rows of y lie pages apart and would push each other out of L1.
  alignas(64) float sums[most * width];
  for (index_t row = 0; row < t.m; row += block) {
    MatmulTask part = t;
    part.m = t.m - row < block ? t.m - row : block;
    part.ldy = width, part.y = sums;
    part.x_q8 += row * t.k, part.x_scale += row * (t.k / 32), part.x_sum32 += row * (t.k / 32);
    for (index_t p = first; p < last; p += int8_panels) {
      for (index_t k0 = 0; k0 < t.k; k0 += chunk) {
        const index_t kc = t.k - k0 < chunk ? t.k - k0 : chunk;
        for (index_t i = 0; i < int8_panels && p + i < last; ++i) f.spread(t.w + (p + i) * panel_bytes + k0 / f.columns * f.bytes, kc, w[i]);
        if (f.halves == 2) Int8Rows<2, false>(part, w, k0, kc);
        else if (f.mins) Int8Rows<1, true>(part, w, k0, kc);
        else Int8Rows<1, false>(part, w, k0, kc);
      }
      const index_t column = p * panel_rows, end = t.n < last * panel_rows ? t.n : last * panel_rows, columns = end - column < width ? end - column : width;
      for (index_t i = 0; i < part.m; ++i) {
        float* to = t.y + (row + i) * t.ldy + column;
        if (columns == width)
          for (index_t c = 0; c < width; c += lanes) hn::StoreU(hn::Load(D(), sums + i * width + c), D(), to + c);
        else
          for (index_t c = 0; c < columns; ++c) to[c] = sums[i * width + c];
      }
    }
  }
}

void matmul_int8(const MatmulTask& t, index_t first, index_t last) {
  visit(t.format, [&]<Format F>() {
    if constexpr (is_quantised(F)) {
      if constexpr (stream_rows > 0)
        if (t.m <= stream_rows) return Int8StreamPanels<F>(t, first, last);
      Int8Panels(t, spread_format<F>(), first, last);
    }
  });
}

#if !defined(TINYLLAMA_EXTRA_PASS)
// ---- dequantised -------------------------------------------------------------------------------------------------------------------

/// The codes as floats [columns][16], for products that must not round the activations.
void Dequantise(const Spread& from, const SpreadFormat& format, index_t columns, float* to) {
  const D d;
  const DI di;
  for (index_t f = 0; f < columns / 4; ++f)
    for (index_t s = 0; s < subs; ++s) {
      const index_t group = f / (8 / format.halves);
      const V scale = hn::Load(d, from.scale[group] + s * lanes), min = format.mins ? hn::Load(d, from.min[group] + s * lanes) : hn::Zero(d);
      const VI four = hn::BitCast(di, hn::Load(DU(), from.codes[f] + s * lanes));
      for (int i = 0; i < 4; ++i) {
        const VI code = hn::ShiftRight<24>(hn::ShiftLeftSame(four, 24 - 8 * i));
        hn::Store(hn::MulAdd(scale, hn::ConvertTo(d, code), min), d, to + (4 * f + i) * panel_rows + s * lanes);
      }
    }
}

void DequantisedPanels(const MatmulTask& t, const SpreadFormat& f, index_t first, index_t last) {
  const index_t panel_bytes = t.k / f.columns * f.bytes;
  Spread w;
  alignas(64) float wide[chunk * panel_rows];
  for (index_t p = first; p < last; ++p)
    for (index_t k0 = 0; k0 < t.k; k0 += chunk) {
      const index_t kc = t.k - k0 < chunk ? t.k - k0 : chunk;
      f.spread(t.w + p * panel_bytes + k0 / f.columns * f.bytes, kc, w);
      Dequantise(w, f, kc, wide);
      FloatRows<1>(t, wide, 0, k0, kc, p * panel_rows);
    }
}

void matmul_f32(const MatmulTask& t, index_t first, index_t last) {
  if (t.format == Format::f32) return FloatPanels<float>(t, first, last);
  if (t.format == Format::f16) return FloatPanels<f16>(t, first, last);
  if (t.format == Format::bf16) return FloatPanels<bf16>(t, first, last);
  DequantisedPanels(t, visit(t.format, []<Format F>() { return spread_format<F>(); }), first, last);
}
#endif

}  // namespace
}  // namespace TINYLLAMA_ISA
}  // namespace tinyllama
HWY_AFTER_NAMESPACE();
