// Packed weights on their way to the tensor cores: 128 rows by 128 columns copied into shared memory as they are packed, then turned into bf16 there.
#pragma once

#include <cuda.h>

#include "tinyllama/kernels/cuda/packed_values.cuh"

namespace tinyllama::cuda::stream {

inline constexpr int rows = 128;  // of a tile

struct Launch {
  CUtensorMap x;
  const std::byte* packed;
  index_t row_bytes;
  int n, k, m, x_rows, units, tiles, blocks;  // x_rows: m to a multiple of 8; units: of a tile; blocks: that have any
  int tile_rows;                        // rows of y that a tile gives: 128, gated 64
  int next_row, next_half, next_group;  // rows of W from row r of a tile to rows r + 1 (of 8), r + 8, r + 16
  void* y;
  const void* add;
  index_t ldy;
  bool float_out, gated;
  float* partial;
  unsigned* flags;
};

/// A row's piece of a unit of 128 columns in shared memory: codes, upper bits, what 256 columns share, scales; an odd number of 16 bytes apart.
template <Format F>
struct Piece {
  static constexpr bool k_header = F == Format::q4_K || F == Format::q5_K;
  static constexpr int codes = F == Format::f16 ? 256 : F == Format::f8_e4m3 ? 128 : 64, upper = is_quantised(F) ? 4 * high_block_bytes<F> : 0;
  static constexpr int shared = k_header || F == Format::q6_K ? 16 : 0, scales = is_quantised(F) ? 4 * scale_block_bytes<F> : 0;
  static constexpr int at_upper = codes, at_shared = at_upper + upper, at_scales = at_shared + shared, pitch = ((at_scales + scales + 15) / 16 | 1) * 16;
};

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ void copy_async16(std::uint32_t to, const void* from) { asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory"); }
__device__ __forceinline__ void copy_async8(std::uint32_t to, const void* from) { asm volatile("cp.async.ca.shared.global [%0], [%1], 8;" ::"r"(to), "l"(from) : "memory"); }
/// The barrier counts this thread when its copies so far are there.
__device__ __forceinline__ void arrive_after_copies(std::uint32_t barrier) { asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(barrier) : "memory"); }
__device__ __forceinline__ void store_shared(std::uint32_t to, std::uint32_t a, std::uint32_t b, std::uint32_t c, std::uint32_t d) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

/// Columns 4 i ... 4 i + 3 of a block as bf16. A code becomes a float where it stands in a byte of one: 32768 + code, or 128 + code for codes below 128.
template <Format F>
__device__ __forceinline__ uint2 expand4(const Block32<F>& b, int i, float offset, float offset_high) {
  const float scale = F == Format::q6_K && i >= 4 ? b.scale_high : b.scale, c = F == Format::q6_K && i >= 4 ? offset_high : offset;
  const std::uint32_t u = Block32<F>::affine ? static_cast<std::uint32_t>(b.q[i]) : static_cast<std::uint32_t>(b.q[i]) ^ 0x80808080u;
  float v[4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float code = __uint_as_float(Block32<F>::affine ? __byte_perm(u, 0x43000000u, 0x7044u | j << 8) : __byte_perm(u, 0x47000000u, 0x7404u | j << 4));
    v[j] = fmaf(code, scale, c);
  }
  return {pair<bf16>(v[0], v[1]), pair<bf16>(v[2], v[3])};
}

/// q4_0 in pairs, half the instructions of the way through f32: 136 + code is a bf16 that ends in the code. The scale is rounded to bf16, so that weights err by
/// 1.4 times as much as with one rounding. q4_1 and q4_K are the difference of two such terms: tried, 3 times the error for 10% of the time.
__device__ __forceinline__ std::uint32_t expand_nibbles(std::uint32_t w, std::uint32_t scale) {
  std::uint32_t r = (w & 0x000f000fu) ^ 0x43084308u;
  asm("sub.rn.bf16x2 %0, %0, %1;" : "+r"(r) : "r"(0x43084308u));
  asm("mul.rn.bf16x2 %0, %0, %1;" : "+r"(r) : "r"(scale));
  return r;
}

/// Half of 64 columns of a row as the tensor cores read them, from one block.
template <Format F>
__device__ __forceinline__ void expand(std::uint32_t to, const std::byte* piece, int row, int half, int block, int unit) {
  const std::uint32_t at = to + row * 128;
  const auto chunk = [&](int c) { return at + (((half * 4 + c) ^ (row & 7)) * 16); };
  if constexpr (F == Format::f16) {
    const auto* from = reinterpret_cast<const uint4*>(piece + block * 64);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const uint4 v = from[c];
      const auto two = [](std::uint32_t h) {
        const float2 f = half_pair_to_float(h);
        return pair<bf16>(f.x, f.y);
      };
      store_shared(chunk(c), two(v.x), two(v.y), two(v.z), two(v.w));
    }
  } else if constexpr (F == Format::f8_e4m3) {
    const auto* from = reinterpret_cast<const uint4*>(piece + block * 32);
#pragma unroll
    for (int c = 0; c < 4; c += 2) {
      const uint4 v = from[c / 2];
      const auto two = [](std::uint32_t codes) {
        const float2 f = half_pair_to_float(e4m3_pair_to_f16(codes));
        return pair<bf16>(f.x, f.y);
      };
      store_shared(chunk(c), two(v.x & 0xffffu), two(v.x >> 16), two(v.y & 0xffffu), two(v.y >> 16));
      store_shared(chunk(c + 1), two(v.z & 0xffffu), two(v.z >> 16), two(v.w & 0xffffu), two(v.w >> 16));
    }
  } else {
    using P = Piece<F>;
    const std::byte* const shared = piece + P::at_shared + (F == Format::q6_K ? unit / 2 % 8 * 2 : 0);
    const Block32<F> b(piece + 16 * block, piece + P::at_upper + high_block_bytes<F> * block, piece + P::at_scales + scale_block_bytes<F> * block, shared, unit % 2 * 4 + block);
    if constexpr (F == Format::q4_0) {
      const uint4 codes = *reinterpret_cast<const uint4*>(piece + 16 * block);
      const std::uint32_t scale = pair<bf16>(16 * b.scale, 16 * b.scale);  // b's is that of codes at the top of a byte
      const std::uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
      for (int c = 0; c < 4; ++c) {  // chunks 0, 1: low nibbles
        std::uint32_t v[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const std::uint32_t spread = __byte_perm(words[c % 2 * 2 + e / 2], 0, e % 2 ? 0x4342 : 0x4140);
          v[e] = expand_nibbles(c < 2 ? spread : spread >> 4, scale);
        }
        store_shared(chunk(c), v[0], v[1], v[2], v[3]);
      }
    } else {
      float offset, offset_high = 0;
      if constexpr (Block32<F>::affine) offset = fmaf(-128.0f, b.scale, -b.min);
      else offset = -32896.0f * b.scale;
      if constexpr (F == Format::q6_K) offset_high = -32896.0f * b.scale_high;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const uint2 v = expand4<F>(b, 2 * c, offset, offset_high), w = expand4<F>(b, 2 * c + 1, offset, offset_high);
        store_shared(chunk(c), v.x, v.y, w.x, w.y);
      }
    }
  }
}

/// Two warps bring a unit of a tile's packed rows. Rows past the end of W repeat earlier ones, 16 at a time.
template <Format F>
__device__ __forceinline__ void copy_unit(const Launch& t, int tile, int unit, std::uint32_t to, int thread) {
  using P = Piece<F>;
  const int column = unit * 128, nt = tile_columns(F), within = column % nt, nb = min(nt, t.k - column / nt * nt) / 32, b = within / 32;
  const std::byte* const base = t.packed + column / nt * tile_bytes(F, nt) + static_cast<index_t>(tile) * t.tile_rows * t.row_bytes;
  const int last = (t.n - tile * t.tile_rows) / t.next_group - 1;
  const index_t by_half = t.next_half * t.row_bytes, by_group = t.next_group * t.row_bytes;
  const auto plane = [&]<int Bytes>(std::integral_constant<int, Bytes>, int from, int at) {
    if constexpr (Bytes > 0) {
      constexpr int size = Bytes % 16 ? 8 : 16, each = Bytes / size, together = 64 / each;  // rows at a time
      const int first = thread / each, c = thread % each * size;
      const std::uint32_t there = to + first * P::pitch + at + c;
      if constexpr (together % 8 == 0) {
        const std::byte* const mine = base + (first & 7) * t.next_row * t.row_bytes + from + c;
#pragma unroll
        for (int r = 0; r < rows; r += together) {
          const int h = together >= 16 ? first >> 3 & 1 : r >> 3 & 1, a = min((first + r) >> 4, last);
          const std::byte* const p = mine + (h ? by_half : 0) + a * by_group;
          if constexpr (size == 16) copy_async16(there + r * P::pitch, p);
          else copy_async8(there + r * P::pitch, p);
        }
      } else {
#pragma unroll 4
        for (int r = first; r < rows; r += together)
          copy_async16(to + r * P::pitch + at + c, base + ((r & 7) * t.next_row) * t.row_bytes + (r >> 3 & 1) * by_half + min(r >> 4, last) * by_group + from + c);
      }
    }
  };
  if constexpr (block_columns(F) == 1) {
    plane(std::integral_constant<int, P::codes>{}, within * block_bytes(F), 0);
  } else {
    const int scales = scale_plane<F>(nb);
    plane(std::integral_constant<int, P::codes>{}, 16 * b, 0);
    plane(std::integral_constant<int, P::upper>{}, high_plane(nb) + high_block_bytes<F> * b, P::at_upper);
    plane(std::integral_constant<int, P::shared>{}, P::k_header ? scales + b / 8 * 16 : scales + 2 * nb, P::at_shared);
    plane(std::integral_constant<int, P::scales>{}, scales + scale_block_bytes<F> * b, P::at_scales);
  }
}

#endif

}  // namespace tinyllama::cuda::stream
