// How AdamW's two averages are stored: the one list of formats, and the 8-bit code of blocks of 256 (block-wise as in arXiv 2110.02861, the code our own).
//
// A step decodes m and v to f32, computes as ever, updates p with what it computed, and rounds m and v as it stores them: to either neighbour, with the
// probability that makes the mean right. g^2 adds (1 - beta2) = 5% to v; to the nearest, what is below half a step of the code would be lost: with beta2 = 0.999
// v would stand still in both formats (tests/kernels/moments_test.cpp), and with 0.95 8 bits would lose what g^2 is more than v by less than 60%. The random
// bits follow from seed, step and the weight's place in the flat array: threads, shards and restarts do not change them.
//
// 8 bits: a block has a scale, a power of two, so that scaling is exact; a code is a float of its own:
//   m  sign, 4 bits of exponent, 3 of mantissa: 2^-15 to 1.875 of the scale
//   v  5 bits of exponent, 3 of mantissa: 2^-31 to 1.875 of the scale, since g^2 spans twice the octaves of g
// The paper's dynamic tree is a table of 256 to be searched, with steps of 1% near the largest of a block and of 50% seven decades below; a float is two shifts
// on a CPU's lanes and on a card alike, with steps of 6 to 12% at any size. Rounding is off by 4% (root of the mean square), which the averages carry on to 8% of
// m and 6% of the root of v: noise without a bias, beside that of a batch. What must not happen is a v of 0 below an m that is not 0: its step would be m / eps.
// So v's least code stands for all below it; |m| < 1.2 sqrt(v) (beta 0.9 and 0.95), and steps stay within some learning rates.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <string_view>

#include "tinyllama/tensor/dtype.hpp"

namespace tinyllama {

/// How the moments are stored.
enum class Moments : std::uint8_t { f32, bf16, int8 };

/// A row of the list. `block` elements share a scale; an array is padded to whole blocks.
struct MomentFormat {
  Moments moments;
  std::string_view name;
  index_t block;
  std::size_t element_bytes, scale_bytes;
};
inline constexpr std::array<MomentFormat, 3> moment_formats{{
    {Moments::f32, "f32", 1, sizeof(float), 0},
    {Moments::bf16, "bf16", 1, sizeof(bf16), 0},
    {Moments::int8, "int8", 256, 1, sizeof(float)},
}};
constexpr const MomentFormat& info(Moments m) { return moment_formats[static_cast<std::size_t>(m)]; }
constexpr std::string_view name(Moments m) { return info(m).name; }
inline constexpr index_t moment_block = info(Moments::int8).block;

/// Bytes of one moment of n weights: its elements, then their scales; whole cache lines where there is more than floats.
constexpr std::size_t moment_bytes(Moments m, index_t n) {
  const MomentFormat& f = info(m);
  if (m == Moments::f32) return static_cast<std::size_t>(n) * sizeof(float);
  const auto blocks = static_cast<std::size_t>((n + f.block - 1) / f.block);
  return (blocks * (static_cast<std::size_t>(f.block) * f.element_bytes + f.scale_bytes) + 63) / 64 * 64;
}
/// Where the scales begin in them.
constexpr std::size_t moment_scales_at(Moments m, index_t n) {
  const MomentFormat& f = info(m);
  return static_cast<std::size_t>((n + f.block - 1) / f.block * f.block) * f.element_bytes;
}

/// One moment of some weights, in the device's memory.
struct MomentArray {
  Moments format = Moments::f32;
  void* elements = nullptr;   // float, bf16 or codes
  float* scales = nullptr;    // of each block

  MomentArray() = default;
  MomentArray(float* f32) : elements(f32) {}
  MomentArray(Moments m, std::byte* memory, index_t n) : format(m), elements(memory) {
    if (m == Moments::int8) scales = reinterpret_cast<float*>(memory + moment_scales_at(m, n));
  }
  float* floats() const { return static_cast<float*>(elements); }
  bf16* halves() const { return static_cast<bf16*>(elements); }
  std::uint8_t* codes() const { return static_cast<std::uint8_t*>(elements); }
  /// From element i on, the first of a block.
  MomentArray from(index_t i) const {
    MomentArray a = *this;
    if (elements) a.elements = static_cast<std::byte*>(elements) + static_cast<std::size_t>(i) * info(format).element_bytes;
    if (scales) a.scales = scales + i / info(format).block;
    return a;
  }
};

// ---- rounding; the same in every kernel, on cards too

#if defined(__CUDACC__)
#define TINYLLAMA_HOST_DEVICE __host__ __device__
#else
#define TINYLLAMA_HOST_DEVICE
#endif

namespace detail {
// std::bit_cast is no function of a card.
TINYLLAMA_HOST_DEVICE constexpr std::uint32_t bits_of(float x) { return __builtin_bit_cast(std::uint32_t, x); }
TINYLLAMA_HOST_DEVICE constexpr float float_of(std::uint32_t bits) { return __builtin_bit_cast(float, bits); }
}  // namespace detail

/// 32 bits for the weight at `place` in the step of `key`: the lower half rounds m, the upper v. A permutation of 32 bits that mixes each into all.
TINYLLAMA_HOST_DEVICE constexpr std::uint32_t rounding_bits(std::uint32_t key, std::uint32_t place) {
  std::uint32_t h = key ^ place * 0x9e3779b1u;
  h = (h ^ h >> 16) * 0x7feb352du;
  h = (h ^ h >> 15) * 0x846ca68bu;
  return h ^ h >> 16;
}
inline constexpr std::uint32_t nearest = 0x8000;  // random bits of 16 that round to the nearest: of what is converted, not learned

/// The bits of bf16, to either neighbour; `random`: 16 bits.
TINYLLAMA_HOST_DEVICE constexpr std::uint16_t round_moment(float x, std::uint32_t random) { return static_cast<std::uint16_t>((detail::bits_of(x) + random) >> 16); }

// A code without its sign has the bits of a float from the 20th on, less a bias; of all that only the zero is another.
inline constexpr std::uint32_t m_code_bias = 112u << 3, v_code_bias = 96u << 3;
inline constexpr float m_code_least = 0x1.2p-15f, v_code_least = 0x1.2p-31f;  // code 1

/// The scale of a block whose largest magnitude is `most`: the power of two below it, or above where it would round up to that.
TINYLLAMA_HOST_DEVICE constexpr float moment_scale(float most) { return detail::float_of((detail::bits_of(most) + 0xfffffu) & 0x7f800000u); }
/// 1 / scale, exactly; 0 of a block of zeros.
TINYLLAMA_HOST_DEVICE constexpr float inverse_scale(float scale) { return scale > 0 ? detail::float_of((254u << 23) - detail::bits_of(scale)) : 0.0f; }

/// The code of a scaled magnitude that is not below code 1.
TINYLLAMA_HOST_DEVICE constexpr std::uint32_t magnitude_code(float y, std::uint32_t random, std::uint32_t bias) { return ((detail::bits_of(y) + (random << 4 | 8u)) >> 20) - bias; }
TINYLLAMA_HOST_DEVICE constexpr std::uint8_t encode_m(float x, float inverse, std::uint32_t random) {
  const std::uint32_t bits = detail::bits_of(x);
  const float y = detail::float_of(bits & 0x7fffffffu) * inverse;
  const bool up = y > m_code_least * (static_cast<float>(random) + 0.5f) * 0x1p-16f;
  return static_cast<std::uint8_t>((y < m_code_least ? up : magnitude_code(y, random, m_code_bias)) | bits >> 31 << 7);
}
TINYLLAMA_HOST_DEVICE constexpr float decode_m(std::uint8_t code, float scale) {
  const std::uint32_t c = code & 0x7fu;
  return c == 0 ? 0.0f : detail::float_of(((c + m_code_bias) << 20) | (code & 0x80u) << 24) * scale;
}
TINYLLAMA_HOST_DEVICE constexpr std::uint8_t encode_v(float x, float inverse, std::uint32_t random) {
  const float y = x * inverse;
  return static_cast<std::uint8_t>(y < v_code_least ? y > 0 : magnitude_code(y, random, v_code_bias));
}
TINYLLAMA_HOST_DEVICE constexpr float decode_v(std::uint8_t code, float scale) { return code == 0 ? 0.0f : detail::float_of((code + v_code_bias) << 20) * scale; }

#undef TINYLLAMA_HOST_DEVICE

/// Elements [0, n) of a moment in the host's memory, from the first of a block on. `second`: v.
inline void decode_moment(const MomentArray& from, bool second, float* to, index_t n) {
  for (index_t i = 0; i < n; ++i) {
    switch (from.format) {
      case Moments::f32: to[i] = from.floats()[i]; break;
      case Moments::bf16: to[i] = from.halves()[i]; break;
      case Moments::int8: to[i] = (second ? decode_v : decode_m)(from.codes()[i], from.scales[i / moment_block]); break;
    }
  }
}
/// The same back, element i rounded by random(i), 16 bits of it. To the nearest what was decoded comes back as it was.
template <class F>
void encode_moment(const MomentArray& to, bool second, const float* from, index_t n, F&& random) {
  for (index_t at = 0; at < n; at += moment_block) {
    const index_t end = std::min(n, at + moment_block);
    float most = 0;
    for (index_t i = at; i < end; ++i) most = std::max(most, std::fabs(from[i]));
    const float scale = moment_scale(most), inverse = inverse_scale(scale);
    if (to.format == Moments::int8) to.scales[at / moment_block] = scale;
    for (index_t i = at; i < end; ++i) {
      switch (to.format) {
        case Moments::f32: to.floats()[i] = from[i]; break;
        case Moments::bf16: to.halves()[i] = bf16::from_bits(round_moment(from[i], random(i))); break;
        case Moments::int8: to.codes()[i] = (second ? encode_v : encode_m)(from[i], inverse, random(i)); break;
      }
    }
  }
}
inline void encode_moment(const MomentArray& to, bool second, const float* from, index_t n) {
  encode_moment(to, second, from, n, [](index_t) { return nearest; });
}

}  // namespace tinyllama
