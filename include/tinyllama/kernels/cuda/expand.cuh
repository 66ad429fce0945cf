// A cache of f8_e4m3, q8_0 or f32 as pages of bf16 that the tensor cores take as they lie: for prefill, where a page is read by many tiles.
#pragma once

#include "tinyllama/kernels/cuda/cache.cuh"

namespace tinyllama::cuda {

/// Page i of the result begins at out + i expanded_page_bytes(); in it KV head h's K, then V, as in a cache of bf16. Rounding: to 8 bits, once more than the cache's own; e4m3 loses nothing.
struct ExpandArgs {
  Format format;
  int head_dim, kv_heads, count;    // count: pages
  const std::byte* const* pages;    // [count]
  std::int64_t k_offset, v_offset;  // bytes of the layer's KV head 0 in a page
  std::int64_t head_bytes;          // from one KV head to the next
  std::byte* out;
  const std::byte** out_pages;      // [count]: the page table of the result; null: written before, for the same `out`
};

__host__ __device__ constexpr std::int64_t expanded_head_bytes(std::int64_t head_dim) { return 2 * page_positions * head_dim * 2; }
__host__ __device__ constexpr std::int64_t expanded_page_bytes(std::int64_t kv_heads, std::int64_t head_dim) { return kv_heads * expanded_head_bytes(head_dim); }

// A block a page's K or V of one head: blockIdx.x the page, y the head, z K or V. A thread takes 8 values, a chunk of 16 bytes of the result.
template <Format F>
__global__ __launch_bounds__(256) void expand_kernel(const ExpandArgs a) {
  using E = typename cache_element<F>::type;
  const int hd = a.head_dim, h = static_cast<int>(blockIdx.y), chunks = hd / 8;
  const bool is_v = blockIdx.z == 1;
  const std::byte* from = a.pages[blockIdx.x] + (is_v ? a.v_offset : a.k_offset) + h * a.head_bytes;
  std::byte* page = a.out + blockIdx.x * expanded_page_bytes(a.kv_heads, hd);
  std::byte* to = page + h * expanded_head_bytes(hd) + (is_v ? page_positions * hd * 2 : 0);
  if (a.out_pages && h == 0 && !is_v && threadIdx.x == 0) a.out_pages[blockIdx.x] = page;
  for (int i = static_cast<int>(threadIdx.x); i < page_positions * chunks; i += 256) {
    const int slot = i / chunks, d = i % chunks * 8;
    struct alignas(8 * sizeof(E)) Eight { E x[8]; };
    const Eight e = *reinterpret_cast<const Eight*>(from + cache_offset<F>(hd, slot, d));
    float scale = 1;
    if constexpr (F == Format::q8_0) scale = *reinterpret_cast<const float*>(from + cache_scale_offset(hd, slot));
    const auto value = [&](int j) {
      if constexpr (F == Format::q8_0) {
        return scale * static_cast<float>(e.x[j]);
      } else {
        return to_float(e.x[j]);
      }
    };
    uint4 w;
    w.x = pair<bf16>(value(0), value(1)), w.y = pair<bf16>(value(2), value(3)), w.z = pair<bf16>(value(4), value(5)), w.w = pair<bf16>(value(6), value(7));
    *reinterpret_cast<uint4*>(to + cache_offset<Format::bf16>(hd, slot, d)) = w;
  }
}

/// For head_dim 64 and 128 and caches of f8_e4m3, q8_0 and f32.
inline void expand_cache(cudaStream_t stream, const ExpandArgs& a) {
  if (a.count == 0) return;
  const dim3 grid(static_cast<unsigned>(a.count), static_cast<unsigned>(a.kv_heads), 2);
  if (a.format == Format::q8_0) expand_kernel<Format::q8_0><<<grid, 256, 0, stream>>>(a);
  else if (a.format == Format::f8_e4m3) expand_kernel<Format::f8_e4m3><<<grid, 256, 0, stream>>>(a);
  else if (a.format == Format::f32) expand_kernel<Format::f32><<<grid, 256, 0, stream>>>(a);
  else throw Error("expand_cache", "format", "f8_e4m3, q8_0 or f32", std::string(name(a.format)));
}

}  // namespace tinyllama::cuda
