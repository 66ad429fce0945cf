// y [m, n] = x [m, k] W [n, k]^T of packed formats for up to 256 rows of x, on Hopper: batched decoding, whose time is that of reading W once. For bf16: cluster_gemm.cuh.
//
// The operands change places: 64 rows of W are the rows of a warpgroup's product, the batch its N columns (32, 64, 128 or 256). A block has 128 rows of W
// and walks along k in units of 128 columns. Of its three warpgroups one brings x and W into two rings in shared memory; two multiply. W arrives packed (16-byte
// copies of two warps); each thread turns blocks of 32 columns into bf16 in a buffer of its warpgroup. The scales that rows of f8_e4m3 have multiply the sums.
//
// All units of all tiles, in order, are cut into equal runs, one for each block of a grid of one block an SM, so that every SM reads as much. Where several
// blocks share a tile each leaves its sums in `partial`, and when all have, each adds up some of the batch's columns, the blocks' sums in their order.
// The order of a sum depends on n, k, the format and the card only, not on m or on the other rows.
//
// W depends on no kernel before: its ring fills while that one ends (dependent.cuh).
#pragma once

#include "tinyllama/kernels/cuda/dependent.cuh"
#include "tinyllama/kernels/cuda/stream_task.cuh"
#include "tinyllama/kernels/cuda/stream_unit.cuh"
#include "tinyllama/kernels/cuda/tensor_map.cuh"
#include "tinyllama/kernels/cuda/vectors.cuh"
#include "tinyllama/kernels/cuda/wgmma.cuh"

namespace tinyllama::cuda {

namespace stream {

inline constexpr int threads = 384, most_m = 256, depth = 64;  // depth: columns of x in a stage
constexpr bool takes(Format f) { return f != Format::f32 && f != Format::bf16; }
/// Rows of x up to which it is the faster way, by measurement (H100): above, weights are expanded for the library, or x is quantised (f8_e4m3).
constexpr index_t most_rows(Format f) { return f == Format::f8_e4m3 ? 64 : takes(f) ? 128 : 0; }
/// Of `partial` for a card: sums of 128 rows and 256 columns of two tiles for each block.
constexpr std::size_t partial_bytes(int multiprocessors) { return 2 * static_cast<std::size_t>(multiprocessors) * rows * most_m * sizeof(float); }
/// For each block and warpgroup the number of products so far, which is the same for all, and a flag for each of two tiles that takes that number when the
/// block's sums are there. Zero before the first product.
constexpr std::size_t flags_bytes(int multiprocessors) { return 6 * static_cast<std::size_t>(multiprocessors) * sizeof(unsigned); }

template <Format F, int N>
struct Shape {
  static constexpr int unit = 128;
  static constexpr int x_bytes = N * depth * 2, x_stages = N == 256 ? (F == Format::f16 ? 2 : 3) : N == 128 ? 4 : 8;
  static constexpr int buffer = 64 * unit * 2, buffers = 2;  // of a warpgroup
  static constexpr int w_bytes = rows * Piece<F>::pitch;
  static constexpr int room = 225 * 1024 - x_stages * x_bytes - 2 * buffers * buffer, w_stages = room / w_bytes < 16 ? room / w_bytes : 16;
  static_assert(w_stages >= 2);
  static constexpr int w_at = x_stages * x_bytes + 2 * buffers * buffer, barriers_at = w_at + w_stages * w_bytes, memory = barriers_at + 16 * (x_stages + w_stages) + 1024;
};

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

__device__ __forceinline__ int first_unit(const Launch& t, int block) { return static_cast<int>(static_cast<std::int64_t>(t.units) * t.tiles * min(block, t.blocks) / t.blocks); }

/// The block whose run has a unit.
__device__ __forceinline__ int block_of(const Launch& t, int unit) {
  const std::int64_t all = static_cast<std::int64_t>(t.units) * t.tiles;
  return static_cast<int>(((unit + std::int64_t{1}) * t.blocks + all - 1) / all) - 1;
}

template <Format F, int N>
__global__ void __launch_bounds__(N == 256 ? threads : N == 128 ? 512 : 640, 1) kernel(const __grid_constant__ Launch t) {
  using namespace hopper;
  using S = Shape<F, N>;
  constexpr int parts = N == 256 ? 2 : 1, width = N / parts;  // products of at most 128 columns
  extern __shared__ std::byte stream_memory[];
  std::byte* const memory = stream_memory + (1024 - (static_cast<std::uint32_t>(__cvta_generic_to_shared(stream_memory)) & 1023)) % 1024;
  const std::uint32_t base = static_cast<std::uint32_t>(__cvta_generic_to_shared(memory));
  const std::uint32_t x_full = base + S::barriers_at, x_empty = x_full + 8 * S::x_stages, w_full = x_empty + 8 * S::x_stages, w_empty = w_full + 8 * S::w_stages;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int block = static_cast<int>(blockIdx.x);
  const int begin = first_unit(t, block), end = first_unit(t, block + 1);
  if (threadIdx.x == 0) {
    for (int s = 0; s < S::x_stages; ++s) init_barrier(x_full + 8 * s, 1), init_barrier(x_empty + 8 * s, 8);
    for (int s = 0; s < S::w_stages; ++s) init_barrier(w_full + 8 * s, 64), init_barrier(w_empty + 8 * s, 8);
    fence_barrier_init();
  }
  __syncthreads();
  let_next_begin();
  if (warp < 4) {
    if (warp == 0 && lane == 0) {  // x
      wait_for_previous();
      int s = 0, parity = 1;
      for (int u = begin; u < end; ++u)
        for (int h = 0; h < S::unit / depth; ++h) {
          wait(x_empty + 8 * s, parity);
          arrive_expect(x_full + 8 * s, t.x_rows * depth * 2);
          copy_box(base + s * S::x_bytes, t.x, u % t.units * S::unit + h * depth, 0, x_full + 8 * s);
          if (++s == S::x_stages) s = 0, parity ^= 1;
        }
    } else if (warp >= 2) {  // W
      int s = 0, parity = 1;
      for (int u = begin; u < end; ++u) {
        wait(w_empty + 8 * s, parity);
        const std::uint32_t to = base + S::w_at + s * S::w_bytes;
        copy_unit<F>(t, u / t.units, u % t.units, to, static_cast<int>(threadIdx.x) - 64);
        arrive_after_copies(w_full + 8 * s);
        if (++s == S::w_stages) s = 0, parity ^= 1;
      }
      asm volatile("cp.async.wait_all;" ::: "memory");
    }
    return;
  }
  const int group = warp / 4 - 1, thread = static_cast<int>(threadIdx.x) % 128, g = lane / 4, c = lane % 4;
  int x_stage = 0, x_parity = 0, w_stage = 0, w_parity = 0, buffer = 0;
  float sum[parts][width / 2];
  const auto multiply = [&](std::uint32_t a) {  // by the next stage of x
    wait(x_full + 8 * x_stage, x_parity);
    const std::uint32_t x = base + x_stage * S::x_bytes;
    wgmma_fence();
#pragma unroll
    for (int i = 0; i < depth / 16; ++i)
#pragma unroll
      for (int p = 0; p < parts; ++p) wgmma_shared(sum[p], operand_rows(a, i), operand_rows(x + p * width * 128, i), 1);
    if (++x_stage == S::x_stages) x_stage = 0, x_parity ^= 1;
  };
  int held_x = 0;  // the first stage that products not yet waited for read
  const auto release = [&](bool any) {
    if (!any || lane != 0) return;
    int s = held_x;
    for (int i = 0; i < S::unit / depth; ++i) {
      arrive(x_empty + 8 * s);
      if (++s == S::x_stages) s = 0;
    }
  };
  const int octets = t.x_rows / 8;
  const auto partial = [&](int b, bool at_end) { return reinterpret_cast<float4*>(t.partial) + static_cast<index_t>(4 * b + 2 * at_end + group) * (most_m / 8 * 128) + thread; };
  const auto flag = [&](int b, bool at_end) { return t.flags + 6 * b + 3 * group + 1 + at_end; };
  float2 scale = make_float2(1, 1);  // of the two rows
  const auto find_scale = [&](int tile) {
    if constexpr (row_end_bytes(F) != 0) {
      const int group16 = min(group * 4 + warp % 4, (t.n - tile * t.tile_rows) / t.next_group - 1), row = tile * t.tile_rows + g * t.next_row + group16 * t.next_group;
      const auto of = [&](int r) { return __ldg(reinterpret_cast<const float*>(t.packed + (r + 1) * t.row_bytes - row_end_bytes(F))); };
      scale = make_float2(of(row), of(row + t.next_half));
    }
  };
  const auto store = [&](int tile, int octet, float4 v) {  // a thread has rows g and g + 8 of its warp's 16: neighbours in y, or gate and up of one element
    const int column = tile * t.tile_rows + (t.gated ? (group * 4 + warp % 4) * 8 + g : (group * 4 + warp % 4) * 16 + 2 * g);
    if (column >= t.n) return;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = 8 * octet + 2 * c + e;
      float a = e ? v.y : v.x, b = e ? v.w : v.z;
      if constexpr (row_end_bytes(F) != 0) a *= scale.x, b *= scale.y;
      if (row >= t.m) continue;
      const index_t at = row * t.ldy + column;
      if (t.gated) {
        static_cast<bf16*>(t.y)[at] = from_float<bf16>(__fdividef(a, 1.0f + __expf(-a)) * b);
      } else if (t.float_out) {
        if (t.add) {
          const float2 w = *reinterpret_cast<const float2*>(static_cast<const float*>(t.add) + at);
          a += w.x, b += w.y;
        }
        *reinterpret_cast<float2*>(static_cast<float*>(t.y) + at) = make_float2(a, b);
      } else {
        if (t.add) {
          const float2 w = bf16_pair_to_float(*reinterpret_cast<const std::uint32_t*>(static_cast<const bf16*>(t.add) + at));
          a += w.x, b += w.y;
        }
        *reinterpret_cast<std::uint32_t*>(static_cast<bf16*>(t.y) + at) = pair<bf16>(a, b);
      }
    }
  };
  wait_for_previous();
  unsigned* const number = t.flags + 6 * block + 3 * group;
  const unsigned now = *number + 1;  // as every block counts
  named_wait(1 + group, 128);
  for (int u = begin; u < end;) {
    const int tile = u / t.units, first = u % t.units, count = min(end - u, t.units - first);
    find_scale(tile);
#pragma unroll
    for (int p = 0; p < parts; ++p)
#pragma unroll
      for (int i = 0; i < width / 2; ++i) sum[p][i] = 0;
    for (int i = 0; i < count; ++i, ++u) {
      wait(w_full + 8 * w_stage, w_parity);
      const int row = thread / 32 * 16 + lane % 16;
      const std::byte* const piece = memory + S::w_at + w_stage * S::w_bytes + (group * 64 + row) * Piece<F>::pitch;
      const std::uint32_t to = base + S::x_stages * S::x_bytes + (group * S::buffers + buffer) * S::buffer;
#pragma unroll
      for (int h = 0; h < 2; ++h) expand<F>(to + h * (S::buffer / 2), piece, row, lane / 16, 2 * h + lane / 16, first + i);
      wgmma_wait<0>();  // the products of the other buffer
      release(i > 0);
      fence_async_proxy();
      __syncwarp();
      if (lane == 0) arrive(w_empty + 8 * w_stage);
      named_wait(1 + group, 128);
      held_x = x_stage;
#pragma unroll
      for (int h = 0; h < 2; ++h) multiply(to + h * (S::buffer / 2));
      wgmma_commit();
      buffer ^= 1;
      if (++w_stage == S::w_stages) w_stage = 0, w_parity ^= 1;
    }
    wgmma_wait<0>();
    release(true);
#pragma unroll
    for (int p = 0; p < parts; ++p) pin(sum[p]);

    if (count == t.units) {
#pragma unroll
      for (int p = 0; p < parts; ++p)
#pragma unroll
        for (int j = 0; j < width / 8; ++j) store(tile, p * width / 8 + j, make_float4(sum[p][4 * j], sum[p][4 * j + 1], sum[p][4 * j + 2], sum[p][4 * j + 3]));
      continue;
    }
    float4* const to = partial(block, first == 0);
#pragma unroll
    for (int p = 0; p < parts; ++p)
#pragma unroll
      for (int j = 0; j < width / 8; ++j)
        if (p * width / 8 + j < octets) __stcg(to + (p * width / 8 + j) * 128, make_float4(sum[p][4 * j], sum[p][4 * j + 1], sum[p][4 * j + 2], sum[p][4 * j + 3]));
    named_wait(1 + group, 128);
    if (thread == 0) asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag(block, first == 0)), "r"(now) : "memory");
  }

  // The tiles that this block shares with others: that of its first unit, and that of its last.
  for (int i = 0; i < 2 && begin < end; ++i) {
    const int tile = (i == 0 ? begin : end - 1) / t.units, from = block_of(t, tile * t.units), last = block_of(t, (tile + 1) * t.units - 1), count = last - from + 1;
    if (count == 1 || (i == 1 && tile == begin / t.units)) continue;
    for (int b = from + thread; b <= last; b += 128) {
      unsigned there;
      do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(there) : "l"(flag(b, b == from)) : "memory");
      while (there != now);
    }
    named_wait(1 + group, 128);
    // This block's octets of columns are each count-th; all their loads, of one octet after the other, go out 16 at a time.
    constexpr int together = 16;
    find_scale(tile);
    float4 s = make_float4(0, 0, 0, 0);
    int next = block - from, next_from = from, at = next, at_from = from;
    while (at < octets) {
      float4 v[together];
#pragma unroll
      for (int e = 0; e < together; ++e) {
        if (next < octets) v[e] = __ldcg(partial(next_from, next_from == from) + next * 128);
        if (++next_from > last) next_from = from, next += count;
      }
#pragma unroll
      for (int e = 0; e < together; ++e) {
        if (at >= octets) break;
        s.x += v[e].x, s.y += v[e].y, s.z += v[e].z, s.w += v[e].w;
        if (++at_from > last) {
          store(tile, at, s);
          s = make_float4(0, 0, 0, 0);
          at_from = from, at += count;
        }
      }
    }
  }
  if (thread == 0) *number = now;
}

#else
template <Format F, int N>
__global__ void kernel(const __grid_constant__ Launch) { __trap(); }  // see hopper::compiled
#endif

template <Format F, int N>
void launch(cudaStream_t stream, const StreamTask& t, int multiprocessors, float* partial, unsigned* flags) {
  using S = Shape<F, N>;
  const bool gated = t.up != nullptr;
  Launch l{};
  l.packed = t.w, l.row_bytes = packed_row_bytes(F, t.k);
  l.n = static_cast<int>(t.n), l.k = static_cast<int>(t.k), l.m = static_cast<int>(t.m), l.x_rows = static_cast<int>(ceil_div(t.m, 8) * 8);
  l.tile_rows = gated ? rows / 2 : rows;
  l.units = static_cast<int>(ceil_div(t.k, S::unit)), l.tiles = static_cast<int>(ceil_div(t.n, l.tile_rows));
  l.next_row = gated ? 1 : 2, l.next_half = gated ? static_cast<int>((t.up - t.w) / l.row_bytes) : 1, l.next_group = gated ? 8 : 16;
  l.y = t.y, l.add = t.add, l.ldy = t.ldy, l.float_out = t.float_out, l.gated = gated, l.partial = partial, l.flags = flags;
  l.x = tensor_map(t.x, t.m, t.k, t.ldx, l.x_rows);
  check(cudaFuncSetAttribute(kernel<F, N>, cudaFuncAttributeMaxDynamicSharedMemorySize, S::memory), "cudaFuncSetAttribute", "stream_gemm");
  l.blocks = std::min(multiprocessors, l.units * l.tiles);
  launch_dependent(kernel<F, N>, dim3(static_cast<unsigned>(multiprocessors)), threads, S::memory, stream, "stream_gemm", l);
}

}  // namespace stream

/// For compute capability 9.0 (hopper::compiled). False where it is not for the shape or its addresses. partial [stream::partial_bytes]: what it likes;
/// flags [stream::flags_bytes]: for one product at a time.
inline bool stream_gemm(cudaStream_t stream, const StreamTask& t, int multiprocessors, float* partial, unsigned* flags) {
  const auto odd = [](const void* p, index_t ld, std::size_t unit, index_t elements) { return reinterpret_cast<std::uintptr_t>(p) % unit != 0 || ld % elements != 0; };
  const std::size_t two = t.float_out ? 8 : 4;
  if (!stream::takes(t.format) || t.scales || t.norm || t.m < 1 || t.m > stream::most_m || t.n % 16 != 0 || t.k % 128 != 0) return false;
  if (odd(t.w, 0, 16, 1) || odd(t.x, t.ldx, 16, 8) || odd(t.y, t.ldy, two, 2) || odd(t.add, t.ldy, two, 2)) return false;
  if (t.up && (t.float_out || t.add || (t.up - t.w) % packed_row_bytes(t.format, t.k) != 0 || t.up < t.w)) return false;
  visit(t.format, [&]<Format F>() {
    if constexpr (stream::takes(F)) {
      if (t.m <= 32) stream::launch<F, 32>(stream, t, multiprocessors, partial, flags);
      else if (t.m <= 64) stream::launch<F, 64>(stream, t, multiprocessors, partial, flags);
      else if (t.m <= 128) stream::launch<F, 128>(stream, t, multiprocessors, partial, flags);
      else stream::launch<F, 256>(stream, t, multiprocessors, partial, flags);
    }
  });
  return true;
}

}  // namespace tinyllama::cuda
