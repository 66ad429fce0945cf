// q8_0: 32 weights as signed bytes with one scale; and the plain formats as blocks of one weight.
#pragma once

#include <cmath>

#include "tinyllama/quant/rounding.hpp"

namespace tinyllama {

namespace detail {
template <Format F>
struct PlainCodec {
  static void decode(const Block<F>& b, float* out) { *out = static_cast<float>(b); }
  static void encode(const float* in, Block<F>& b) { b = Block<F>(*in); }
};
}  // namespace detail

template <> struct Codec<Format::f32> : detail::PlainCodec<Format::f32> {};
template <> struct Codec<Format::f16> : detail::PlainCodec<Format::f16> {};
template <> struct Codec<Format::bf16> : detail::PlainCodec<Format::bf16> {};
template <> struct Codec<Format::f8_e4m3> : detail::PlainCodec<Format::f8_e4m3> {};  // without the row's factor

/// w = d q with d = max|w| / 127. The bytes are those of ggml's reference quantiser (halves away from zero).
template <>
struct Codec<Format::q8_0> {
  static void decode(const block_q8_0& b, float* out) {
    const float d = b.d;
    for (int k = 0; k < 32; ++k) out[k] = d * static_cast<float>(b.qs[k]);
  }

  static void encode(const float* in, block_q8_0& b) {
    float largest = 0.0f;
    for (int k = 0; k < 32; ++k) largest = std::fmax(largest, std::fabs(in[k]));
    const float d = largest / 127.0f, scale = detail::inverse(d);
    b.d = detail::all_finite<32>(in) ? f16(d) : detail::nan_scale();
    for (int k = 0; k < 32; ++k) b.qs[k] = static_cast<std::int8_t>(detail::code_nearest(std::round(in[k] * scale), -127, 127));
  }
};

}  // namespace tinyllama
