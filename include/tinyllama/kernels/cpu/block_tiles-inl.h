// Products of many rows of activations with packed panels of block formats, in integers: tiles that all formats share.
//
// On Zen 5 a multiplication of vectors, of floats or of integers, takes a slot of the dot products; shifts by vectors, logic, conversions and additions take
// none, stores half a one. Scaling each 32 columns in floats, by W's scale and by X's, is 2 slots beside 8 dot products. Here two groups that share a scale of W
// (32 columns; 16 in q6_K) share these: their dot products are cut to 16 bits, one instruction scales both by the ratios of X's scales to the largest
// of a chunk of 256 columns, and another multiplies both with the scales of W and adds them up over the chunk in 32 bits. The codes of W stay as
// they are; its scales are integers in q4_K, q5_K and q6_K, and become such of 13 bits beside the largest in the chunk elsewhere. What is cut off, half of
// 2^-15 of what a dot product can be at most, is far below what rounding the activations costs it.

#include "tinyllama/kernels/cpu/isa-inl.h"

#include <cstring>

TINYLLAMA_BEFORE_NAMESPACE();
namespace tinyllama {
namespace TINYLLAMA_ISA {
namespace {

inline constexpr index_t chunk = int8_columns;  // 16 KB of codes for a tile's panels, which stay in L1

// Rows of X and panels of W that a tile holds: 12 chains of dot products and as many sums. Zen 5: dot products need 384 of a tile's 476 cycles (q4_0).
inline constexpr int int8_rows = lanes == 16 ? 3 : 4, int8_panels = lanes == 16 ? 4 : 1;
inline constexpr index_t int8_ahead = 16 * int8_rows;  // rows that are prepared at once

/// 256 columns of a tile's panels: w = unit scale (code - offset) + min_unit min, scales and minima in pairs of 16 bits, the first of two groups on top.
struct Int8Chunk {
  alignas(64) std::uint32_t codes[chunk / 4][int8_panels][panel_rows];  // four columns of a row
  alignas(64) std::int32_t scale[chunk / 32][int8_panels][panel_rows];  // of 16 columns each; the first half where groups have 32
  alignas(64) std::int32_t min[chunk / 64][int8_panels][panel_rows];
  alignas(64) float unit[int8_panels][panel_rows], min_unit[int8_panels][panel_rows];
};

enum class Int8Kind { offset, mins, halves };  // of a format: codes with an offset, with minima, with an offset and two scales for 32 columns (q6_K)

/// The bits by which the dot product of a group of one scale is longer than 16.
template <Format F>
inline constexpr int cut = [] {
  constexpr PanelBlock P = panel_block<F>;
  constexpr int largest = (P.offset ? P.offset : (1 << P.bits) - 1) * 127 * (P.groups == 16 ? 16 : 32);
  constexpr int bits = largest < 1 << 15 ? 0 : largest < 1 << 16 ? 1 : largest < 1 << 17 ? 2 : 4;
  static_assert(largest >> bits <= 32512);
  return bits;
}();

/// What a format's panels look like to the code that all formats share.
struct BlockFormat {
  void (*spread)(const std::byte*, index_t, int, Int8Chunk&) = nullptr;
  int columns = 1, bytes = 0, offset = 0, cut = 0;
  Int8Kind kind = Int8Kind::offset;
};

/// The power of two that makes values of up to `largest` integers of up to 13 bits, and what divides by it (0 for 0). So 8 of them times 16 bits fit into 32,
/// and an f16 within a quarter of the largest becomes an integer as it is.
HWY_INLINE V Unit(V largest, V& inverse) {
  const D d;
  const DI di;
  const VI exponent = hn::And(hn::BitCast(di, largest), hn::Set(di, 0x7f800000));
  inverse = hn::IfThenElseZero(hn::Gt(largest, hn::Zero(d)), hn::BitCast(d, hn::Sub(hn::Set(di, (2 * 127 + 12) << 23), exponent)));
  return hn::Mul(hn::BitCast(d, exponent), hn::Set(d, 1.0f / (1 << 12)));
}

/// The upper 16 bits of one, the lower of the other.
HWY_INLINE VI UpperLower(VI upper, VI lower) {
  const VI mask = hn::Set(DI(), static_cast<std::int32_t>(0xffff0000u));
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3
  return hn::IfVecThenElse(mask, upper, lower);  // bit by bit here, in one instruction; elsewhere of whole lanes
#else
  return hn::Or(hn::And(mask, upper), hn::AndNot(mask, lower));
#endif
}
HWY_INLINE VI Pair(V upper, V lower) { return UpperLower(hn::ShiftLeft<16>(hn::NearestInt(upper)), hn::NearestInt(lower)); }

/// f16 of two blocks, `from` bytes into them, as integers of a unit; no second: 0.
HWY_INLINE VI F16Pair(const std::byte* first, const std::byte* second, int from, index_t s, V inverse) {
  return Pair(hn::Mul(F16Row(first + from, s), inverse), second ? hn::Mul(F16Row(second + from, s), inverse) : hn::Zero(D()));
}

/// Columns [0, columns) of one panel to its place p among a tile's.
template <Format F>
void Spread(const std::byte* block, index_t columns, int p, Int8Chunk& to) {
  constexpr PanelBlock P = panel_block<F>;
  constexpr int per_block = P.columns / 32;
  const D d;
  const DI di;
  const DU du;
  const index_t groups = columns / 32;
  const auto at = [&](index_t g) { return block + g / per_block * P.bytes(); };
  for (index_t s = 0; s < subs; ++s) {
    for (index_t g = 0; g < groups; ++g) {
      VU c[8];
      Unpack<P.bits>(at(g) + P.header_bytes() + g % per_block * P.code_bytes(), s, c);
      TINYLLAMA_UNROLL for (int j = 0; j < 8; ++j) hn::Store(c[j], du, to.codes[8 * g + j][p] + s * lanes);
    }
    const auto store = [&](VI v, std::int32_t (&row)[int8_panels][panel_rows]) HWY_ATTR { hn::Store(v, di, row[p] + s * lanes); };
    V unit, min_unit = hn::Zero(d);
    if constexpr (P.groups == 16) {
      for (int g = 0; g < 8; ++g) store(Pair(I8Row(block + 32 + 32 * g, s), I8Row(block + 48 + 32 * g, s)), to.scale[g]);
      unit = F16Row(block, s);
    } else if constexpr (P.groups == 8) {
      for (int g = 0; g < 8; g += 2) {
        store(Pair(U8Row(block + 64 + 16 * g, s), U8Row(block + 80 + 16 * g, s)), to.scale[g / 2]);
        store(Pair(U8Row(block + 192 + 16 * g, s), U8Row(block + 208 + 16 * g, s)), to.min[g / 2]);
      }
      unit = F16Row(block, s), min_unit = hn::Neg(F16Row(block + 32, s));
    } else {
      V largest = hn::Zero(d), largest_min = hn::Zero(d), inverse, min_inverse;
      for (index_t g = 0; g < groups; ++g) {
        largest = hn::Max(largest, hn::Abs(F16Row(at(g), s)));
        if constexpr (P.mins != 0) largest_min = hn::Max(largest_min, hn::Abs(F16Row(at(g) + 32, s)));
      }
      unit = Unit(largest, inverse), min_unit = Unit(largest_min, min_inverse);
      for (index_t g = 0; g < groups; g += 2) {
        const std::byte* const second = g + 1 < groups ? at(g + 1) : nullptr;
        store(F16Pair(at(g), second, 0, s, inverse), to.scale[g / 2]);
        if constexpr (P.mins != 0) store(F16Pair(at(g), second, 32, s, min_inverse), to.min[g / 2]);
      }
    }
    hn::Store(hn::Mul(unit, hn::Set(d, static_cast<float>(1 << cut<F>))), d, to.unit[p] + s * lanes);
    hn::Store(hn::Mul(min_unit, hn::Set(d, 1.0f / 8)), d, to.min_unit[p] + s * lanes);  // Int8Columns::sums are in eighths
  }
}

template <Format F>
constexpr BlockFormat block_format() {
  if constexpr (!is_quantised(F)) return {};
  else {
    constexpr PanelBlock P = panel_block<F>;
    return {&Spread<F>, P.columns, P.bytes(), P.offset, cut<F>, P.groups == 16 ? Int8Kind::halves : P.mins != 0 ? Int8Kind::mins : Int8Kind::offset};
  }
}

/// Shifts by the same count in all lanes. From a vector of counts they leave the multiply units alone; other instruction sets have none.
HWY_INLINE VI ShiftedLeft(VI v, std::int32_t by) {
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3
  return hn::Shl(v, hn::Set(DI(), by));
#else
  return hn::ShiftLeftSame(v, by);
#endif
}
HWY_INLINE VI ShiftedRight(VI v, std::int32_t by) {
#if HWY_ARCH_X86 && HWY_TARGET <= HWY_AVX3
  return hn::Shr(v, hn::Set(DI(), by));
#else
  return hn::ShiftRightSame(v, by);
#endif
}

/// In each half of a lane, 16 bits: a b / 2^15, rounded.
HWY_INLINE VI ScaledHalves(VI a, VI b) {
  const DI di;
#if HWY_TARGET != HWY_SCALAR
  const hn::Repartition<std::int16_t, D> d16;
  return hn::BitCast(di, hn::MulFixedPoint15(hn::BitCast(d16, a), hn::BitCast(d16, b)));
#else
  const auto half = [&](int shift) {
    const auto of = [&](VI v) { return static_cast<std::int16_t>(static_cast<std::uint32_t>(hn::GetLane(v)) >> shift); };
    return static_cast<std::uint32_t>(static_cast<std::uint16_t>((of(a) * of(b) + 0x4000) >> 15)) << shift;
  };
  return hn::Set(di, static_cast<std::int32_t>(half(0) | half(16)));
#endif
}

/// Where the dot products of a row start, [2][8] for its halves of 32 columns, or [0] for groups of 32: at what takes the offset from the codes, and at half
/// of the unit that they are cut to, which rounds. Ties go up in one half of a pair and down in the other: with a cut of one bit they are half of all
/// sums, and where scales of W have one sign (q4_1, q4_K) they would add up to a third of what rounding the activations costs.
using Int8Start = std::int32_t[2][chunk / 32];

/// For some rows at once, ahead of their tiles: in each tile by itself it would stand in its way (4% of a tile of q4_0).
void Starts(const Int8Columns* x, const BlockFormat& f, index_t rows, Int8Start* to) {
  const hn::CappedTag<std::int32_t, 8> d;
  const hn::Rebind<std::int16_t, decltype(d)> d16;
  alignas(32) static constexpr std::int32_t odd[] = {0, 1, 0, 1, 0, 1, 0, 1};
  const auto unit = hn::Set(d, 1 << f.cut), offset = hn::Set(d, f.offset);
  for (index_t i = 0; i < rows; ++i)
    for (index_t g = 0; g < chunk / 32; g += static_cast<index_t>(hn::MaxLanes(d))) {
      const auto start = [&](auto sum, auto down) HWY_ATTR { return hn::Sub(hn::ShiftRight<1>(hn::Sub(unit, down)), hn::Mul(sum, offset)); };
      if (f.kind == Int8Kind::halves) {
        for (int h = 0; h < 2; ++h) hn::Store(start(hn::PromoteTo(d, hn::LoadU(d16, x[i].sum16[h] + g)), hn::Set(d, h)), d, to[i][h] + g);
      } else {
        hn::Store(start(hn::Load(d, x[i].sum32 + g), hn::Load(d, odd + g)), d, to[i][0] + g);
      }
    }
}

/// Dot products of `Fours` times four columns, from the `word`-th on.
template <int Fours, int MR>
HWY_INLINE void Int8Group(const Int8Columns* x, const Int8Chunk& w, index_t word, index_t s, VI (&dot)[MR][int8_panels]) {
  constexpr int NP = int8_panels;
  TINYLLAMA_UNROLL for (int j = 0; j < Fours; ++j) {
    VU c[NP];
    TINYLLAMA_UNROLL for (int p = 0; p < NP; ++p) Hold(c[p] = hn::Load(DU(), w.codes[word + j][p] + s * lanes));
    TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i) {
      const VU four = Four(x[i].codes + 4 * (word + j));
      TINYLLAMA_UNROLL for (int p = 0; p < NP; ++p) dot[i][p] = Dot4(dot[i][p], c[p], four);
    }
  }
}

/// to [MR, int8_panels x 16] = before (none: 0) + x [MR, 32 groups] w^T.
template <Int8Kind Kind, int MR>
HWY_NOINLINE void Int8Tile(const Int8Columns* x, const Int8Start* start, const Int8Chunk& w, const BlockFormat& f, index_t groups, const float* before, float* to,
                           index_t ld) {
  constexpr int NP = int8_panels;
  constexpr bool halves = Kind == Int8Kind::halves;
  const D d;
  const DI di;
  for (index_t s = 0; s < subs; ++s) {
    VI acc[MR][NP];
    TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i)
      TINYLLAMA_UNROLL for (int p = 0; p < NP; ++p) acc[i][p] = hn::Zero(di);
    for (index_t pair = 0; pair < (halves ? groups : (groups + 1) / 2); ++pair) {
      constexpr int fours = halves ? 4 : 8;
      VI upper[MR][NP], lower[MR][NP];
      TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i)
        TINYLLAMA_UNROLL for (int p = 0; p < NP; ++p) upper[i][p] = hn::Set(di, halves ? start[i][0][pair] : start[i][0][2 * pair]);
      Int8Group<fours>(x, w, 2 * fours * pair, s, upper);
      TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i)
        TINYLLAMA_UNROLL for (int p = 0; p < NP; ++p) {
          upper[i][p] = ShiftedLeft(upper[i][p], 16 - f.cut);
          lower[i][p] = hn::Set(di, halves ? start[i][1][pair] : start[i][0][2 * pair + 1]);
        }
      Int8Group<fours>(x, w, 2 * fours * pair + fours, s, lower);
      VI ratio[MR];  // two groups have one each, two halves share one
      TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i) {
        const std::int32_t two = x[i].ratios[halves ? pair / 2 : pair];
        ratio[i] = hn::Set(di, halves ? (pair % 2 ? two & 0xffff : two >> 16) * 0x10001 : two);
      }
      TINYLLAMA_UNROLL for (int p = 0; p < NP; ++p) {
        const VI scale = hn::Load(di, w.scale[pair][p] + s * lanes);
        TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i)
          acc[i][p] = Dot2(acc[i][p], ScaledHalves(UpperLower(upper[i][p], ShiftedRight(lower[i][p], f.cut)), ratio[i]), scale);
      }
    }
    V sum[MR][NP];
    TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i)
      TINYLLAMA_UNROLL for (int p = 0; p < NP; ++p) {
        sum[i][p] = before ? hn::Load(d, before + (i * NP + p) * panel_rows + s * lanes) : hn::Zero(d);
        sum[i][p] = hn::MulAdd(hn::ConvertTo(d, acc[i][p]), hn::Mul(hn::Load(d, w.unit[p] + s * lanes), hn::Set(d, x[i].scale)), sum[i][p]);
        acc[i][p] = hn::Zero(di);
      }
    if constexpr (Kind == Int8Kind::mins) {
      TINYLLAMA_UNROLL for (int q = 0; q < chunk / 64; ++q)
        TINYLLAMA_UNROLL for (int p = 0; p < NP; ++p) {
          const VI min = hn::Load(di, w.min[q][p] + s * lanes);
          TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i) acc[i][p] = Dot2(acc[i][p], hn::Set(di, x[i].sums[q]), min);
        }
      TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i)
        TINYLLAMA_UNROLL for (int p = 0; p < NP; ++p)
          sum[i][p] = hn::MulAdd(hn::ConvertTo(d, acc[i][p]), hn::Mul(hn::Load(d, w.min_unit[p] + s * lanes), hn::Set(d, x[i].scale)), sum[i][p]);
    }
    TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i)
      TINYLLAMA_UNROLL for (int p = 0; p < NP; ++p) hn::StoreU(sum[i][p], d, to + i * ld + p * panel_rows + s * lanes);
  }
}

template <int MR>
HWY_INLINE void Int8Rows(const Int8Columns* x, const Int8Start* start, const Int8Chunk& w, const BlockFormat& f, index_t groups, const float* before, float* to,
                         index_t ld) {
  if (f.kind == Int8Kind::halves) Int8Tile<Int8Kind::halves, MR>(x, start, w, f, groups, before, to, ld);
  else if (f.kind == Int8Kind::mins) Int8Tile<Int8Kind::mins, MR>(x, start, w, f, groups, before, to, ld);
  else Int8Tile<Int8Kind::offset, MR>(x, start, w, f, groups, before, to, ld);
}

void Int8Panels(const MatmulTask& t, const BlockFormat& f, index_t first, index_t last) {
  const index_t panel_bytes = t.k / f.columns * f.bytes;
  constexpr index_t width = int8_panels * panel_rows, most = 512;
  Int8Chunk w = {};
  // Sums over the chunks: the rows of y lie pages apart and would push each other out of L1.
  alignas(64) float sums[most * width];
  for (index_t row = 0; row < t.m; row += most)
    for (index_t p = first; p < last; p += int8_panels) {
      const index_t rows = t.m - row < most ? t.m - row : most, column = p * panel_rows, end = t.n < last * panel_rows ? t.n : last * panel_rows;
      const index_t columns = end - column < width ? end - column : width;
      float* y = t.y + row * t.ldy + column;
      for (index_t k0 = 0; k0 < t.k; k0 += chunk) {
        const index_t kc = t.k - k0 < chunk ? t.k - k0 : chunk;
        for (index_t i = 0; i < int8_panels && p + i < last; ++i)
          f.spread(t.w + (p + i) * panel_bytes + k0 / f.columns * f.bytes, kc, static_cast<int>(i), w);
        // What is spread next comes from memory meanwhile, one line of each panel for some rows.
        const std::byte* next = k0 + kc < t.k ? t.w + p * panel_bytes + (k0 + kc) / f.columns * f.bytes : t.w + (p + int8_panels) * panel_bytes;
        const index_t lines = (t.k - k0 - kc < chunk && k0 + kc < t.k ? t.k - k0 - kc : chunk) / f.columns * f.bytes / 64 + 1;
        const auto ask = [&](index_t line) {
          for (int i = 0; i < int8_panels; ++i) hwy::Prefetch(next + i * panel_bytes + line * 64);
        };
        const Int8Columns* x = t.x_columns + k0 / chunk * t.columns_stride + row;
        const bool done = k0 + kc == t.k && columns == width;
        float* to = done ? y : sums;
        const index_t ld = done ? t.ldy : width;
        alignas(64) Int8Start start[int8_ahead];
        index_t line = 0;
        for (index_t i0 = 0; i0 < rows; i0 += int8_ahead) {
          const index_t stop = rows - i0 < int8_ahead ? rows : i0 + int8_ahead;
          Starts(x + i0, f, stop - i0, start);
          for (index_t i = i0; i < stop;) {
            const index_t left = stop - i;
            const Int8Columns* rows_x = x + i;
            const Int8Start* rows_start = start + (i - i0);
            const float* before = k0 ? sums + i * width : nullptr;
            float* rows_to = to + i * ld;
            if (left >= int8_rows) {
              if (line < lines) ask(line++);
              Int8Rows<int8_rows>(rows_x, rows_start, w, f, kc / 32, before, rows_to, ld), i += int8_rows;
            } else if (left >= 2) {
              Int8Rows<2>(rows_x, rows_start, w, f, kc / 32, before, rows_to, ld), i += 2;
            } else {
              Int8Rows<1>(rows_x, rows_start, w, f, kc / 32, before, rows_to, ld), ++i;
            }
          }
        }
      }
      if (columns < width)
        for (index_t i = 0; i < rows; ++i)
          for (index_t c = 0; c < columns; ++c) y[i * t.ldy + c] = sums[i * width + c];
    }
}

void matmul_int8(const MatmulTask& t, index_t first, index_t last) {
  visit(t.format, [&]<Format F>() {
    if constexpr (is_quantised(F)) {
      if constexpr (stream_rows > 0)
        if (t.m <= stream_rows) return Int8StreamPanels<F>(t, first, last);
      constexpr BlockFormat format = block_format<F>();
      Int8Panels(t, format, first, last);
    }
  });
}

}  // namespace
}  // namespace TINYLLAMA_ISA
}  // namespace tinyllama
HWY_AFTER_NAMESPACE();
