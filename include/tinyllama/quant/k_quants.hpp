// q4_K, q5_K, q6_K: 256 weights in groups whose scales are themselves quantised; the encoders search for the scales.
#pragma once

#include <algorithm>
#include <cmath>

#include "tinyllama/quant/rounding.hpp"

namespace tinyllama {

namespace detail {

// Both searches minimise  E = sum_k c_k (w_k - approximation_k)^2  over the weights of one group, with the importance
// c_k = rms + |w_k|: large weights count for somewhat more, as they are more likely to act on large activations.
// For fixed codes q the best scale (and minimum) has a closed form, and for a fixed scale the best codes are the nearest ones:
// from several starting scales, both are applied in turn and the best result is kept. Errors come out 0.7, 3 and 2.4% below those of
// llama.cpp's searches for q4_K, q5_K and q6_K of Gaussian weights. Where the unit has FMA a near-tie may go to another candidate: unlike
// the other encoders' bytes, these depend on the -m flags, within that tie.
template <int N>
inline void importance(const float* w, float (&c)[N]) {
  float square = 0.0f;
  for (int k = 0; k < N; ++k) square += w[k] * w[k];
  const float rms = std::sqrt(square / static_cast<float>(N));
  for (int k = 0; k < N; ++k) c[k] = rms + std::fabs(w[k]);
}

/// x rounded to the nearest integer, halves to even, for |x| < 2^22; a NaN stays one. Unlike nearbyint it vectorises anywhere.
inline float nearest(float x) {
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: the sum keeps no fraction bits
  return (x + magic) - magic;
}

inline float clamp_code(float x, float low, float high) { return std::min(std::max(nearest(x), low), high); }

struct Affine {  // w = scale q - min, both >= 0
  float scale = 0.0f, min = 0.0f, error = std::numeric_limits<float>::infinity();
};

/// Eight sums at once: the compiler need not reorder anything to use vectors, and every target adds in the same order.
struct Sum8 {
  float lane[8] = {};
  float total() const { return ((lane[0] + lane[4]) + (lane[2] + lane[6])) + ((lane[1] + lane[5]) + (lane[3] + lane[7])); }
};

// E of a group under a given scale and minimum, with the nearest codes.
template <int N, int top>
inline float affine_error(const float* w, const float (&c)[N], float scale, float min) {
  const float inverted = inverse(scale);
  Sum8 e;
  for (int k = 0; k < N; k += 8)
    for (int i = 0; i < 8; ++i) {
      const float q = clamp_code((w[k + i] + min) * inverted, 0.0f, static_cast<float>(top));
      const float r = scale * q - min - w[k + i];
      e.lane[i] += c[k + i] * r * r;
    }
  return e.total();
}

// The best (scale, min) for the nearest codes under `a`: weighted linear regression of w on q, held to min >= 0; with its E.
template <int N, int top>
inline Affine affine_refit(const float* w, const float (&c)[N], Affine a) {
  const float inverted = inverse(a.scale);
  Sum8 s8, sq8, sqq8, sw8, sqw8, sww8;
  for (int k = 0; k < N; k += 8)
    for (int i = 0; i < 8; ++i) {
      const float q = clamp_code((w[k + i] + a.min) * inverted, 0.0f, static_cast<float>(top)), cq = c[k + i] * q, cw = c[k + i] * w[k + i];
      s8.lane[i] += c[k + i], sq8.lane[i] += cq, sqq8.lane[i] += cq * q, sw8.lane[i] += cw, sqw8.lane[i] += cq * w[k + i], sww8.lane[i] += cw * w[k + i];
    }
  const float s = s8.total(), sq = sq8.total(), sqq = sqq8.total(), sw = sw8.total(), sqw = sqw8.total(), sww = sww8.total();
  const float determinant = s * sqq - sq * sq;
  if (!(determinant > 0.0f)) return a;
  Affine r{(s * sqw - sq * sw) / determinant, (sq * sqw - sqq * sw) / determinant, 0.0f};
  if (r.min < 0.0f) r = {sqw / sqq, 0.0f, 0.0f};
  if (!(r.scale > 0.0f)) return a;
  // sum c (w - scale q + min)^2, multiplied out
  r.error = sww - r.scale * sqw + r.min * sw;
  if (r.min == 0.0f) r.error = sww - r.scale * sqw;
  return r;
}

template <int N, int top>
inline Affine fit_affine(const float* w, const float (&c)[N]) {
  const auto [lowest, highest] = std::minmax_element(w, w + N);
  const float low = std::min(*lowest, 0.0f), range = *highest - low;
  if (!(range > 0.0f)) return {0.0f, -low};
  Affine best{range / static_cast<float>(top), -low};
  best.error = affine_error<N, top>(w, c, best.scale, best.min);
  float square = 0.0f;
  for (int k = 0; k < N; ++k) square += c[k] * w[k] * w[k];
  const auto consider = [&](Affine a) {
    // The multiplied-out error is a difference of large numbers, good to some 4e-6 of their size; the codes that it assumes may not even be
    // the nearest. It only decides whether a candidate is worth a second look.
    if (!(a.error < 1.02f * best.error + 4e-6f * square)) return;
    a.error = affine_error<N, top>(w, c, a.scale, a.min);
    if (a.error < best.error) best = a;
  };
  for (int step = -6; step <= 10; ++step)  // the range spread over top - 0.6 ... top + 1.0 steps
    consider(affine_refit<N, top>(w, c, {range / (static_cast<float>(top) + 0.1f * static_cast<float>(step)), -low}));
  for (int round = 0; round < 2; ++round) consider(affine_refit<N, top>(w, c, best));
  return best;
}

// The 6-bit scales and minima of eight groups into 12 bytes: the inverse of k_scale_min.
inline void store_scale_min(std::uint8_t (&bytes)[12], const int (&scale)[8], const int (&min)[8]) {
  for (int g = 0; g < 4; ++g) {
    bytes[g] = static_cast<std::uint8_t>(scale[g] | ((scale[g + 4] >> 4) << 6));
    bytes[g + 4] = static_cast<std::uint8_t>(min[g] | ((min[g + 4] >> 4) << 6));
    bytes[g + 8] = static_cast<std::uint8_t>((scale[g + 4] & 15) | ((min[g + 4] & 15) << 4));
  }
}

// The common part of q4_K and q5_K: fills d, dmin and scales, and returns the codes.
template <int top, class B>
inline void encode_affine(const float* in, B& b, std::uint8_t (&q)[256]) {
  b = B{};
  std::fill(std::begin(q), std::end(q), std::uint8_t{0});
  if (!all_finite<256>(in)) {
    b.d = b.dmin = nan_scale();
    return;
  }
  float c[8][32];
  Affine fit[8];
  float most = 0.0f, most_min = 0.0f;
  for (int g = 0; g < 8; ++g) {
    importance<32>(in + 32 * g, c[g]);
    fit[g] = fit_affine<32, top>(in + 32 * g, c[g]);
    most = std::max(most, fit[g].scale), most_min = std::max(most_min, fit[g].min);
  }
  b.d = f16(most / 63.0f), b.dmin = f16(most_min / 63.0f);
  const float d = b.d, dmin = b.dmin;
  int scale[8], min[8];
  for (int g = 0; g < 8; ++g) {
    // Rounding scale and minimum one by one is not the best pair of integers: try the neighbours.
    const int s0 = code_nearest(fit[g].scale * inverse(d), 0, 63), m0 = code_nearest(fit[g].min * inverse(dmin), 0, 63);
    float best = std::numeric_limits<float>::infinity();
    scale[g] = s0, min[g] = m0;
    for (int s = std::max(s0 - 1, 0); s <= std::min(s0 + 1, 63); ++s)
      for (int m = std::max(m0 - 1, 0); m <= std::min(m0 + 1, 63); ++m) {
        const float e = affine_error<32, top>(in + 32 * g, c[g], d * static_cast<float>(s), dmin * static_cast<float>(m));
        if (e < best) best = e, scale[g] = s, min[g] = m;
      }
    const float step = d * static_cast<float>(scale[g]), offset = dmin * static_cast<float>(min[g]);
    for (int i = 0; i < 32; ++i)
      q[32 * g + i] = static_cast<std::uint8_t>(code_nearest((in[32 * g + i] + offset) * inverse(step), 0, top));
  }
  store_scale_min(b.scales, scale, min);
}

// w = scale (q - 32), the scale of either sign. N weights, codes -32..31.
template <int N>
inline float symmetric_error(const float* w, const float (&c)[N], float scale) {
  const float inverted = inverse(scale);
  Sum8 e;
  for (int k = 0; k < N; k += 8)
    for (int i = 0; i < 8; ++i) {
      const float r = scale * clamp_code(w[k + i] * inverted, -32.0f, 31.0f) - w[k + i];
      e.lane[i] += c[k + i] * r * r;
    }
  return e.total();
}

template <int N>
inline float fit_symmetric(const float* w, const float (&c)[N]) {
  float extreme = 0.0f;
  for (int k = 0; k < N; ++k)
    if (std::fabs(w[k]) > std::fabs(extreme)) extreme = w[k];
  // E = sum c w^2 - gain, with gain = (sum c q w)^2 / sum c q^2 for the best scale, sum c q w / sum c q^2
  float best = 0.0f, best_gain = 0.0f;
  for (int step : {0, -9, -8, -7, -6, -5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 6, 7, 8, 9}) {
    const float inverted = inverse(extreme / -(32.0f + 0.1f * static_cast<float>(step)));
    Sum8 qq, qw;
    for (int k = 0; k < N; k += 8)
      for (int i = 0; i < 8; ++i) {
        const float q = clamp_code(w[k + i] * inverted, -32.0f, 31.0f), cq = c[k + i] * q;
        qq.lane[i] += cq * q, qw.lane[i] += cq * w[k + i];
      }
    const float sqq = qq.total(), sqw = qw.total(), gain = sqw * sqw / sqq;
    if (gain > 1.000001f * best_gain) best = sqw / sqq, best_gain = gain;  // a tie stays with the plain scale
  }
  return best;
}

}  // namespace detail

/// 4 bits a weight, 4.5 with the scales. The search is this library's; the layout and the meaning are ggml's.
template <>
struct Codec<Format::q4_K> {
  static void decode(const block_q4_K& b, float* out) {
    const float d = b.d, dmin = b.dmin;
    for (int g = 0; g < 8; ++g) {
      const ScaleMin sm = k_scale_min(b.scales, g);
      const float scale = d * static_cast<float>(sm.scale), min = dmin * static_cast<float>(sm.min);
      const std::uint8_t* qs = b.qs + 32 * (g / 2);
      const int shift = 4 * (g % 2);
      for (int i = 0; i < 32; ++i) out[32 * g + i] = scale * static_cast<float>((qs[i] >> shift) & 15) - min;
    }
  }

  static void encode(const float* in, block_q4_K& b) {
    std::uint8_t q[256];
    detail::encode_affine<15>(in, b, q);
    for (int j = 0; j < 4; ++j)
      for (int i = 0; i < 32; ++i) b.qs[32 * j + i] = static_cast<std::uint8_t>(q[64 * j + i] | (q[64 * j + 32 + i] << 4));
  }
};

/// 5 bits a weight, 5.5 with the scales.
template <>
struct Codec<Format::q5_K> {
  static void decode(const block_q5_K& b, float* out) {
    const float d = b.d, dmin = b.dmin;
    for (int g = 0; g < 8; ++g) {
      const ScaleMin sm = k_scale_min(b.scales, g);
      const float scale = d * static_cast<float>(sm.scale), min = dmin * static_cast<float>(sm.min);
      const std::uint8_t* qs = b.qs + 32 * (g / 2);
      const int shift = 4 * (g % 2);
      for (int i = 0; i < 32; ++i)
        out[32 * g + i] = scale * static_cast<float>(((qs[i] >> shift) & 15) | (((b.qh[i] >> g) & 1) << 4)) - min;
    }
  }

  static void encode(const float* in, block_q5_K& b) {
    std::uint8_t q[256];
    detail::encode_affine<31>(in, b, q);
    for (int j = 0; j < 4; ++j)
      for (int i = 0; i < 32; ++i) b.qs[32 * j + i] = static_cast<std::uint8_t>((q[64 * j + i] & 15) | ((q[64 * j + 32 + i] & 15) << 4));
    for (int i = 0; i < 32; ++i) {
      int bits = 0;
      for (int g = 0; g < 8; ++g) bits |= (q[32 * g + i] >> 4) << g;
      b.qh[i] = static_cast<std::uint8_t>(bits);
    }
  }
};

/// 6 bits a weight, 6.5625 with the scales. In each half of 128 weights, weight 32 j + i has its low four bits in
/// ql[i + 32 (j % 2)] (high nibble for j >= 2) and its upper two in bits 2 j of qh[i].
template <>
struct Codec<Format::q6_K> {
  static void decode(const block_q6_K& b, float* out) {
    const float d = b.d;
    for (int half = 0; half < 2; ++half)
      for (int j = 0; j < 4; ++j)
        for (int i = 0; i < 32; ++i) {
          const int low = (b.ql[64 * half + 32 * (j % 2) + i] >> (4 * (j / 2))) & 15, high = (b.qh[32 * half + i] >> (2 * j)) & 3;
          const float scale = d * static_cast<float>(b.scales[8 * half + 2 * j + i / 16]);
          out[128 * half + 32 * j + i] = scale * static_cast<float>((low | (high << 4)) - 32);
        }
  }

  static void encode(const float* in, block_q6_K& b) {
    b = block_q6_K{};
    if (!detail::all_finite<256>(in)) {
      b.d = detail::nan_scale();
      return;
    }
    float c[16][16], fit[16], extreme = 0.0f;
    for (int g = 0; g < 16; ++g) {
      detail::importance<16>(in + 16 * g, c[g]);
      fit[g] = detail::fit_symmetric<16>(in + 16 * g, c[g]);
      if (std::fabs(fit[g]) > std::fabs(extreme)) extreme = fit[g];
    }
    b.d = f16(extreme / -128.0f);
    const float d = b.d;
    int q[256];
    for (int g = 0; g < 16; ++g) {
      const int s0 = detail::code_nearest(fit[g] * detail::inverse(d), -128, 127);
      float best = std::numeric_limits<float>::infinity();
      int scale = s0;
      for (int s = std::max(s0 - 1, -128); s <= std::min(s0 + 1, 127); ++s) {
        const float e = detail::symmetric_error<16>(in + 16 * g, c[g], d * static_cast<float>(s));
        if (e < best) best = e, scale = s;
      }
      b.scales[g] = static_cast<std::int8_t>(scale);
      const float inverted = detail::inverse(d * static_cast<float>(scale));
      for (int i = 0; i < 16; ++i) q[16 * g + i] = detail::code_nearest(in[16 * g + i] * inverted, -32, 31) + 32;
    }
    for (int half = 0; half < 2; ++half)
      for (int i = 0; i < 32; ++i) {
        const int* h = q + 128 * half + i;
        b.ql[64 * half + i] = static_cast<std::uint8_t>((h[0] & 15) | ((h[64] & 15) << 4));
        b.ql[64 * half + 32 + i] = static_cast<std::uint8_t>((h[32] & 15) | ((h[96] & 15) << 4));
        b.qh[32 * half + i] = static_cast<std::uint8_t>((h[0] >> 4) | ((h[32] >> 4) << 2) | ((h[64] >> 4) << 4) | ((h[96] >> 4) << 6));
      }
  }
};

}  // namespace tinyllama
