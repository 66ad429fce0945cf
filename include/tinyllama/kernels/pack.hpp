// The order in which the CPU kernels read a weight matrix: panels of 16 rows, built once at load.
//
// A panel holds 16 rows of W [N, K] side by side, so that one vector lane works for one row and no sum runs across lanes. The layouts do
// not depend on the instruction set. Rows past N and columns past K are zero.
//   f32, f16  [K][16]                  bf16  [K/2][16][2]: pairs along k, as the bf16 dot product wants them
//   blocks    codes of 32 columns as 8 groups of [16 rows][4 columns] bytes, as the int8 dot product wants them, unsigned:
//     8 bits  8 x 64 bytes, code + 128
//     4 bits  4 x 64 bytes, low nibble column c, high nibble column c + 16
//     5 bits  the same, then 64 bytes: bit j of byte [row][i] is bit 4 of column 4 j + i
//     6 bits  the same, then 2 x 64 bytes: bits 2 j, 2 j + 1 of byte [h][row][i] are bits 4, 5 of column 16 h + 4 j + i
// Scales stand before the codes of their block, each as 16 rows side by side.
#pragma once

#include <cstring>

#include "tinyllama/quant/blocks.hpp"

namespace tinyllama {

inline constexpr index_t panel_rows = 16;

/// Where things lie in a panel's block: a block is 32 or 256 columns of 16 rows.
struct PanelBlock {
  int columns = 1;          // columns of a block
  int bits = 0;             // of a code
  int mins = 0;             // q4_1, q5_1: an f16 minimum a row; q4_K, q5_K: dmin and 8 mins
  int groups = 1;           // scales a row: 1, 8 (q4_K, q5_K: u8) or 16 (q6_K: i8)
  int offset = 0;           // what is taken from a code: w = scale (code - offset) [- or + min]
  constexpr int code_bytes() const { return 2 * 32 * bits; }                 // of 32 columns
  constexpr int header_bytes() const { return 32 + 32 * mins + (groups > 1 ? 16 * groups * (1 + mins) : 0); }
  constexpr int bytes() const { return header_bytes() + code_bytes() * (columns / 32); }
};

template <Format F>
inline constexpr PanelBlock panel_block = {};
template <> inline constexpr PanelBlock panel_block<Format::q8_0> = {32, 8, 0, 1, 128};
template <> inline constexpr PanelBlock panel_block<Format::q4_0> = {32, 4, 0, 1, 8};
template <> inline constexpr PanelBlock panel_block<Format::q4_1> = {32, 4, 1, 1, 0};
template <> inline constexpr PanelBlock panel_block<Format::q5_0> = {32, 5, 0, 1, 16};
template <> inline constexpr PanelBlock panel_block<Format::q5_1> = {32, 5, 1, 1, 0};
template <> inline constexpr PanelBlock panel_block<Format::q4_K> = {256, 4, 1, 8, 0};
template <> inline constexpr PanelBlock panel_block<Format::q5_K> = {256, 5, 1, 8, 0};
template <> inline constexpr PanelBlock panel_block<Format::q6_K> = {256, 6, 0, 16, 32};

/// Bytes of one panel of `columns` columns.
template <Format F>
constexpr std::size_t panel_bytes(index_t columns) {
  if constexpr (is_quantised(F))
    return static_cast<std::size_t>(columns / panel_block<F>.columns) * static_cast<std::size_t>(panel_block<F>.bytes());
  else
    return static_cast<std::size_t>(columns + columns % 2) * static_cast<std::size_t>(panel_rows) * sizeof(Block<F>);
}
constexpr std::size_t panel_bytes(Format f, index_t columns) {
  return visit(f, [&]<Format F>() { return panel_bytes<F>(columns); });
}
constexpr std::size_t packed_bytes(Format f, index_t rows, index_t columns) {
  return static_cast<std::size_t>((rows + panel_rows - 1) / panel_rows) * panel_bytes(f, columns);
}

namespace detail {

template <class T>
inline void put(std::byte* at, index_t i, T v) { std::memcpy(at + i * static_cast<index_t>(sizeof(T)), &v, sizeof(T)); }
template <class T>
inline T get(const std::byte* at, index_t i) {
  T v;
  std::memcpy(&v, at + i * static_cast<index_t>(sizeof(T)), sizeof(T));
  return v;
}
inline std::uint32_t four(const void* bytes, int i) {
  std::uint32_t u;
  std::memcpy(&u, static_cast<const std::byte*>(bytes) + 4 * i, 4);
  return u;
}

/// The unsigned codes of group g (32 weights) of a block, four in a word.
template <Format F>
inline void group_codes(const Block<F>& b, int g, std::uint32_t (&w)[8]) {
  constexpr std::uint32_t nibble = 0x0f0f0f0f, bit = 0x01010101, two = 0x03030303;
  for (int j = 0; j < 8; ++j) {
    if constexpr (F == Format::q8_0) {
      w[j] = four(b.qs, j) ^ 0x80808080u;
    } else if constexpr (F == Format::q4_K || F == Format::q5_K) {
      w[j] = (four(b.qs, g / 2 * 8 + j) >> (g % 2 * 4)) & nibble;
      if constexpr (F == Format::q5_K) w[j] |= ((four(b.qh, j) >> g) & bit) << 4;
    } else if constexpr (F == Format::q6_K) {
      const int half = g / 4, quarter = g % 4;
      w[j] = (four(b.ql, half * 16 + quarter % 2 * 8 + j) >> (quarter / 2 * 4)) & nibble;
      w[j] |= ((four(b.qh, half * 8 + j) >> (quarter * 2)) & two) << 4;
    } else {
      w[j] = (four(b.qs, j % 4) >> (j / 4 * 4)) & nibble;
      // The factor moves bit i of four to bit 8 i.
      if constexpr (F == Format::q5_0 || F == Format::q5_1) w[j] |= ((((four(b.qh, 0) >> (4 * j)) & 15u) * 0x00204081u) & bit) << 4;
    }
  }
}

/// Puts the codes of 32 columns of row r to their places in a panel.
template <int Bits>
inline void put_codes(std::byte* codes, int r, const std::uint32_t (&w)[8]) {
  const auto to = [&](int word, std::uint32_t v) { put(codes, word * 16 + r, v); };
  if constexpr (Bits == 8)
    for (int j = 0; j < 8; ++j) to(j, w[j]);
  else
    for (int j = 0; j < 4; ++j) to(j, (w[j] & 0x0f0f0f0fu) | (w[j + 4] & 0x0f0f0f0fu) << 4);
  if constexpr (Bits == 5) {
    std::uint32_t high = 0;
    for (int j = 0; j < 8; ++j) high |= ((w[j] >> 4) & 0x01010101u) << j;
    to(4, high);
  }
  if constexpr (Bits == 6)
    for (int h = 0; h < 2; ++h) {
      std::uint32_t high = 0;
      for (int j = 0; j < 4; ++j) high |= ((w[4 * h + j] >> 4) & 0x03030303u) << (2 * j);
      to(4 + h, high);
    }
}

template <int Bits>
inline unsigned get_code(const std::byte* codes, int r, int c) {
  const auto* u = reinterpret_cast<const std::uint8_t*>(codes);
  const int i = c % 4, j = c / 4;
  if constexpr (Bits == 8) return u[j * 64 + r * 4 + i];
  unsigned q = (u[j % 4 * 64 + r * 4 + i] >> (j / 4 * 4)) & 15u;
  if constexpr (Bits == 5) q |= ((u[256 + r * 4 + i] >> j) & 1u) << 4;
  if constexpr (Bits == 6) q |= ((u[256 + j / 4 * 64 + r * 4 + i] >> (j % 4 * 2)) & 3u) << 4;
  return q;
}

}  // namespace detail

/// Packs `count` (1..16) rows of `columns` weights, `stride` bytes apart, into one panel.
template <Format F>
void pack_panel(const std::byte* rows, std::size_t stride, int count, index_t columns, std::byte* panel) {
  if (count < panel_rows || columns % 2) std::memset(panel, 0, panel_bytes<F>(columns));
  if constexpr (F == Format::bf16) {
    for (index_t pair = 0; pair < columns / 2; ++pair)
      for (int r = 0; r < count; ++r) detail::put(panel, pair * 16 + r, detail::get<std::uint32_t>(rows + static_cast<std::size_t>(r) * stride, pair));
    if (columns % 2)
      for (int r = 0; r < count; ++r) detail::put(panel, columns / 2 * 32 + r * 2, detail::get<bf16>(rows + static_cast<std::size_t>(r) * stride, columns - 1));
  } else if constexpr (!is_quantised(F)) {
    for (index_t k = 0; k < columns; ++k)
      for (int r = 0; r < count; ++r) detail::put(panel, k * 16 + r, detail::get<Block<F>>(rows + static_cast<std::size_t>(r) * stride, k));
  } else {
    for (int r = 0; r < count; ++r) {
      const std::byte* row = rows + static_cast<std::size_t>(r) * stride;
      constexpr PanelBlock P = panel_block<F>;
      for (index_t n = 0; n < columns / P.columns; ++n) {
        const auto b = detail::get<Block<F>>(row, n);
        std::byte* at = panel + n * P.bytes();
        detail::put(at, r, b.d);
        if constexpr (F == Format::q4_1 || F == Format::q5_1) detail::put(at + 32, r, b.m);
        if constexpr (F == Format::q4_K || F == Format::q5_K) {
          detail::put(at + 32, r, b.dmin);
          for (int g = 0; g < 8; ++g) {
            const ScaleMin s = k_scale_min(b.scales, g);
            at[64 + g * 16 + r] = static_cast<std::byte>(s.scale);
            at[64 + 128 + g * 16 + r] = static_cast<std::byte>(s.min);
          }
        }
        if constexpr (F == Format::q6_K)
          for (int g = 0; g < 16; ++g) at[32 + g * 16 + r] = static_cast<std::byte>(b.scales[g]);
        for (int g = 0; g < P.columns / 32; ++g) {
          std::uint32_t codes[8];
          detail::group_codes<F>(b, g, codes);
          detail::put_codes<P.bits>(at + P.header_bytes() + g * P.code_bytes(), r, codes);
        }
      }
    }
  }
}

/// Row `r` (0..15) of a panel as floats: the look-up in a packed embedding, and the oracle of the layout.
template <Format F>
void unpack_row(const std::byte* panel, int r, index_t columns, float* out) {
  if constexpr (!is_quantised(F)) {
    for (index_t k = 0; k < columns; ++k)
      out[k] = static_cast<float>(detail::get<Block<F>>(panel, F == Format::bf16 ? k / 2 * 32 + r * 2 + k % 2 : k * 16 + r));
  } else {
    constexpr PanelBlock P = panel_block<F>;
    for (index_t n = 0; n < columns / P.columns; ++n) {
      const std::byte* at = panel + n * P.bytes();
      const float d = detail::get<f16>(at, r);
      const float m = P.mins ? static_cast<float>(detail::get<f16>(at + 32, r)) : 0.0f;
      for (int k = 0; k < P.columns; ++k) {
        const auto q = static_cast<int>(detail::get_code<P.bits>(at + P.header_bytes() + k / 32 * P.code_bytes(), r, k % 32));
        float scale = d, min = m;
        if constexpr (P.groups == 8) {
          scale = d * static_cast<float>(std::to_integer<int>(at[64 + k / 32 * 16 + r]));
          min = -m * static_cast<float>(std::to_integer<int>(at[64 + 128 + k / 32 * 16 + r]));
        }
        if constexpr (P.groups == 16) scale = d * static_cast<float>(static_cast<std::int8_t>(at[32 + k / 16 * 16 + r]));
        out[n * P.columns + k] = scale * static_cast<float>(q - P.offset) + min;
      }
    }
  }
}

}  // namespace tinyllama
