// The bytes of each block format, as they lie in a GGUF file (little-endian; the layouts are ggml's).
#pragma once

#include <cstdint>

#include "tinyllama/tensor/dtype.hpp"

namespace tinyllama {

// Weights of a block are numbered k = 0..31 (or 0..255). d and m are scales, q the integer code of weight k.
struct block_q8_0 { f16 d; std::int8_t qs[32]; };                       // w = d q
struct block_q4_0 { f16 d; std::uint8_t qs[16]; };                      // w = d (q - 8);  qs[j]: low nibble k = j, high nibble k = j + 16
struct block_q4_1 { f16 d, m; std::uint8_t qs[16]; };                   // w = d q + m
struct block_q5_0 { f16 d; std::uint8_t qh[4], qs[16]; };               // w = d (q - 16); bit k of the 32-bit qh is bit 4 of q
struct block_q5_1 { f16 d, m; std::uint8_t qh[4], qs[16]; };            // w = d q + m
// 256 weights in 8 groups of 32: w = d scale_g q - dmin min_g, the 6-bit scales and mins packed in 12 bytes.
struct block_q4_K { f16 d, dmin; std::uint8_t scales[12], qs[128]; };   // qs[32 j + i]: low nibble group 2j, high nibble group 2j + 1
struct block_q5_K { f16 d, dmin; std::uint8_t scales[12], qh[32], qs[128]; };  // bit g of qh[i] is bit 4 of weight i of group g
// 256 weights in 16 groups of 16: w = d scale_g (q - 32).
struct block_q6_K { std::uint8_t ql[128], qh[64]; std::int8_t scales[16]; f16 d; };

template <Format F> struct block_of;
template <> struct block_of<Format::f32> { using type = float; };
template <> struct block_of<Format::f16> { using type = f16; };
template <> struct block_of<Format::bf16> { using type = bf16; };
template <> struct block_of<Format::q8_0> { using type = block_q8_0; };
template <> struct block_of<Format::q4_0> { using type = block_q4_0; };
template <> struct block_of<Format::q4_1> { using type = block_q4_1; };
template <> struct block_of<Format::q5_0> { using type = block_q5_0; };
template <> struct block_of<Format::q5_1> { using type = block_q5_1; };
template <> struct block_of<Format::q4_K> { using type = block_q4_K; };
template <> struct block_of<Format::q5_K> { using type = block_q5_K; };
template <> struct block_of<Format::q6_K> { using type = block_q6_K; };
template <> struct block_of<Format::f8_e4m3> { using type = e4m3; };

template <Format F>
using Block = typename block_of<F>::type;

/// How a block becomes floats and back: `decode(const Block<F>&, float* out)` and `encode(const float* in, Block<F>&)`, each of
/// `info(F).block` elements. One specialisation a format, in the file of its family; quant/codec_rows.hpp has them all.
template <Format F>
struct Codec;

namespace detail {
template <Format F>
constexpr bool block_size_agrees = sizeof(Block<F>) == static_cast<std::size_t>(info(F).bytes);
}
static_assert(detail::block_size_agrees<Format::q8_0> && detail::block_size_agrees<Format::q4_0> && detail::block_size_agrees<Format::q4_1> &&
              detail::block_size_agrees<Format::q5_0> && detail::block_size_agrees<Format::q5_1> && detail::block_size_agrees<Format::q4_K> &&
              detail::block_size_agrees<Format::q5_K> && detail::block_size_agrees<Format::q6_K>);

/// 6-bit scale and minimum of group g (0..7) of a q4_K or q5_K block.
struct ScaleMin { std::uint8_t scale, min; };
constexpr ScaleMin k_scale_min(const std::uint8_t (&s)[12], int g) {
  if (g < 4) return {static_cast<std::uint8_t>(s[g] & 63), static_cast<std::uint8_t>(s[g + 4] & 63)};
  return {static_cast<std::uint8_t>((s[g + 4] & 15) | ((s[g - 4] >> 6) << 4)), static_cast<std::uint8_t>((s[g + 4] >> 4) | ((s[g] >> 6) << 4))};
}

}  // namespace tinyllama
