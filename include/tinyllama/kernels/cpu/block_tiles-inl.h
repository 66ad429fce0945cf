// Products of many rows of activations with packed panels of block formats, in integers: tiles that all formats share.
//
// Scaling each 32 columns by themselves costs a multiply unit as much as 2 of their 8 dot products (80% of the peak are left, 73% where there is a
// minimum too, 67% for 16 columns). So a chunk of 256 columns of W is brought to codes of 8 bits with one scale a row first, and the activations' scales
// of 32 columns within it differ by powers of two (Int8Columns): a shift and an addition of integers, which run beside the dot products, and one product
// of floats a chunk. Rounding a weight again adds at most half of its row's largest in the chunk over 127.

#include "tinyllama/kernels/cpu/isa-inl.h"

#include <cstring>

TINYLLAMA_BEFORE_NAMESPACE();
namespace tinyllama {
namespace TINYLLAMA_ISA {
namespace {

inline constexpr index_t chunk = int8_columns;  // 16 KB of codes for a tile's panels, which stay in L1

// Rows of X and panels of W that a tile holds. 3 x 4 panels reached 93% of the int8 peak (Zen 5), 4 x 3 91%, 6 x 2 91%.
inline constexpr int int8_rows = lanes == 16 ? 3 : 4, int8_panels = lanes == 16 ? 4 : 1;

/// 256 columns of a tile's panels: w = scale (code - 128).
struct Int8Chunk {
  alignas(64) std::uint32_t codes[chunk / 4][int8_panels][panel_rows];  // four columns of a row
  alignas(64) float scale[int8_panels][panel_rows];
};

/// In each half of a lane: a b / 2^15, rounded, plus c; in 16 bits.
HWY_INLINE VU ScaledHalves(VU a, VU b, VU c) {
  const DU du;
#if HWY_TARGET != HWY_SCALAR
  const hn::Repartition<std::int16_t, D> d16;
  return hn::BitCast(du, hn::Add(hn::MulFixedPoint15(hn::BitCast(d16, a), hn::BitCast(d16, b)), hn::BitCast(d16, c)));
#else
  const auto half = [&](int shift) {
    const auto of = [&](VU v) { return static_cast<std::int16_t>(hn::GetLane(v) >> shift); };
    return static_cast<std::uint32_t>(static_cast<std::uint16_t>(((of(a) * of(b) + 0x4000) >> 15) + of(c))) << shift;
  };
  return hn::Set(du, half(0) | half(16));
#endif
}

/// Columns [0, columns) of one panel to its place p among a tile's. In units of 1/128 of the new step, a weight is (code - centre) times the ratio of
/// its scale to the new one, by a product of 16 bits, plus what lies at the centre of its codes.
template <Format F>
void Requantise(const std::byte* block, index_t columns, int p, Int8Chunk& to) {
  constexpr PanelBlock P = panel_block<F>;
  constexpr int halves = P.groups == 16 ? 2 : 1, per_block = P.columns / 32;
  constexpr float centre = 1 << (P.bits - 1), last = (1 << P.bits) - 1;
  static_assert(P.offset == 0 || P.offset == centre);
  const D d;
  const DU du;
  const auto at = [&](index_t g) { return block + g / per_block * P.bytes(); };
  for (index_t s = 0; s < subs; ++s) {
    V largest = hn::Zero(d);
    for (index_t g = 0; g < columns / 32; ++g)
      for (int h = 0; h < halves; ++h) {
        V scale, min;
        Scales<F>(at(g), static_cast<int>(g % per_block), h, s, scale, min);
        if constexpr (P.offset == 128) largest = hn::Max(largest, hn::Abs(hn::Mul(scale, hn::Set(d, 127.0f))));  // encoders leave out -128
        else if constexpr (P.offset != 0) largest = hn::Max(largest, hn::Abs(min));
        else largest = hn::Max(largest, hn::Max(hn::Abs(min), hn::Abs(hn::MulAdd(scale, hn::Set(d, last), min))));
      }
    hn::Store(hn::Mul(largest, hn::Set(d, 1.0f / 127.0f)), d, to.scale[p] + s * lanes);
    const V inverse = hn::IfThenElseZero(hn::Gt(largest, hn::Zero(d)), hn::Div(hn::Set(d, 127.0f), largest));
    for (index_t g = 0; g < columns / 32; ++g) {
      const int b = static_cast<int>(g % per_block);
      VU c[8], factor[halves], term[halves];
      Unpack<P.bits>(at(g) + P.header_bytes() + b * P.code_bytes(), s, c);
      const auto pair = [&](V v) HWY_ATTR {
        const VU u = hn::BitCast(du, hn::NearestInt(v));
        return hn::Or(hn::ShiftLeft<16>(u), hn::And(u, hn::Set(du, 0xffff)));
      };
      TINYLLAMA_UNROLL for (int h = 0; h < halves; ++h) {
        V scale, min;
        Scales<F>(at(g), b, h, s, scale, min);
        factor[h] = pair(hn::Mul(hn::Mul(scale, inverse), hn::Set(d, 128 * centre)));
        const V zero = hn::Set(d, 128.0f * 128 + 64);
        if constexpr (P.offset != 0) term[h] = pair(zero);
        else term[h] = pair(hn::MulAdd(hn::Mul(hn::MulAdd(scale, hn::Set(d, centre), min), inverse), hn::Set(d, 128.0f), zero));
      }
      const VU odd = hn::Set(du, 0xff00ff00u), middle = hn::Set(du, 0x80008000u);
      TINYLLAMA_UNROLL for (int j = 0; j < 8; ++j) {
        const int h = j * halves / 8;
        const VU low = ScaledHalves(hn::Xor(hn::ShiftLeft<16 - P.bits>(hn::AndNot(odd, c[j])), middle), factor[h], term[h]);
        const VU high = ScaledHalves(hn::Xor(hn::ShiftLeft<8 - P.bits>(hn::And(c[j], odd)), middle), factor[h], term[h]);
        hn::Store(hn::Or(hn::And(odd, hn::ShiftLeft<1>(high)), hn::AndNot(odd, hn::ShiftRight<7>(low))), du, to.codes[8 * g + j][p] + s * lanes);
      }
    }
  }
}

// to [MR, int8_panels x 16] = before (none: 0) + x [MR, 32 groups] w^T
template <int MR>
HWY_NOINLINE void Int8Tile(const Int8Columns* x, const Int8Chunk& w, index_t groups, const float* before, float* to, index_t ld) {
  constexpr int NP = int8_panels;
  const D d;
  const DI di;
  for (index_t s = 0; s < subs; ++s) {
    VI acc[MR][NP];
    TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i)
      TINYLLAMA_UNROLL for (int p = 0; p < NP; ++p) acc[i][p] = hn::Zero(di);
    for (index_t g = 0; g < groups; ++g) {
      VI dot[MR][NP];
      TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i)
        TINYLLAMA_UNROLL for (int p = 0; p < NP; ++p) dot[i][p] = hn::Set(di, x[i].correction[g]);
      TINYLLAMA_UNROLL for (int j = 0; j < 8; ++j) {
        VU c[NP];
        TINYLLAMA_UNROLL for (int p = 0; p < NP; ++p) Hold(c[p] = hn::Load(DU(), w.codes[8 * g + j][p] + s * lanes));
        TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i) {
          const VU four = Four(x[i].codes + 32 * g + 4 * j);
          TINYLLAMA_UNROLL for (int p = 0; p < NP; ++p) dot[i][p] = Dot4(dot[i][p], c[p], four);
        }
      }
      TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i) {
        const VI shift = hn::Set(di, x[i].shift[g]);
        TINYLLAMA_UNROLL for (int p = 0; p < NP; ++p) acc[i][p] = hn::Add(acc[i][p], hn::Shl(dot[i][p], shift));
      }
    }
    TINYLLAMA_UNROLL for (int i = 0; i < MR; ++i)
      TINYLLAMA_UNROLL for (int p = 0; p < NP; ++p) {
        const V by = hn::Mul(hn::Load(d, w.scale[p] + s * lanes), hn::Set(d, x[i].scale));
        const index_t column = p * panel_rows + s * lanes;
        const V sum = before ? hn::Load(d, before + i * NP * panel_rows + column) : hn::Zero(d);
        hn::StoreU(hn::MulAdd(hn::ConvertTo(d, acc[i][p]), by, sum), d, to + i * ld + column);
      }
  }
}

/// What a format's panels look like to the code that all formats share.
struct BlockFormat {
  void (*requantise)(const std::byte*, index_t, int, Int8Chunk&) = nullptr;
  int columns = 1, bytes = 0;
};
template <Format F>
constexpr BlockFormat block_format() {
  if constexpr (!is_quantised(F)) return {};
  else return {&Requantise<F>, panel_block<F>.columns, panel_block<F>.bytes()};
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
          f.requantise(t.w + (p + i) * panel_bytes + k0 / f.columns * f.bytes, kc, static_cast<int>(i), w);
        // What is requantised next comes from memory meanwhile, one line of each panel for some rows.
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
          Int8Tile<int8_rows>(x + i, w, kc / 32, k0 ? sums + i * width : nullptr, to + i * ld, ld);
        }
        for (; i + 2 <= rows; i += 2) Int8Tile<2>(x + i, w, kc / 32, k0 ? sums + i * width : nullptr, to + i * ld, ld);
        for (; i < rows; ++i) Int8Tile<1>(x + i, w, kc / 32, k0 ? sums + i * width : nullptr, to + i * ld, ld);
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
      Int8Panels(t, block_format<F>(), first, last);
    }
  });
}

}  // namespace
}  // namespace TINYLLAMA_ISA
}  // namespace tinyllama
HWY_AFTER_NAMESPACE();
