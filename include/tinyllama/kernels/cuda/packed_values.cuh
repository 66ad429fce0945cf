// Packed weights (pack.cuh) as the kernels read them: blocks of 32 codes with their scales, and eight values at a time.
#pragma once

#include "tinyllama/kernels/cuda/element.cuh"
#include "tinyllama/kernels/cuda/pack.cuh"

namespace tinyllama::cuda {

/// Calls `f.template operator()<F>()` with the format made static; `visit` for device code.
template <class Fn>
__device__ __forceinline__ void visit_format(Format format, Fn&& f) {
  switch (format) {
    case Format::f32: return f.template operator()<Format::f32>();
    case Format::f16: return f.template operator()<Format::f16>();
    case Format::bf16: return f.template operator()<Format::bf16>();
    case Format::q8_0: return f.template operator()<Format::q8_0>();
    case Format::q4_0: return f.template operator()<Format::q4_0>();
    case Format::q4_1: return f.template operator()<Format::q4_1>();
    case Format::q5_0: return f.template operator()<Format::q5_0>();
    case Format::q5_1: return f.template operator()<Format::q5_1>();
    case Format::q4_K: return f.template operator()<Format::q4_K>();
    case Format::q5_K: return f.template operator()<Format::q5_K>();
    case Format::q6_K: return f.template operator()<Format::q6_K>();
    case Format::f8_e4m3: return f.template operator()<Format::f8_e4m3>();
  }
}

__device__ __forceinline__ float half_bits_to_float(std::uint32_t bits) { return __half2float(__ushort_as_half(static_cast<unsigned short>(bits))); }
__device__ __forceinline__ float2 half_pair_to_float(std::uint32_t bits) {
  __half2 h;
  *reinterpret_cast<std::uint32_t*>(&h) = bits;
  return __half22float2(h);
}
__device__ __forceinline__ float2 bf16_pair_to_float(std::uint32_t bits) { return {__uint_as_float(bits << 16), __uint_as_float(bits & 0xffff0000u)}; }

/// Two values of a 16-bit or the first and second of a 32-bit format.
template <Format F>
__device__ __forceinline__ float2 pair_to_float(std::uint32_t bits) {
  if constexpr (F == Format::bf16) return bf16_pair_to_float(bits);
  else return half_pair_to_float(bits);
}

/// Columns 8 p ... 8 p + 7 of a tile of values: 32 bytes of f32, 16 of f16 and bf16, 8 of f8_e4m3 (without the row's scale).
template <Format F>
struct Values8 {
  float v[8];
  __device__ __forceinline__ Values8(const std::byte* tile, int p) {
    const auto* at = reinterpret_cast<const uint4*>(tile);
    if constexpr (F == Format::f8_e4m3) {
      const uint2 a = reinterpret_cast<const uint2*>(tile)[p];
      const std::uint32_t w[4] = {a.x & 0xffffu, a.x >> 16, a.y & 0xffffu, a.y >> 16};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 f = half_pair_to_float(e4m3_pair_to_f16(w[i]));
        v[2 * i] = f.x, v[2 * i + 1] = f.y;
      }
    } else if constexpr (F == Format::f32) {
      const uint4 a = at[2 * p], b = at[2 * p + 1];
      const std::uint32_t w[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 8; ++i) v[i] = __uint_as_float(w[i]);
    } else {
      const uint4 a = at[p];
      const std::uint32_t w[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 f = pair_to_float<F>(w[i]);
        v[2 * i] = f.x, v[2 * i + 1] = f.y;
      }
    }
  }
};

/// Block b (32 columns) of a tile of nb blocks in a block format. Word m of q holds the codes of columns 4 m ... 4 m + 3 as signed bytes, and
///   w_c = scale q_c - min,   q6_K: scale for c < 16, scale_high behind
/// Codes kept in two's complement stand at the top of their byte; the power of two that this multiplies them with is taken from the scale.
template <Format F>
struct Block32 {
  static constexpr bool affine = F == Format::q4_1 || F == Format::q5_1 || F == Format::q4_K || F == Format::q5_K;
  int q[8];
  float scale, scale_high, min;

  __device__ __forceinline__ Block32(const std::byte* tile, int nb, int b)
      : Block32(tile + 16 * b, tile + high_plane(nb) + high_block_bytes<F> * b, tile + scale_plane<F>(nb) + scale_block_bytes<F> * b,
                tile + scale_plane<F>(nb) + (F == Format::q6_K ? 2 * nb + (b >> 3) * 2 : (b >> 3) * 16), b & 7) {}
  /// The same where the block's 16 bytes of codes, its upper bits, its scale and what its 256 columns share lie apart; group: which 32 of the 256.
  __device__ __forceinline__ Block32(const std::byte* codes, const std::byte* upper, const std::byte* at_scale, const std::byte* shared, int group) {
    const uint4 low = *reinterpret_cast<const uint4*>(codes);
    const std::uint32_t w[4] = {low.x, low.y, low.z, low.w};
    if constexpr (F == Format::q8_0) {
      const uint4 high = *reinterpret_cast<const uint4*>(upper);
      const std::uint32_t h[4] = {high.x, high.y, high.z, high.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) q[i] = static_cast<int>(w[i]), q[i + 4] = static_cast<int>(h[i]);
      scale = half_bits_to_float(*reinterpret_cast<const unsigned short*>(at_scale));
    } else if constexpr (F == Format::q4_0) {
#pragma unroll
      for (int i = 0; i < 4; ++i) q[i] = static_cast<int>((w[i] << 4) & 0xf0f0f0f0u), q[i + 4] = static_cast<int>(w[i] & 0xf0f0f0f0u);
      scale = half_bits_to_float(*reinterpret_cast<const unsigned short*>(at_scale)) * 0x1p-4f;
    } else if constexpr (F == Format::q5_0) {
      const std::uint32_t h = *reinterpret_cast<const std::uint32_t*>(upper);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        q[i] = static_cast<int>(((w[i] << 3) & 0x78787878u) | ((h << (7 - i)) & 0x80808080u));
        q[i + 4] = static_cast<int>(((w[i] >> 1) & 0x78787878u) | ((h << (3 - i)) & 0x80808080u));
      }
      scale = half_bits_to_float(*reinterpret_cast<const unsigned short*>(at_scale)) * 0x1p-3f;
    } else if constexpr (F == Format::q6_K) {
      const uint2 high = *reinterpret_cast<const uint2*>(upper);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        q[i] = static_cast<int>(((w[i] << 2) & 0x3c3c3c3cu) | ((high.x << (6 - 2 * i)) & 0xc0c0c0c0u));
        q[i + 4] = static_cast<int>(((w[i] >> 2) & 0x3c3c3c3cu) | ((high.y << (6 - 2 * i)) & 0xc0c0c0c0u));
      }
      const float d = half_bits_to_float(*reinterpret_cast<const unsigned short*>(shared)) * 0x1p-2f;
      const char2 s = *reinterpret_cast<const char2*>(at_scale);
      scale = d * static_cast<float>(s.x), scale_high = d * static_cast<float>(s.y);
    } else {
      std::uint32_t h = 0;
      if constexpr (F == Format::q5_1 || F == Format::q5_K) h = *reinterpret_cast<const std::uint32_t*>(upper);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        std::uint32_t a = w[i] & 0x0f0f0f0fu, c = (w[i] >> 4) & 0x0f0f0f0fu;
        if constexpr (F == Format::q5_1 || F == Format::q5_K) a |= (h << (4 - i)) & 0x10101010u, c |= (h >> i) & 0x10101010u;
        q[i] = static_cast<int>(a), q[i + 4] = static_cast<int>(c);
      }
      if constexpr (F == Format::q4_1 || F == Format::q5_1) {
        const float2 dm = half_pair_to_float(*reinterpret_cast<const std::uint32_t*>(at_scale));
        scale = dm.x, min = -dm.y;
      } else {
        const float2 dm = half_pair_to_float(*reinterpret_cast<const std::uint32_t*>(shared));
        const std::uint32_t s = static_cast<std::uint32_t>(shared[4 + group]);
        const std::uint32_t m = (static_cast<std::uint32_t>(shared[12 + (group >> 1)]) >> (4 * (group & 1))) & 15u;
        scale = dm.x * static_cast<float>(s & 63u), min = dm.y * static_cast<float>(s >> 6 | m << 2);
      }
    }
  }

  /// Column c of the block; c is a constant where this is fast.
  __device__ __forceinline__ float value(int c) const {
    const float code = static_cast<float>(static_cast<signed char>(q[c / 4] >> (8 * (c % 4))));
    const float s = F == Format::q6_K && c >= 16 ? scale_high : scale;
    if constexpr (affine) return s * code - min;
    else return s * code;
  }
};

/// What the values of a packed row are multiplied by.
template <Format F>
__device__ __forceinline__ float row_scale(const std::byte* row, int columns) {
  if constexpr (row_end_bytes(F) != 0) return *reinterpret_cast<const float*>(row + packed_row_bytes(F, columns) - row_end_bytes(F));
  else return 1.0f;
}

/// Columns 8 p ... 8 p + 7 of a packed row of `columns`, without the row's scale; past the end the row's padding or what lies behind it.
template <Format F>
__device__ __forceinline__ void load8_unscaled(const std::byte* row, int columns, int p, float (&v)[8]) {
  constexpr int t = tile_columns(F) / 8;
  const std::byte* const tile = row + p / t * tile_bytes(F, tile_columns(F));
  if constexpr (block_columns(F) == 1) {
    const Values8<F> x(tile, p % t);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = x.v[i];
  } else {
    const int rest = columns - p / t * tile_columns(F), nb = (rest < tile_columns(F) ? rest : tile_columns(F)) / 32;
    const Block32<F> x(tile, nb, p % t / 4);
    const int word = p % 4 * 2;
#pragma unroll
    for (int i = 0; i < 8; i += 2)  // words selected, so that the array stays in registers
      if (i == word) {
#pragma unroll
        for (int j = 0; j < 8; ++j) v[j] = x.value(4 * i + j);
      }
  }
}
/// The same with it.
template <Format F>
__device__ __forceinline__ void load8(const std::byte* row, int columns, int p, float (&v)[8]) {
  load8_unscaled<F>(row, columns, p, v);
  if constexpr (row_end_bytes(F) != 0) {
    const float scale = row_scale<F>(row, columns);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] *= scale;
  }
}
/// The same with the format known at run time: looking a token's embedding up, 8 values a thread.
__device__ __forceinline__ void load8(Format format, const std::byte* row, int columns, int p, float (&v)[8]) {
  visit_format(format, [&]<Format F>() { load8<F>(row, columns, p, v); });
}

}  // namespace tinyllama::cuda
