// q4_0, q4_1, q5_0, q5_1: 32 weights of 4 or 5 bits with one scale, and in the _1 formats a minimum.
#pragma once

#include <cmath>
#include <cstring>

#include "tinyllama/quant/rounding.hpp"

namespace tinyllama {

namespace detail {

// Code k sits in the low nibble of qs[k] for k < 16 and in the high nibble of qs[k - 16] above; a fifth bit in bit k of qh.
template <class B>
concept FiveBit = requires(B b) { b.qh; };

template <class B>
inline void store_codes(B& b, const int (&q)[32]) {
  for (int j = 0; j < 16; ++j) b.qs[j] = static_cast<std::uint8_t>((q[j] & 15) | ((q[j + 16] & 15) << 4));
  if constexpr (FiveBit<B>) {
    for (int i = 0; i < 4; ++i) {
      int bits = 0;
      for (int j = 0; j < 8; ++j) bits |= (q[8 * i + j] >> 4) << j;
      b.qh[i] = static_cast<std::uint8_t>(bits);
    }
  }
}

template <class B>
inline void load_codes(const B& b, int (&q)[32]) {
  for (int j = 0; j < 16; ++j) {
    q[j] = b.qs[j] & 15;
    q[j + 16] = b.qs[j] >> 4;
  }
  if constexpr (FiveBit<B>)
    for (int k = 0; k < 32; ++k) q[k] |= ((b.qh[k / 8] >> (k % 8)) & 1) << 4;
}

// w = d (q - offset): the weight of largest magnitude becomes code 0, that is -offset d, so d takes the sign opposite to it.
template <class B, int offset>
struct SymmetricCodec {
  static void decode(const B& b, float* out) {
    int q[32];
    load_codes(b, q);
    const float d = b.d;
    for (int k = 0; k < 32; ++k) out[k] = d * static_cast<float>(q[k] - offset);
  }

  static void encode(const float* in, B& b) {
    float extreme = in[0];
    for (int k = 1; k < 32; ++k)
      if (std::fabs(in[k]) > std::fabs(extreme)) extreme = in[k];
    const float d = extreme / static_cast<float>(-offset), scale = inverse(d);
    b.d = all_finite<32>(in) ? f16(d) : nan_scale();
    int q[32];
    for (int k = 0; k < 32; ++k) q[k] = code_floor(unfused(in[k] * scale) + (static_cast<float>(offset) + 0.5f), 2 * offset - 1);
    store_codes(b, q);
  }
};

// w = d q + m with m the smallest weight.
template <class B, int top>
struct AffineCodec {
  static void decode(const B& b, float* out) {
    int q[32];
    load_codes(b, q);
    const float d = b.d, m = b.m;
    for (int k = 0; k < 32; ++k) out[k] = d * static_cast<float>(q[k]) + m;  // d q is exact in f32, so fusing changes nothing
  }

  static void encode(const float* in, B& b) {
    float low = in[0], high = in[0];
    for (int k = 1; k < 32; ++k) low = std::fmin(low, in[k]), high = std::fmax(high, in[k]);
    const float d = (high - low) / static_cast<float>(top), scale = inverse(d);
    const bool finite = all_finite<32>(in);
    b.d = finite ? f16(d) : nan_scale();
    b.m = finite ? f16(low) : nan_scale();
    int q[32];
    for (int k = 0; k < 32; ++k) q[k] = code_floor(unfused((in[k] - low) * scale) + 0.5f, top);
    store_codes(b, q);
  }
};

}  // namespace detail

// The bytes of all four encoders are those of ggml's reference quantisers.
template <> struct Codec<Format::q4_0> : detail::SymmetricCodec<block_q4_0, 8> {};
template <> struct Codec<Format::q5_0> : detail::SymmetricCodec<block_q5_0, 16> {};
template <> struct Codec<Format::q4_1> : detail::AffineCodec<block_q4_1, 15> {};
template <> struct Codec<Format::q5_1> : detail::AffineCodec<block_q5_1, 31> {};

}  // namespace tinyllama
