// Attention of a few query rows to a long cache, at the speed of memory: each byte of K and V is read once for all rows of a KV head, by mma.sync.
//
// A block of 4 warps takes pages through a ring in shared memory (cp.async, across the boundaries of its items). Of each page a warp has 16 positions, which it fetches for
// itself, so that within an item no warp waits for another:
//   S^T [16 positions, rows] = K Q^T      A = K as it lies, B = Q: with 8 heads to a KV head no row of the product is padding
//   P^T = 2^(S^T - max)                   in registers; movmatrix turns the accumulator's order into that of an operand
//   O^T [head_dim, rows] += V^T P^T       A = V^T by ldmatrix.trans
// The warps' online softmaxes are independent until an item ends. On Hopper this leaves the tensor cores idle most of the time, as it should: decoding is reading.
#pragma once

#include "tinyllama/kernels/cuda/attention_parts.cuh"
#include "tinyllama/kernels/cuda/cache.cuh"

namespace tinyllama::cuda {

namespace detail {

__device__ inline std::uint32_t shared_address(const void* p) { return static_cast<std::uint32_t>(__cvta_generic_to_shared(p)); }
/// 16 bytes from global to shared memory; zeros where `valid` is false.
__device__ inline void copy_async(std::uint32_t to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
__device__ inline void commit_async() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
__device__ inline void wait_async() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

__device__ inline void load_matrices(std::uint32_t (&r)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
__device__ inline void load_matrices_transposed(std::uint32_t (&r)[4], std::uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}
__device__ inline std::uint32_t transpose_matrix(std::uint32_t x) {
  std::uint32_t r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(x));
  return r;
}
/// d [16, 8] += a [16, 16] b [16, 8], operands in T, sums in f32.
template <class T>
__device__ inline void mma(float (&d)[4], const std::uint32_t (&a)[4], std::uint32_t b0, std::uint32_t b1) {
  if constexpr (std::is_same_v<T, bf16>)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
/// 2^x by the special function unit; subnormal results become 0.
__device__ inline float exp2_fast(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

/// Two bytes of w, signed codes, as a word of two bf16: exact, a code has 7 bits. 2^23 + u as an f32 ends in the bits of u = code + 128.
template <int Low, int High>
__device__ inline std::uint32_t codes_to_bf16(std::uint32_t w) {
  const std::uint32_t u = w ^ 0x80808080u;
  const float low = __uint_as_float(__byte_perm(u, 0x4b000000u, 0x7440 | Low)) - 8388736.0f;
  const float high = __uint_as_float(__byte_perm(u, 0x4b000000u, 0x7440 | High)) - 8388736.0f;
  return pair<bf16>(low, high);
}

/// Bytes Low and High of w as operands of the products: codes as bf16, e4m3 as f16.
template <Format F, int Low, int High>
__device__ inline std::uint32_t bytes_to_pair(std::uint32_t w) {
  if constexpr (F == Format::q8_0) return codes_to_bf16<Low, High>(w);
  else if constexpr (High == Low + 1) return e4m3_pair_to_f16(w >> (8 * Low));
  else return e4m3_pair_to_f16(__byte_perm(w, 0, 0x4400 | High << 4 | Low));
}

}  // namespace detail

inline constexpr int paged_threads = 128;

/// What a stage of the ring holds: a page's K and V of one head as they lie (with scales where the format has them).
template <int HeadDim, int Tiles, Format F>
struct PagedShape {
  static constexpr int tile_rows = Tiles * 8;
  static constexpr int values_bytes = page_positions * HeadDim * static_cast<int>(sizeof(typename cache_element<F>::type));
  static constexpr int kv_bytes = values_bytes + (F == Format::q8_0 ? page_positions * 4 : 0);
  static constexpr int stage_bytes = 2 * kv_bytes;
  static constexpr int pitch = HeadDim + 4;  // of results in shared memory, in floats
  static constexpr int result_bytes = (tile_rows * pitch + 4 * 2 * tile_rows + 2 * tile_rows + 4) * 4;
  static constexpr int blocks_per_sm = HeadDim * Tiles <= 64 ? 4 : HeadDim * Tiles <= 256 ? 2 : 1;  // as registers allow
  static constexpr int shared_limit = (227 / blocks_per_sm - 1) * 1024;
  static constexpr int stages = (shared_limit - result_bytes) / stage_bytes < 6 ? (shared_limit - result_bytes) / stage_bytes : 6;
  static constexpr int shared_bytes = stages * stage_bytes + result_bytes;
};

template <int HeadDim, int Tiles, Format F, class O>
__global__ __launch_bounds__(paged_threads, (PagedShape<HeadDim, Tiles, F>::blocks_per_sm)) void paged_kernel(const AttentionArgs<bf16, O> a) {
  using namespace detail;
  using Shape = PagedShape<HeadDim, Tiles, F>;
  using T = std::conditional_t<F == Format::f16 || F == Format::f8_e4m3, f16, bf16>;  // of the products' operands
  constexpr bool codes = F == Format::q8_0 || F == Format::f8_e4m3, scaled = F == Format::q8_0;  // values of one byte; with a scale a position
  constexpr int stages = Shape::stages, k_steps = HeadDim / 16, d_tiles = HeadDim / 16, rows = Shape::tile_rows;
  extern __shared__ __align__(1024) unsigned char ring[];
  float* result = reinterpret_cast<float*>(ring + stages * Shape::stage_bytes);  // [rows, pitch]
  float *warp_max = result + rows * Shape::pitch, *warp_sum = warp_max + 4 * rows;  // [4, rows]
  float *tile_max = warp_sum + 4 * rows, *tile_sum = tile_max + rows;               // [rows]
  auto* flag = reinterpret_cast<unsigned*>(tile_sum + rows);
  const int me = static_cast<int>(threadIdx.x), warp = me / 32, lane = me % 32, g = lane / 4, c = lane % 4;

  // The loader runs ahead of the arithmetic by up to stages - 1 pages, through the same list of items.
  struct Cursor {
    AttentionItem item;
    int page;
    const std::byte* at;  // of `page`, read one step before it is needed
  };
  let_next_begin();
  // The plan, the table of pages and positions before the sequence's new ones were there before this step, so pages of old positions come without waiting.
  AttentionItem item = load_item(a.items + blockIdx.x);
  if (item.rows == 0) return;
  Cursor load{item, item.page_begin, nullptr};
  bool more = true;  // to load
  const auto locate = [&] { load.at = a.pages[load.item.pages + load.page] + load.item.kv_head * a.head_bytes; };
  locate();
  const auto load_page = [&](int stage) {
    if (more) {
      const std::uint32_t to = shared_address(ring + stage * Shape::stage_bytes);
      const int valid = load.item.length - load.page * page_positions;  // rows beyond become zeros: nobody has written them
      constexpr int chunks = Shape::values_bytes / 16, row_chunks = codes ? HeadDim / 16 : 8;
#pragma unroll
      for (int i = lane; i < 2 * chunks / 4; i += 32) {
        // Chunk j of the page's values: of the warp's rows, block (of 128-byte columns) by block.
        const int of = i % (chunks / 4), row = warp * 16 + of / row_chunks % 16, j = codes ? warp * 16 * row_chunks + of : of / 128 * 512 + warp * 128 + of % 128;
        // Codes lie in plain rows; in shared memory chunk x of a row stands at x ^ (row / (128 / row bytes)), as the 128-byte swizzle would have it.
        const int swizzle = codes ? (row * row_chunks / 8 & (row_chunks - 1)) : 0;
        const bool is_k = i < chunks / 4;
        copy_async(to + (is_k ? 0 : Shape::kv_bytes) + (j ^ swizzle) * 16, load.at + (is_k ? a.k_offset : a.v_offset) + j * 16, row < valid);
      }
      if constexpr (scaled) {  // the 16 positions' scales: 4 chunks of K, 4 of V
        const bool is_k = lane < 4;
        const int j = warp * 4 + (lane & 3);
        if (lane < 8) copy_async(to + (is_k ? 0 : Shape::kv_bytes) + Shape::values_bytes + j * 16, load.at + (is_k ? a.k_offset : a.v_offset) + Shape::values_bytes + j * 16, j * 4 < valid);
      }
      if (++load.page == load.item.page_end) {
        more = load.item.next >= 0;
        if (more) load.item = load_item(a.items + load.item.next), load.page = load.item.page_begin;
      }
      if (more) locate();
    }
    commit_async();
  };
  bool waited = false;
#pragma unroll 1
  for (int s = 0; s < stages - 1; ++s) {
    if (!waited && more && (load.page + 1) * page_positions > load.item.position) wait_for_previous(), waited = true;
    load_page(s);
  }
  if (!waited) wait_for_previous();

  const float scale = a.scale * 1.4426950408889634f;
  int stage = 0;
  while (true) {
    std::uint32_t q[Tiles][k_steps][2];
    float o[d_tiles][Tiles][4] = {}, max[Tiles][2], sum[Tiles][2] = {};
    int seen[Tiles][2];  // positions that the thread's two rows of a tile see
#pragma unroll
    for (int n = 0; n < Tiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) max[n][e] = -INFINITY, seen[n][e] = min(item.position + (item.row + n * 8 + c * 2 + e) / a.group + 1, item.length);
    // Q as an operand straight from memory: row n * 8 + g, columns 2c and 2c + 1 of each 8. For codes the order of a product's terms is free: thread c takes
    // columns 4c .. 4c + 3 of each 16, which is how it gets K's codes.
#pragma unroll
    for (int n = 0; n < Tiles; ++n) {
      const int r = item.row + min(n * 8 + g, item.rows - 1);  // rows that do not exist repeat the last one; nothing of them is stored
      const bf16* from = a.q + (item.first_row + r / a.group) * a.ldq + static_cast<std::int64_t>(item.kv_head * a.group + r % a.group) * HeadDim + c * (codes ? 4 : 2);
#pragma unroll
      for (int step = 0; step < k_steps; ++step) {
        if constexpr (codes) {
          const uint2 w = *reinterpret_cast<const uint2*>(from + step * 16);
          q[n][step][0] = convert_pair<T>(w.x), q[n][step][1] = convert_pair<T>(w.y);
        } else {
          q[n][step][0] = convert_pair<T>(*reinterpret_cast<const std::uint32_t*>(from + step * 16));
          q[n][step][1] = convert_pair<T>(*reinterpret_cast<const std::uint32_t*>(from + step * 16 + 8));
        }
      }
    }
    const int all_see = item.position + item.row / a.group + 1;  // what the first row sees, all do

    for (int page = item.page_begin; page < item.page_end; ++page) {
      wait_async<stages - 2>();
      __syncwarp();
      load_page(stage == 0 ? stages - 1 : stage - 1);
      const std::uint32_t k_at = shared_address(ring + stage * Shape::stage_bytes), v_at = k_at + Shape::kv_bytes;
      float s[Tiles][4] = {};
#pragma unroll
      for (int step = 0; step < k_steps; ++step) {
        std::uint32_t k[4];
        if constexpr (codes) {
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int row = warp * 16 + e * 8 + g;
            constexpr int row_chunks = HeadDim / 16;
            std::uint32_t w;
            asm volatile("ld.shared.u32 %0, [%1];" : "=r"(w) : "r"(k_at + row * HeadDim + (step ^ (row * row_chunks / 8 & (row_chunks - 1))) * 16 + c * 4) : "memory");
            k[e] = bytes_to_pair<F, 0, 1>(w), k[e + 2] = bytes_to_pair<F, 2, 3>(w);
          }
        } else {
          const int row = warp * 16 + lane % 16, chunk = step % 4 * 2 + lane / 16;
          load_matrices(k, k_at + step / 4 * page_positions * 128 + row * 128 + ((chunk ^ (row & 7)) << 4));
        }
#pragma unroll
        for (int n = 0; n < Tiles; ++n) mma<T>(s[n], k, q[n][step][0], q[n][step][1]);
      }
      // s[n][e]: position warp * 16 + g + e / 2 * 8, row n * 8 + 2 c + e % 2
      float k_scale[2] = {scale, scale}, v_scale[2] = {1, 1};
      if constexpr (scaled) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const unsigned char* at = ring + stage * Shape::stage_bytes + Shape::values_bytes + (warp * 16 + e * 8 + g) * 4;
          const bool exists = page * page_positions + warp * 16 + e * 8 + g < item.length;  // others' scales are anything; P is 0 there, but 0 times a NaN is none
          k_scale[e] *= *reinterpret_cast<const float*>(at), v_scale[e] = exists ? *reinterpret_cast<const float*>(at + Shape::kv_bytes) : 0.0f;
        }
      }
      const bool masked = (page + 1) * page_positions > all_see;
      std::uint32_t p[Tiles][2];
      bool rescale = false;
      float factor[Tiles][2];
#pragma unroll
      for (int n = 0; n < Tiles; ++n) {
        float most[2];
#pragma unroll
        for (int e = 0; e < 4; ++e) s[n][e] *= k_scale[e / 2];
        if (masked) {
#pragma unroll
          for (int e = 0; e < 4; ++e)
            if (page * page_positions + warp * 16 + g + e / 2 * 8 >= seen[n][e % 2]) s[n][e] = -INFINITY;
        }
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          most[e] = fmaxf(s[n][e], s[n][e + 2]);
          for (int i = 4; i < 32; i <<= 1) most[e] = fmaxf(most[e], __shfl_xor_sync(~0u, most[e], i));
          const float now = fmaxf(max[n][e], most[e]), base = now == -INFINITY ? 0.0f : now;
          factor[n][e] = exp2_fast(max[n][e] - base);
          rescale |= now > max[n][e];
          max[n][e] = now;
          s[n][e] = exp2_fast(s[n][e] - base), s[n][e + 2] = exp2_fast(s[n][e + 2] - base);
          sum[n][e] = sum[n][e] * factor[n][e] + (s[n][e] + s[n][e + 2]);
        }
        p[n][0] = transpose_matrix(pair<T>(s[n][0] * v_scale[0], s[n][1] * v_scale[0]));
        p[n][1] = transpose_matrix(pair<T>(s[n][2] * v_scale[1], s[n][3] * v_scale[1]));
      }
      if (__any_sync(~0u, rescale)) {
#pragma unroll
        for (int m = 0; m < d_tiles; ++m)
#pragma unroll
          for (int n = 0; n < Tiles; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) o[m][n][e] *= factor[n][e % 2];
      }
#pragma unroll
      for (int m = 0; m < d_tiles; ++m) {
        std::uint32_t v[4];
        const int row = warp * 16 + lane / 16 * 8 + lane % 8;
        if constexpr (codes) {
          // ldmatrix turns pairs of bytes: a word has values 2g and 2g + 1 of two positions, which become rows g and g + 8 of the operand.
          constexpr int row_chunks = HeadDim / 16;
          std::uint32_t r0, r1;
          const int at = warp * 16 + lane % 16;
          asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(r0), "=r"(r1)
                       : "r"(v_at + at * HeadDim + (m ^ (at * row_chunks / 8 & (row_chunks - 1))) * 16) : "memory");
          v[0] = bytes_to_pair<F, 0, 2>(r0), v[1] = bytes_to_pair<F, 1, 3>(r0), v[2] = bytes_to_pair<F, 0, 2>(r1), v[3] = bytes_to_pair<F, 1, 3>(r1);
        } else {
          load_matrices_transposed(v, v_at + m / 4 * page_positions * 128 + row * 128 + (((m % 4 * 2 + lane / 8 % 2) ^ (row & 7)) << 4));
        }
#pragma unroll
        for (int n = 0; n < Tiles; ++n) mma<T>(o[m][n], v, p[n][0], p[n][1]);
      }
      stage = stage + 1 == stages ? 0 : stage + 1;
    }

    // The warps' results to a common maximum, added in the order of the warps.
#pragma unroll
    for (int n = 0; n < Tiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        for (int i = 4; i < 32; i <<= 1) sum[n][e] += __shfl_xor_sync(~0u, sum[n][e], i);
        if (g == 0) warp_max[warp * rows + n * 8 + c * 2 + e] = max[n][e], warp_sum[warp * rows + n * 8 + c * 2 + e] = sum[n][e];
      }
    __syncthreads();
    float weight[Tiles][2];
#pragma unroll
    for (int n = 0; n < Tiles; ++n)
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int row = n * 8 + c * 2 + e;
        const float top = fmaxf(fmaxf(warp_max[row], warp_max[rows + row]), fmaxf(warp_max[2 * rows + row], warp_max[3 * rows + row])), base = top == -INFINITY ? 0.0f : top;
        weight[n][e] = exp2_fast(max[n][e] - base);
        if (warp == 0 && g == 0) {
          float total = 0;
          for (int w = 0; w < 4; ++w) total += exp2_fast(warp_max[w * rows + row] - base) * warp_sum[w * rows + row];
          tile_max[row] = top, tile_sum[row] = total;
        }
      }
    for (int w = 0; w < 4; ++w) {
      if (w == warp)
#pragma unroll
        for (int m = 0; m < d_tiles; ++m)
#pragma unroll
          for (int n = 0; n < Tiles; ++n)
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              float& to = result[(n * 8 + c * 2 + e % 2) * Shape::pitch + m * 16 + (codes ? 2 * g + e / 2 : g + e / 2 * 8)];
              to = (w ? to : 0.0f) + o[m][n][e] * weight[n][e % 2];
            }
      __syncthreads();
    }
    finish_tile(a, item, result, Shape::pitch, tile_max, tile_sum, flag);
    // The next writes to `result` come behind the first barrier at the end of the next item.
    if (item.next < 0) break;
    item = load_item(a.items + item.next);
  }
}

}  // namespace tinyllama::cuda
