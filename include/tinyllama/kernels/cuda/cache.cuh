// The KV cache on the GPU: where an element of a page lies, and the kernel that turns q and k by rope and writes k and v into pages.
#pragma once

#include "tinyllama/config/rope_layout.hpp"
#include "tinyllama/kernels/cuda/dependent.cuh"
#include "tinyllama/kernels/cuda/element.cuh"
#include "tinyllama/kernels/cuda/row_scale.cuh"
#include "tinyllama/kernels/kernels.hpp"

namespace tinyllama::cuda {

/// Positions of a page, as the CPU's page_tokens, for device code.
inline constexpr int page_positions = static_cast<int>(page_tokens);

template <Format F> struct cache_element;
template <> struct cache_element<Format::f32> { using type = float; };
template <> struct cache_element<Format::f16> { using type = f16; };
template <> struct cache_element<Format::bf16> { using type = bf16; };
template <> struct cache_element<Format::f8_e4m3> { using type = e4m3; };
template <> struct cache_element<Format::q8_0> { using type = std::int8_t; };

/// Calls f.template operator()<F>() for a format that a cache may have.
template <class Fn>
void visit_cache(Format f, Fn&& fn) {
  switch (f) {
    case Format::f32: return fn.template operator()<Format::f32>();
    case Format::f16: return fn.template operator()<Format::f16>();
    case Format::bf16: return fn.template operator()<Format::bf16>();
    case Format::f8_e4m3: return fn.template operator()<Format::f8_e4m3>();
    case Format::q8_0: return fn.template operator()<Format::q8_0>();
    default: throw Error("KV cache", "format", cache_format_names, std::string(name(f)));
  }
}

/// Whether rows of `width` values lie swizzled: 16-bit rows of 128 or 256 bytes, as blocks of [64 positions][128 bytes] in which the 16-byte chunk c
/// of row r stands at chunk c ^ (r & 7). That is the 128-byte swizzle of wgmma and of the tensor copy engine (PTX ISA, "Swizzling modes"), so a page of K
/// or V copied to shared memory as it lies is an operand, and ldmatrix reads it without bank conflicts.
template <Format F>
__host__ __device__ constexpr bool swizzled(int width) { return (F == Format::f16 || F == Format::bf16) && (width == 64 || width == 128); }

/// Byte offset of value d of the position in `slot`, in K (width = head_dim) or V (width = head_stride(head_dim)) of a page.
template <Format F>
__host__ __device__ constexpr std::int64_t cache_offset(int width, int slot, int d) {
  constexpr int bytes = sizeof(typename cache_element<F>::type);
  if (swizzled<F>(width)) return (d / 64 * page_positions + slot) * 128 + ((d % 64 / 8) ^ (slot & 7)) * 16 + d % 8 * 2;
  return (static_cast<std::int64_t>(slot) * width + d) * bytes;
}
/// Byte offset of the f32 scale of the position in `slot` (q8_0): behind the codes.
__host__ __device__ constexpr std::int64_t cache_scale_offset(int width, int slot) { return static_cast<std::int64_t>(width) * page_positions + slot * 4; }

/// Value d of the position in `slot`, on the device and, for tests, on the host.
template <Format F>
__device__ inline float load_cached(const std::byte* page, int width, int slot, int d) {
  using E = typename cache_element<F>::type;
  const E e = *reinterpret_cast<const E*>(page + cache_offset<F>(width, slot, d));
  if constexpr (F == Format::q8_0) return static_cast<float>(e) * *reinterpret_cast<const float*>(page + cache_scale_offset(width, slot));
  else return to_float(e);
}

/// Rows of q, k and v of T tokens, and the places of k and v. All pointers are the device's.
template <class A>
struct StoreKvArgs {
  A* q;                             // [T, heads * head_dim], turned in place; null: none
  const A *k, *v;                   // [T, kv_heads * head_dim]
  std::int64_t ldq, ldk, ldv;
  const float *cos, *sin;           // [T, head_dim / 2], rows ld_angles apart; null: q and k are stored as they are
  std::int64_t ld_angles;
  RopeLayout layout;
  int tokens, heads, kv_heads, head_dim;
  Format format;
  const std::byte* const* pages;    // page table of the batch
  const int* page_first;            // [T] index in it of the first page of the token's sequence
  const int* position;              // [T]
  std::int64_t k_offset, v_offset;  // bytes of the layer's KV head 0 in a page
  std::int64_t head_bytes;          // from one KV head to the next
  RowScale scale = {};              // of q, k and v, where there are angles
};

/// A warp for each (token, head of q, k or v). With `Rope`, pairs (a, b) of q and k become (a cos - b sin, b cos + a sin) first.
template <class A, Format F, bool Rope>
__global__ __launch_bounds__(128) void store_kv_kernel(const StoreKvArgs<A> a) {
  const int units = (a.q ? a.heads : 0) + 2 * a.kv_heads, lane = static_cast<int>(threadIdx.x) & 31;
  const std::int64_t unit = static_cast<std::int64_t>(blockIdx.x) * 4 + (threadIdx.x >> 5);
  if (unit >= static_cast<std::int64_t>(units) * a.tokens) return;
  const int t = static_cast<int>(unit / units), head_dim = a.head_dim, half = head_dim / 2;
  int h = static_cast<int>(unit % units) - (units - 2 * a.kv_heads);
  const bool is_q = h < 0, is_v = h >= a.kv_heads;
  const A* from;
  if (is_q) from = a.q + t * a.ldq + static_cast<std::int64_t>(h + a.heads) * head_dim;
  else if (is_v) from = a.v + t * a.ldv + static_cast<std::int64_t>(h -= a.kv_heads) * head_dim;
  else from = a.k + t * a.ldk + static_cast<std::int64_t>(h) * head_dim;
  // Pair p of the head: elements first(p) and second(p). Without rope the layout does not matter; an odd head_dim has a last element alone.
  const bool halves = Rope && a.layout == RopeLayout::half;
  const auto first = [&](int p) { return halves ? p : 2 * p; };
  const auto second = [&](int p) { return halves ? p + half : 2 * p + 1; };
  const float scale = Rope ? a.scale.template of_together<32>(t, lane) : 1.0f;
  const auto turned = [&](int p, float& x, float& y) {
    x = to_float(from[first(p)]), y = second(p) < head_dim ? to_float(from[second(p)]) : 0.0f;
    if constexpr (Rope) x *= scale, y *= scale;
    if constexpr (Rope) {
      if (is_v) return;
      const float c = a.cos[t * a.ld_angles + p], s = a.sin[t * a.ld_angles + p], u = x;
      x = u * c - y * s, y = y * c + u * s;
    }
  };
  const int pairs = (head_dim + 1) / 2;
  if (is_q) {
    if constexpr (Rope) {
      A* to = a.q + (from - a.q);
      for (int p = lane; p < pairs; p += 32) {
        float x, y;
        turned(p, x, y);
        to[first(p)] = from_float<A>(x), to[second(p)] = from_float<A>(y);
      }
    }
    return;
  }
  const int position = a.position[t], slot = position % page_positions, width = is_v ? (head_dim + 15) / 16 * 16 : head_dim;
  std::byte* page = const_cast<std::byte*>(a.pages[a.page_first[t] + position / page_positions]) + (is_v ? a.v_offset : a.k_offset) + h * a.head_bytes;
  float inverse = 1;
  if constexpr (F == Format::q8_0) {
    const auto larger = [](float u, float v) { return u != u || v <= u ? u : v; };  // a NaN stays, as in the reference: fmaxf would drop it
    float most = 0;
    for (int p = lane; p < pairs; p += 32) {
      float x, y;
      turned(p, x, y);
      most = larger(larger(most, fabsf(x)), fabsf(y));
    }
    for (int i = 16; i; i >>= 1) most = larger(most, __shfl_xor_sync(~0u, most, i));
    if (lane == 0) *reinterpret_cast<float*>(page + cache_scale_offset(width, slot)) = most / 127.0f;
    inverse = most > 4e-37f ? 127.0f / most : 0.0f;  // quantise_inverse
  }
  const auto put = [&](int d, float x) {
    using E = typename cache_element<F>::type;
    E e;
    if constexpr (F == Format::q8_0) {
      const float code = x * inverse;
      e = code == code ? static_cast<std::int8_t>(__float2int_rn(code)) : std::int8_t{0};
    } else {
      e = from_float<E>(x);
    }
    *reinterpret_cast<E*>(page + cache_offset<F>(width, slot, d)) = e;
  };
  for (int p = lane; p < pairs; p += 32) {
    float x, y;
    turned(p, x, y);
    put(first(p), x);
    if (second(p) < head_dim) put(second(p), y);
  }
  for (int d = head_dim + lane; d < width; d += 32) put(d, 0.0f);  // V's padding
}

/// The same for heads of 64 or 128 elements of 16 bits and a cache of 16 bits or of e4m3, with rope: a thread takes 8 pairs, as two pieces of 16 bytes in and, for 16 bits, out.
template <int HeadDim, Format F, bool halves>
__global__ __launch_bounds__(128) void store_kv_vectors_kernel(const StoreKvArgs<bf16> a) {
  let_next_begin();
  wait_for_previous();
  constexpr int threads = HeadDim / 16, half = HeadDim / 2;  // of a head
  const int units = a.heads + 2 * a.kv_heads;
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * 128 + threadIdx.x, unit = i / threads;
  if (unit >= static_cast<std::int64_t>(units) * a.tokens) return;
  const int t = static_cast<int>(static_cast<unsigned>(unit) / static_cast<unsigned>(units)), j = static_cast<int>(i % threads);
  int h = static_cast<int>(unit - static_cast<std::int64_t>(t) * units) - a.heads;
  const bool is_q = h < 0, is_v = h >= a.kv_heads;
  const bf16* const from = is_q ? a.q + t * a.ldq + static_cast<std::int64_t>(h + a.heads) * HeadDim
                                : is_v ? a.v + t * a.ldv + static_cast<std::int64_t>(h -= a.kv_heads) * HeadDim : a.k + t * a.ldk + static_cast<std::int64_t>(h) * HeadDim;
  const int first = halves ? 8 * j : 16 * j, second = halves ? 8 * j + half : 16 * j + 8;  // elements of the two pieces
  uint4 pieces[2] = {*reinterpret_cast<const uint4*>(from + first), *reinterpret_cast<const uint4*>(from + second)};
  float x[16];  // halves: a of 8 pairs, then b; else pair by pair
  std::uint32_t words[8] = {pieces[0].x, pieces[0].y, pieces[0].z, pieces[0].w, pieces[1].x, pieces[1].y, pieces[1].z, pieces[1].w};
#pragma unroll
  for (int e = 0; e < 8; ++e) x[2 * e] = __uint_as_float(words[e] << 16), x[2 * e + 1] = __uint_as_float(words[e] & 0xffff0000u);
  if (a.scale.squares) {
    const float scale = a.scale.template of_together<threads>(t, static_cast<int>(threadIdx.x) % 32);
#pragma unroll
    for (int e = 0; e < 16; ++e) x[e] *= scale;
  }
  if (!is_v) {
    const auto *cos = reinterpret_cast<const float4*>(a.cos + t * a.ld_angles + 8 * j), *sin = reinterpret_cast<const float4*>(a.sin + t * a.ld_angles + 8 * j);
    const float4 c0 = cos[0], c1 = cos[1], s0 = sin[0], s1 = sin[1];
    const float c[8] = {c0.x, c0.y, c0.z, c0.w, c1.x, c1.y, c1.z, c1.w}, s[8] = {s0.x, s0.y, s0.z, s0.w, s1.x, s1.y, s1.z, s1.w};
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      float &u = x[halves ? e : 2 * e], &v = x[halves ? e + 8 : 2 * e + 1];
      const float w = u;
      u = w * c[e] - v * s[e], v = v * c[e] + w * s[e];
    }
  }
  const auto packed = [&](int e) {
    std::uint32_t r;
    if (F == Format::f16 && !is_q) asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(x[2 * e + 1]), "f"(x[2 * e]));
    else asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(x[2 * e + 1]), "f"(x[2 * e]));
    return r;
  };
  if constexpr (F == Format::f8_e4m3) {
    if (!is_q) {
      const int position = a.position[t], slot = position % page_positions;
      std::byte* const page = const_cast<std::byte*>(a.pages[a.page_first[t] + position / page_positions]) + (is_v ? a.v_offset : a.k_offset) + h * a.head_bytes;
      const auto four = [&](int e) { return e4m3_pair(x[e], x[e + 1]) | e4m3_pair(x[e + 2], x[e + 3]) << 16; };
      *reinterpret_cast<uint2*>(page + cache_offset<F>(HeadDim, slot, first)) = make_uint2(four(0), four(4));
      *reinterpret_cast<uint2*>(page + cache_offset<F>(HeadDim, slot, second)) = make_uint2(four(8), four(12));
      return;
    }
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) words[e] = packed(e);
  pieces[0] = make_uint4(words[0], words[1], words[2], words[3]), pieces[1] = make_uint4(words[4], words[5], words[6], words[7]);
  if (is_q) {
    bf16* const to = a.q + (from - a.q);
    *reinterpret_cast<uint4*>(to + first) = pieces[0], *reinterpret_cast<uint4*>(to + second) = pieces[1];
  } else {
    const int position = a.position[t], slot = position % page_positions;
    std::byte* const page = const_cast<std::byte*>(a.pages[a.page_first[t] + position / page_positions]) + (is_v ? a.v_offset : a.k_offset) + h * a.head_bytes;
    *reinterpret_cast<uint4*>(page + cache_offset<F>(HeadDim, slot, first)) = pieces[0];
    *reinterpret_cast<uint4*>(page + cache_offset<F>(HeadDim, slot, second)) = pieces[1];
  }
}

/// Writes k and v of the tokens into their pages; where cos is given, q is turned in place and k on its way.
template <class A>
void store_kv(cudaStream_t stream, const StoreKvArgs<A>& a) {
  const std::int64_t units = static_cast<std::int64_t>((a.q && a.cos ? a.heads : 0) + 2 * a.kv_heads) * a.tokens;
  if (units == 0) return;
  StoreKvArgs<A> args = a;
  if (!a.cos) args.q = nullptr;
  if constexpr (std::is_same_v<A, bf16>) {
    const auto pieces = [](const void* p, std::int64_t ld) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0 && ld % 8 == 0; };
    const bool heads = a.head_dim == 64 || a.head_dim == 128, format = a.format == Format::bf16 || a.format == Format::f16 || a.format == Format::f8_e4m3;
    if (a.q && a.cos && heads && format && pieces(a.q, a.ldq) && pieces(a.k, a.ldk) && pieces(a.v, a.ldv) && pieces(a.cos, 2 * a.ld_angles) && pieces(a.sin, 2 * a.ld_angles)) {
      const auto blocks = static_cast<unsigned>((units * (a.head_dim / 16) + 127) / 128);
      const auto go = [&]<int HeadDim>() {
        const auto in = [&]<Format F>() {
          launch_dependent(a.layout == RopeLayout::half ? store_kv_vectors_kernel<HeadDim, F, true> : store_kv_vectors_kernel<HeadDim, F, false>, dim3(blocks), 128, 0, stream, "store_kv", a);
        };
        if (a.format == Format::bf16) in.template operator()<Format::bf16>();
        else if (a.format == Format::f16) in.template operator()<Format::f16>();
        else in.template operator()<Format::f8_e4m3>();
      };
      if (a.head_dim == 64) go.template operator()<64>();
      else go.template operator()<128>();
      return;
    }
  }
  const auto blocks = static_cast<unsigned>((units + 3) / 4);
  visit_cache(a.format, [&]<Format F>() {
    if (a.cos) store_kv_kernel<A, F, true><<<blocks, 128, 0, stream>>>(args);
    else store_kv_kernel<A, F, false><<<blocks, 128, 0, stream>>>(args);
  });
}

}  // namespace tinyllama::cuda
