// The order in which the CUDA kernels read a weight matrix, built once at load: rows in tiles of columns, each tile in planes.
//
// A row of W [N, K] is its tiles one after the other, each tile_columns(format) columns but the last, each padded with zeros to 16 bytes. A
// tile is one run of bytes: a matrix of up to 2048 columns has one tile a row, and the decode kernel copies a tile with one instruction. Inside it:
//   f32, f16, bf16, f8_e4m3  the values; behind the last tile of a row of f8_e4m3 stand 16 bytes whose first four are the row's scale in f32: it comes with the row
//   block formats   planes, each over all n / 32 blocks of the tile, so that neighbouring lanes read neighbouring 16 bytes:
//     codes    16 bytes a block: nibbles, low nibble column c, high nibble column c + 16. q8_0: two such planes, columns 0-15 and 16-31 of each block
//     bits     q5: 4 bytes a block, bit 8 b + m is bit 4 of column 4 m + b.  q6_K: 8 bytes, bits 8 b + 2 (m % 4) of word m / 4 are bits 4, 5 of it
//     scales   q8_0, q4_0, q5_0: f16 d a block.  q4_1, q5_1: f16 d, m a block.  q4_K, q5_K: 16 bytes for each 256 columns: f16 d, dmin, then for each
//              group a byte (scale | low two bits of its min << 6), then 4 bytes of nibbles, the upper bits of the mins.
//              q6_K: two i8 scales a block, then f16 d for each 256 columns
// A tile takes the file's bytes, rounded up to 16. Codes with an offset are kept in two's complement: shifted to the top of a byte they are signed
// numbers, and the dot product needs no sum of the activations. Row r starts at r packed_row_bytes.
#pragma once

#include <cuda_fp16.h>

#include "tinyllama/kernels/pack.hpp"
#include "tinyllama/quant/codec.hpp"

#if defined(__CUDACC__)
#include "tinyllama/kernels/cuda/element.cuh"
#endif

namespace tinyllama::cuda {

__host__ __device__ constexpr int tile_columns(Format f) { return f == Format::f32 ? 1024 : 2048; }

/// Columns that share a block, and its bytes: `info` for device code.
__host__ __device__ constexpr int block_columns(Format f) {
  return f <= Format::bf16 || f == Format::f8_e4m3 ? 1 : f >= Format::q4_K ? 256 : 32;
}
__host__ __device__ constexpr int block_bytes(Format f) {
  constexpr int bytes[] = {4, 2, 2, 34, 18, 20, 22, 24, 144, 176, 210, 1};
  return bytes[static_cast<int>(f)];
}
static_assert([] {
  for (const FormatInfo& f : formats)
    if (block_columns(f.format) != f.block || block_bytes(f.format) != f.bytes) return false;
  return true;
}(), "block_columns and block_bytes repeat the list in tensor/dtype.hpp");

/// Bytes of a tile of n columns.
__host__ __device__ constexpr index_t tile_bytes(Format f, index_t n) { return (n / block_columns(f) * block_bytes(f) + 15) / 16 * 16; }
/// Bytes behind the last tile of a row.
__host__ __device__ constexpr int row_end_bytes(Format f) { return f == Format::f8_e4m3 ? 16 : 0; }
__host__ __device__ constexpr index_t packed_row_bytes(Format f, index_t columns) {
  const index_t t = tile_columns(f), whole = columns / t, rest = columns % t;
  return whole * tile_bytes(f, t) + (rest ? tile_bytes(f, rest) : 0) + row_end_bytes(f);
}
__host__ __device__ constexpr std::size_t packed_matrix_bytes(Format f, index_t rows, index_t columns) {
  return static_cast<std::size_t>(rows) * static_cast<std::size_t>(packed_row_bytes(f, columns));
}

/// Where the planes of a tile of nb blocks of 32 columns start.
__host__ __device__ constexpr int high_plane(int nb) { return 16 * nb; }  // q8_0: codes of columns 16-31; q5, q6: upper bits
template <Format F>
__host__ __device__ constexpr int scale_plane(int nb) {
  constexpr int codes = F == Format::q8_0 ? 32 : F == Format::q6_K ? 24 : F == Format::q5_0 || F == Format::q5_1 || F == Format::q5_K ? 20 : 16;
  return codes * nb;
}

/// Bytes of a block in the plane of upper bits and in that of scales; 0 where there is none.
template <Format F>
inline constexpr int high_block_bytes = F == Format::q8_0 ? 16 : F == Format::q6_K ? 8 : F == Format::q5_0 || F == Format::q5_1 || F == Format::q5_K ? 4 : 0;
template <Format F>
inline constexpr int scale_block_bytes = F == Format::q4_1 || F == Format::q5_1 ? 4 : F == Format::q4_K || F == Format::q5_K ? 0 : 2;

/// What is added to a code before it is packed, modulo its bits, so that it becomes a signed number of that many bits.
template <Format F>
inline constexpr int code_flip = F == Format::q4_0 ? 8 : F == Format::q5_0 ? 16 : F == Format::q6_K ? 32 : F == Format::q8_0 ? 128 : 0;

// ---- packing, on the host

namespace detail {

using tinyllama::detail::get;
using tinyllama::detail::put;

/// One tile: n columns of a row that starts at `from` as in the file.
template <Format F>
void pack_tile(const std::byte* from, index_t n, std::byte* to) {
  std::memset(to, 0, static_cast<std::size_t>(tile_bytes(F, n)));
  if constexpr (!is_quantised(F)) {
    std::memcpy(to, from, row_bytes(F, n));
  } else {
    const int nb = static_cast<int>(n / 32);
    constexpr int groups = info(F).block / 32;
    std::byte* const scales = to + scale_plane<F>(nb);
    for (int b = 0; b < nb; ++b) {
      Block<F> block;
      std::memcpy(&block, from + static_cast<std::size_t>(b / groups) * sizeof block, sizeof block);
      const int g = b % groups;
      std::uint32_t w[8];
      tinyllama::detail::group_codes<F>(block, g, w);
      for (std::uint32_t& v : w) v ^= 0x01010101u * code_flip<F>;
      if constexpr (F == Format::q8_0) {
        for (int m = 0; m < 8; ++m) put(to + m / 4 * high_plane(nb) + 16 * b, m % 4, w[m]);
      } else {
        for (int m = 0; m < 4; ++m) put(to + 16 * b, m, (w[m] & 0x0f0f0f0fu) | (w[m + 4] & 0x0f0f0f0fu) << 4);
        std::uint32_t high[2] = {};
        if constexpr (F == Format::q6_K) {
          for (int m = 0; m < 8; ++m) high[m / 4] |= ((w[m] >> 4) & 0x03030303u) << (2 * (m % 4));
          put(to + high_plane(nb) + 8 * b, 0, high[0]), put(to + high_plane(nb) + 8 * b, 1, high[1]);
        } else if constexpr (F == Format::q5_0 || F == Format::q5_1 || F == Format::q5_K) {
          for (int m = 0; m < 8; ++m) high[0] |= ((w[m] >> 4) & 0x01010101u) << m;
          put(to + high_plane(nb) + 4 * b, 0, high[0]);
        }
      }
      if constexpr (F == Format::q4_K || F == Format::q5_K) {
        std::byte* const header = scales + b / 8 * 16;
        const ScaleMin s = k_scale_min(block.scales, g);
        if (g == 0) put(header, 0, block.d), put(header, 1, block.dmin);
        put(header + 4, g, static_cast<std::uint8_t>(s.scale | (s.min & 3) << 6));
        const auto nibbles = get<std::uint8_t>(header + 12, g / 2);
        put(header + 12, g / 2, static_cast<std::uint8_t>(nibbles | (s.min >> 2) << (4 * (g % 2))));
      } else if constexpr (F == Format::q6_K) {
        put(scales, 2 * b, block.scales[2 * g]), put(scales, 2 * b + 1, block.scales[2 * g + 1]);
        put(scales + 2 * nb, b / 8, block.d);
      } else if constexpr (F == Format::q4_1 || F == Format::q5_1) {
        put(scales, 2 * b, block.d), put(scales, 2 * b + 1, block.m);
      } else {
        put(scales, b, block.d);
      }
    }
  }
}

/// Column c of a tile of n columns, decoded as the codecs decode it: the plain meaning of the layout.
template <Format F>
float unpack_element(const std::byte* tile, index_t n, index_t c) {
  if constexpr (!is_quantised(F)) {
    return get<Block<F>>(tile, c);
  } else {
    const int nb = static_cast<int>(n / 32), b = static_cast<int>(c / 32), k = static_cast<int>(c % 32), m = k / 4, byte = k % 4;
    const std::byte* const scales = tile + scale_plane<F>(nb);
    int q;
    if constexpr (F == Format::q8_0) {
      q = get<std::uint8_t>(tile + k / 16 * high_plane(nb) + 16 * b, k % 16);
    } else {
      q = get<std::uint8_t>(tile + 16 * b, k % 16) >> (k / 16 * 4) & 15;
      if constexpr (F == Format::q6_K) q |= (get<std::uint8_t>(tile + high_plane(nb) + 8 * b, m / 4 * 4 + byte) >> (2 * (m % 4)) & 3) << 4;
      if constexpr (F == Format::q5_0 || F == Format::q5_1 || F == Format::q5_K) q |= (get<std::uint8_t>(tile + high_plane(nb) + 4 * b, byte) >> m & 1) << 4;
    }
    const float code = static_cast<float>((q ^ code_flip<F>) - code_flip<F>);
    if constexpr (F == Format::q4_K || F == Format::q5_K) {
      const std::byte* const header = scales + b / 8 * 16;
      const int low = get<std::uint8_t>(header + 4, b % 8), high = get<std::uint8_t>(header + 12, b % 8 / 2) >> (b % 2 * 4) & 15;
      const float scale = static_cast<float>(get<f16>(header, 0)) * static_cast<float>(low & 63);
      const float min = static_cast<float>(get<f16>(header, 1)) * static_cast<float>(low >> 6 | high << 2);
      return scale * code - min;
    } else if constexpr (F == Format::q6_K) {
      return static_cast<float>(get<f16>(scales + 2 * nb, b / 8)) * static_cast<float>(get<std::int8_t>(scales, 2 * b + k / 16)) * code;
    } else if constexpr (F == Format::q4_1 || F == Format::q5_1) {
      return static_cast<float>(get<f16>(scales, 2 * b)) * code + static_cast<float>(get<f16>(scales, 2 * b + 1));
    } else {
      return static_cast<float>(get<f16>(scales, b)) * code;
    }
  }
}

}  // namespace detail

/// Rows [first, last) of a matrix from the file's order into the device's. `to` is the place of row 0, in host memory. scale: of each row, or null: 1.
inline void pack_rows(Format format, index_t columns, const std::byte* from, index_t first, index_t last, std::byte* to, const float* scale = nullptr) {
  visit(format, [&]<Format F>() {
    const auto stride = static_cast<index_t>(row_bytes(F, columns)), packed = packed_row_bytes(F, columns);
    for (index_t r = first; r < last; ++r) {
      for (index_t c = 0; c < columns; c += tile_columns(F))
        detail::pack_tile<F>(from + r * stride + static_cast<index_t>(row_bytes(F, c)), std::min<index_t>(tile_columns(F), columns - c),
                             to + r * packed + c / tile_columns(F) * tile_bytes(F, tile_columns(F)));
      if constexpr (row_end_bytes(F) != 0) {
        std::byte* const end = to + (r + 1) * packed - row_end_bytes(F);
        std::memset(end, 0, row_end_bytes(F));
        detail::put(end, 0, scale ? scale[r] : 1.0f);
      }
    }
  });
}

/// One packed row, in host memory, to floats [columns].
inline void unpack_row(Format format, index_t columns, const std::byte* row, float* out) {
  visit(format, [&]<Format F>() {
    for (index_t c = 0; c < columns; ++c) {
      const index_t first = c / tile_columns(F) * tile_columns(F);
      out[c] = detail::unpack_element<F>(row + c / tile_columns(F) * tile_bytes(F, tile_columns(F)), std::min<index_t>(tile_columns(F), columns - first), c - first);
      if constexpr (row_end_bytes(F) != 0) out[c] *= detail::get<float>(row + packed_row_bytes(F, columns) - row_end_bytes(F), 0);
    }
  });
}

#if defined(__CUDACC__)
// ---- reading, on the device

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

namespace detail {
template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 4) return x;
  else if constexpr (std::is_same_v<T, e4m3>) return cuda::from_float<e4m3>(x);
  else if constexpr (std::is_same_v<T, f16>) { f16 h; h.bits = __half_as_ushort(__float2half_rn(x)); return h; }
  else {
    bf16 h;
    const std::uint32_t u = __float_as_uint(x);
    h.bits = static_cast<std::uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : (u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
    return h;
  }
}
}  // namespace detail

/// out [rows, columns], rows ldo apart, of T: a packed matrix as values, for a library's matrix product. columns are a multiple of 8.
template <Format F, class T>
__global__ void dequantise_kernel(const std::byte* w, index_t row_stride, int rows, int columns, T* out, index_t ldo) {
  const int per_row = columns / 8;
  for (index_t i = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < static_cast<index_t>(rows) * per_row; i += static_cast<index_t>(gridDim.x) * blockDim.x) {
    const index_t r = i / per_row;
    const int p = static_cast<int>(i % per_row);
    float v[8];
    load8<F>(w + r * row_stride, columns, p, v);
    alignas(16) T t[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) t[j] = detail::from_float<T>(v[j]);
    T* const to = out + r * ldo + 8 * p;
    if (reinterpret_cast<std::uintptr_t>(to) % 16 == 0) {
#pragma unroll
      for (int j = 0; j < static_cast<int>(sizeof t / 16); ++j) reinterpret_cast<uint4*>(to)[j] = reinterpret_cast<const uint4*>(t)[j];
    } else {
      for (int j = 0; j < 8; ++j) to[j] = t[j];
    }
  }
}

/// Launches it for a format known at run time. `w` points to packed rows in device memory.
template <class T>
void dequantise(cudaStream_t stream, Format format, const std::byte* w, int rows, int columns, T* out, index_t ldo) {
  visit(format, [&]<Format F>() {
    const index_t n = static_cast<index_t>(rows) * (columns / 8);
    if (n == 0) return;
    const auto blocks = static_cast<unsigned>(std::min<index_t>((n + 255) / 256, 8192));
    dequantise_kernel<F, T><<<blocks, 256, 0, stream>>>(w, packed_row_bytes(F, columns), rows, columns, out, ldo);
  });
}

#endif

}  // namespace tinyllama::cuda
