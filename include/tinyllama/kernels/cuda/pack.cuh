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

#include <cuda_runtime.h>

#include "tinyllama/kernels/pack.hpp"
#include "tinyllama/quant/codec.hpp"

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

}  // namespace tinyllama::cuda
