// Products of many rows of activations with packed panels of block formats, in integers: tiles that all formats share.
//
// On Zen 5 every multiplication of a vector, of floats or integers, takes a slot of the dot products; shifts by vectors, logic, conversions and
// additions take none. So the dot products of two groups of W (32 columns that share a scale; 16 in q6_K), 8 instructions each, are cut to 16 bits and
// multiplied with both scales by one instruction, which adds them up over a chunk of 256 columns in 32 bits: 16 of 17 slots are dot products. The codes
// of W stay as they are; its scales become integers of 13 bits beside their largest in the chunk (those of q4_K, q5_K and q6_K are integers). What is cut
// off, half of 2^-15 of the largest that a dot product can be, is far below what rounding the activations to 8 bits costs it. The scales of the
// activations within a chunk differ by powers of two (Int8Columns), by which the cutting shifts go further.

#include "tinyllama/kernels/cpu/isa-inl.h"

#include <cstring>

TINYLLAMA_BEFORE_NAMESPACE();
namespace tinyllama {
namespace TINYLLAMA_ISA {
namespace {

inline constexpr index_t chunk = int8_columns;  // 16 KB of codes for a tile's panels, which stay in L1

// Rows of X and panels of W that a tile holds. 3 x 4 panels reached 93% of the int8 peak (Zen 5), 4 x 3 91%, 6 x 2 91%.
inline constexpr int int8_rows = lanes == 16 ? 3 : 4, int8_panels = lanes == 16 ? 4 : 1;

/// 256 columns of a tile's panels: w = unit scale (code - offset) + min_unit min, scales and minima in pairs of 16 bits, the first of two groups on top.
struct Int8Chunk {
  alignas(64) std::uint32_t codes[chunk / 4][int8_panels][panel_rows];  // four columns of a row
  alignas(64) std::int32_t scale[chunk / 32][int8_panels][panel_rows];  // of 16 columns each; the first half where groups have 32
  alignas(64) std::int32_t min[chunk / 64][int8_panels][panel_rows];
  alignas(64) float unit[int8_panels][panel_rows], min_unit[int8_panels][panel_rows];
};

/// Groups of different scales in 32 columns, and the bits by which a group's dot product is longer than 16.
template <Format F>
inline constexpr int halves = panel_block<F>.groups == 16 ? 2 : 1;
template <Format F>
inline constexpr int cut = [] {
  constexpr PanelBlock P = panel_block<F>;
  constexpr int largest = (P.offset ? P.offset : (1 << P.bits) - 1) * 127 * 32 / halves<F>;
  constexpr int bits = largest < 1 << 15 ? 0 : largest < 1 << 16 ? 1 : largest < 1 << 17 ? 2 : 4;
  static_assert(largest >> bits <= 32512);
  return bits;
}();

/// What a format's panels look like to the code that all formats share.
struct BlockFormat {
  void (*spread)(const std::byte*, index_t, int, Int8Chunk&) = nullptr;
  int columns = 1, bytes = 0, halves = 1, offset = 0, cut = 0;
  bool mins = false;
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
    hn::Store(hn::Mul(min_unit, hn::Set(d, 1.0f / 8)), d, to.min_unit[p] + s * lanes);  // Int8Columns::sum is in eighths
  }
}

template <Format F>
constexpr BlockFormat block_format() {
  if constexpr (!is_quantised(F)) return {};
  else return {&Spread<F>, panel_block<F>.columns, panel_block<F>.bytes(), halves<F>, panel_block<F>.offset, cut<F>, panel_block<F>.mins != 0};
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

/// For the rows of a tile, how each sum of a pair (0: the one that becomes the upper 16 bits) is computed. `start`: what takes the offset from the codes,
/// and what rounds where bits are shifted out. Between the 16 columns of one scale of X and the next, shifts `up` and `down` to the unit of these; `by`: to
/// the pair's half. Ties go up in one half and down in the other: with a cut of one bit they are half of all sums, and where scales of W
/// have one sign (q4_1, q4_K) they would add up to a third of what rounding the activations costs.
template <int MR>
struct Int8Steps {
  static constexpr int groups = chunk / 32;
  alignas(32) std::int32_t start[MR][2][groups], by[MR][2][groups], up[MR][groups], down[MR][groups];
};

/// Groups of 32 columns: a pair is two of them, [0] and [1] their own; of 16: a pair is the two halves of 32.
template <int MR, int Halves>
HWY_INLINE void Plan(const Int8Columns* x, const BlockFormat& f, Int8Steps<MR>& to) {
  constexpr index_t groups = chunk / 32;
  const hn::CappedTag<std::int32_t, 8> d;
  const hn::Rebind<std::int8_t, decltype(d)> d8;
  const hn::Rebind<std::int16_t, decltype(d)> d16;
  const auto one = hn::Set(d, 1), cut = hn::Set(d, f.cut), offset = hn::Set(d, f.offset), all = hn::Set(d, 16);
  for (int i = 0; i < MR; ++i)
    for (index_t g = 0; g < groups; g += static_cast<index_t>(hn::MaxLanes(d))) {
      const auto first = hn::Add(hn::PromoteTo(d, hn::LoadU(d8, x[i].shift[0] + g)), cut), last = hn::Add(hn::PromoteTo(d, hn::LoadU(d8, x[i].shift[1] + g)), cut);
      const auto half = [&](auto shift) HWY_ATTR { return hn::ShiftRight<1>(hn::Shl(one, shift)); };
      const auto half_down = [&](auto shift) HWY_ATTR { return hn::ShiftRight<1>(hn::Sub(hn::Shl(one, shift), one)); };
      if constexpr (Halves == 2) {
        const auto sum = [&](int h) HWY_ATTR { return hn::Mul(hn::PromoteTo(d, hn::LoadU(d16, x[i].sum16[h] + g)), offset); };
        hn::Store(hn::Sub(half(first), sum(0)), d, to.start[i][0] + g);
        hn::Store(hn::Sub(half_down(last), sum(1)), d, to.start[i][1] + g);
        hn::Store(hn::Sub(all, first), d, to.by[i][0] + g);
        hn::Store(last, d, to.by[i][1] + g);
      } else {
        const auto change = hn::Sub(last, first), up = hn::Max(change, hn::Zero(d)), down = hn::Sub(up, change);
        const auto fine = hn::Sub(hn::Add(cut, hn::Set(d, int8_shifts)), first);
        const auto start = hn::Sub(half(down), hn::Shr(hn::Mul(hn::LoadU(d, x[i].sum32 + g), offset), fine));
        hn::Store(up, d, to.up[i] + g);
        hn::Store(down, d, to.down[i] + g);
        hn::Store(hn::Add(start, half(first)), d, to.start[i][0] + g);
        hn::Store(hn::Add(start, half_down(first)), d, to.start[i][1] + g);
        hn::Store(hn::Sub(all, last), d, to.by[i][0] + g);
        hn::Store(last, d, to.by[i][1] + g);
      }
    }
}

/// dot += codes of 16 columns, from the `word`-th four on.
template <int MR>
HWY_INLINE void Int8Sixteen(const Int8Columns* x, const Int8Chunk& w, index_t word, index_t s, VI (&dot)[MR][int8_panels]) {
  constexpr int NP = int8_panels;
  TINYLLAMA_UNROLL for (int j = 0; j < 4; ++j) {
    VU c[NP];
    TINYLLAMA_UNROLL for (int p = 0; p < NP; ++p) Hold(c[p] = hn::Load(DU(), w.codes[word + j][p] + s * lanes));
    TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i) {
      const VU four = Four(x[i].codes + 4 * (word + j));
      TINYLLAMA_UNROLL for (int p = 0; p < NP; ++p) dot[i][p] = Dot4(dot[i][p], c[p], four);
    }
  }
}

/// Sums of one group of a pair, before they are shifted to its half; g: the 32 columns.
template <int MR, int Halves>
HWY_INLINE void Int8Group(const Int8Columns* x, const Int8Chunk& w, const Int8Steps<MR>& steps, index_t g, int half, index_t s, VI (&dot)[MR][int8_panels]) {
  constexpr int NP = int8_panels;
  TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i)
    TINYLLAMA_UNROLL for (int p = 0; p < NP; ++p) dot[i][p] = hn::Set(DI(), steps.start[i][half][g]);
  if constexpr (Halves == 2) return Int8Sixteen<MR>(x, w, 8 * g + 4 * half, s, dot);
  Int8Sixteen<MR>(x, w, 8 * g, s, dot);
  TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i)
    TINYLLAMA_UNROLL for (int p = 0; p < NP; ++p) dot[i][p] = ShiftedRight(ShiftedLeft(dot[i][p], steps.up[i][g]), steps.down[i][g]);
  Int8Sixteen<MR>(x, w, 8 * g + 4, s, dot);
}

/// to [MR, int8_panels x 16] = before (none: 0) + x [MR, 32 groups] w^T; Halves: the scales of W that 32 columns have.
template <int MR, int Halves>
HWY_NOINLINE void Int8Tile(const Int8Columns* x, const Int8Chunk& w, const BlockFormat& f, index_t groups, const float* before, float* to, index_t ld) {
  constexpr int NP = int8_panels;
  const D d;
  const DI di;
  Int8Steps<MR> steps;
  Plan<MR, Halves>(x, f, steps);
  for (index_t s = 0; s < subs; ++s) {
    VI acc[MR][NP];
    TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i)
      TINYLLAMA_UNROLL for (int p = 0; p < NP; ++p) acc[i][p] = hn::Zero(di);
    for (index_t pair = 0; pair < (groups * Halves + 1) / 2; ++pair) {
      const index_t g0 = Halves == 2 ? pair : 2 * pair, g1 = Halves == 2 ? pair : 2 * pair + 1;
      VI high[MR][NP], low[MR][NP];
      Int8Group<MR, Halves>(x, w, steps, g0, 0, s, high);
      TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i)
        TINYLLAMA_UNROLL for (int p = 0; p < NP; ++p) high[i][p] = ShiftedLeft(high[i][p], steps.by[i][0][g0]);
      Int8Group<MR, Halves>(x, w, steps, g1, 1, s, low);
      TINYLLAMA_UNROLL for (int p = 0; p < NP; ++p) {
        const VI scale = hn::Load(di, w.scale[pair][p] + s * lanes);
        TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i)
          acc[i][p] = Dot2(acc[i][p], UpperLower(high[i][p], ShiftedRight(low[i][p], steps.by[i][1][g1])), scale);
      }
    }
    TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i)
      TINYLLAMA_UNROLL for (int p = 0; p < NP; ++p) {
        const index_t column = p * panel_rows + s * lanes;
        const V scale = hn::Set(d, x[i].scale);
        V sum = before ? hn::Load(d, before + i * NP * panel_rows + column) : hn::Zero(d);
        sum = hn::MulAdd(hn::ConvertTo(d, acc[i][p]), hn::Mul(hn::Load(d, w.unit[p] + s * lanes), scale), sum);
        if (f.mins) {
          VI min = hn::Zero(di);
          for (index_t q = 0; q < chunk / 64; ++q) {
            const std::uint32_t two = static_cast<std::uint16_t>(x[i].sum[2 * q]) << 16 | static_cast<std::uint16_t>(x[i].sum[2 * q + 1]);
            min = Dot2(min, hn::Load(di, w.min[q][p] + s * lanes), hn::Set(di, static_cast<std::int32_t>(two)));
          }
          sum = hn::MulAdd(hn::ConvertTo(d, min), hn::Mul(hn::Load(d, w.min_unit[p] + s * lanes), scale), sum);
        }
        hn::StoreU(sum, d, to + i * ld + column);
      }
  }
}

template <int MR>
HWY_INLINE void Int8Rows(const Int8Columns* x, const Int8Chunk& w, const BlockFormat& f, index_t columns, const float* before, float* to, index_t ld) {
  if (f.halves == 2) Int8Tile<MR, 2>(x, w, f, columns / 32, before, to, ld);
  else Int8Tile<MR, 1>(x, w, f, columns / 32, before, to, ld);
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
        const Int8Columns* x = t.x_columns + k0 / chunk * t.m + row;
        const bool done = k0 + kc == t.k && columns == width;
        float* to = done ? y : sums;
        const index_t ld = done ? t.ldy : width;
        index_t i = 0, line = 0;
        for (; i + int8_rows <= rows; i += int8_rows) {
          if (line < lines) ask(line++);
          Int8Rows<int8_rows>(x + i, w, f, kc, k0 ? sums + i * width : nullptr, to + i * ld, ld);
        }
        for (; i + 2 <= rows; i += 2) Int8Rows<2>(x + i, w, f, kc, k0 ? sums + i * width : nullptr, to + i * ld, ld);
        for (; i < rows; ++i) Int8Rows<1>(x + i, w, f, kc, k0 ? sums + i * width : nullptr, to + i * ld, ld);
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
