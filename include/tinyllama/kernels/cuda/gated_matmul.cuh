// out [m, n] = silu(x W_gate^T) (x W_up^T) of bf16 for many rows of x, on Hopper: one pass over memory less than the product and swiglu apart.
//
// A block computes 128 rows and N / 2 columns: two warpgroups of 64 rows each hold N sums a row, of gate's and of up's columns, so that a thread has both
// factors of its elements. A warp keeps the copy engine ahead by S stages of 64 columns of k. Two blocks, one below the other, share their tiles of W: one
// fetches gate's rows for both, the other up's. Blocks stay and take tiles in turn.
#pragma once

#include "tinyllama/device/cuda_runtime.cuh"
#include "tinyllama/kernels/cuda/tensor_map.cuh"
#include "tinyllama/kernels/cuda/vectors.cuh"
#include "tinyllama/kernels/cuda/wgmma.cuh"

namespace tinyllama::cuda {

/// Rows of x, gate, up and out lie ld elements apart.
struct GatedTask {
  const bf16 *x, *gate, *up;  // [m, k], [n, k], [n, k]
  index_t ldx, ldw;
  bf16* out;                  // [m, n]
  index_t ld_out;
  int m, n, k;
  bf16* kept = nullptr;       // [m, 2 n]: both factors, of whose rounded values out is then made
  index_t ld_kept = 0;
};

namespace gated {

inline constexpr int rows = 128, depth = 64, threads = 384;

struct Launch {
  CUtensorMap x, gate, up;
  bf16 *out, *kept;
  index_t ld_out, ld_kept;
  int m, n, k, pairs, columns;  // tiles: pairs of blocks along m, columns along n
};

template <int N>
struct Shape {
  static constexpr int x_bytes = rows * depth * 2, w_bytes = N * depth * 2, stage = x_bytes + w_bytes, stages = 220 * 1024 / stage;
  static constexpr int memory = stages * stage + 1024 + 16 * stages;  // 1024: swizzled tiles begin at multiples of it
};

__device__ __forceinline__ std::uint32_t rounded2(float a, float b) {
  std::uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
  return r;
}
__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }
/// Among four neighbouring lanes: word j of lane i becomes word i of lane j.
__device__ __forceinline__ void transpose4(std::uint32_t (&w)[4], int lane) {
  const bool odd = lane & 1, high = lane & 2;
  std::uint32_t a = __shfl_xor_sync(~0u, odd ? w[0] : w[1], 1), b = __shfl_xor_sync(~0u, odd ? w[2] : w[3], 1);
  if (odd) w[0] = a, w[2] = b;
  else w[1] = a, w[3] = b;
  a = __shfl_xor_sync(~0u, high ? w[0] : w[2], 2), b = __shfl_xor_sync(~0u, high ? w[1] : w[3], 2);
  if (high) w[0] = a, w[1] = b;
  else w[2] = a, w[3] = b;
}
/// Tile number i: eight pairs of blocks along m for each column, so that what the card works on at a time stays in L2.
__device__ __forceinline__ int2 pair_and_column(const Launch& t, int i) {
  constexpr int together = 8;
  const int group = i / (together * t.columns), within = i % (together * t.columns), height = min(together, t.pairs - group * together);
  return {group * together + within % height, within / height};
}

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <int N, bool Keep>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(threads, 1) kernel(const __grid_constant__ Launch t) {
  using namespace hopper;
  using S = Shape<N>;
  constexpr int half = N / 2;
  extern __shared__ std::byte memory[];
  const std::uint32_t base = (static_cast<std::uint32_t>(__cvta_generic_to_shared(memory)) + 1023) / 1024 * 1024;
  const std::uint32_t full = base + S::stages * S::stage, empty = full + 8 * S::stages;
  const int warpgroup = static_cast<int>(threadIdx.x) / 128, rank = cluster_rank(), cluster = static_cast<int>(blockIdx.x) / 2, clusters = static_cast<int>(gridDim.x) / 2;
  const int tiles = t.pairs * t.columns, steps = (t.k + depth - 1) / depth;
  if (threadIdx.x == 0) {
    for (int s = 0; s < S::stages; ++s) init_barrier(full + 8 * s, 1), init_barrier(empty + 8 * s, 4);  // both warpgroups of both blocks
    fence_barrier_init();
  }
  sync_cluster();
  int s = 0, parity = 0;
  const auto next = [&] {
    if (++s == S::stages) s = 0, parity ^= 1;
  };
  if (warpgroup == 0) {
    give_registers<40>();
    if (threadIdx.x == 0) {
      for (int tile = cluster; tile < tiles; tile += clusters) {
        const int2 at = pair_and_column(t, tile);
        const int row = (2 * at.x + rank) * rows, column = at.y * half;
        for (int k = 0; k < steps; ++k, next()) {
          wait(empty + 8 * s, parity ^ 1);
          const std::uint32_t x = base + s * S::stage, w = x + S::x_bytes;
          arrive_expect(full + 8 * s, S::stage);
          copy_box(x, t.x, k * depth, row, full + 8 * s);
          if (rank == 0) copy_box_to_both(w, t.gate, k * depth, column, full + 8 * s);
          else copy_box_to_both(w + S::w_bytes / 2, t.up, k * depth, column, full + 8 * s);
        }
      }
    }
  } else {
    take_registers<232>();
    const int thread = static_cast<int>(threadIdx.x) % 128, lane = thread % 32, band = (warpgroup - 1) * 64;
    float sum[N / 2];
    for (int tile = cluster; tile < tiles; tile += clusters) {
      const int2 at = pair_and_column(t, tile);
      int before = -1;
      const auto release = [&] {
        if (before >= 0 && thread < 2) arrive_at(empty + 8 * before, thread);
      };
      for (int k = 0; k < steps; ++k, next()) {
        wait(full + 8 * s, parity);
        const std::uint32_t x = base + s * S::stage;
        const std::uint64_t a = operand(x + band * depth * 2, 1024, 16), b = operand(x + S::x_bytes, 1024, 16);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < depth / 16; ++i) wgmma_shared(sum, a + 2 * i, b + 2 * i, k + i);
        wgmma_commit();
        wgmma_wait<1>();
        release();
        before = s;
      }
      wgmma_wait<0>();
      release();
      pin(sum);
      constexpr int octets = half / 8;  // of columns: a lane has two columns of each, its three neighbours the others
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = (2 * at.x + rank) * rows + band + thread / 32 * 16 + lane / 4 + 8 * h;
#pragma unroll
        for (int j = 0; j < octets; j += 4) {
          std::uint32_t w[4] = {}, gate[4] = {}, up[4] = {};
#pragma unroll
          for (int i = 0; i < 4 && j + i < octets; ++i) {
            const int g = 4 * (j + i) + 2 * h, u = g + 4 * octets;
            float a = sum[g], b = sum[g + 1], c = sum[u], d = sum[u + 1];
            if constexpr (Keep) {
              gate[i] = rounded2(a, b), up[i] = rounded2(c, d);
              a = __uint_as_float(gate[i] << 16), b = __uint_as_float(gate[i] & 0xffff0000), c = __uint_as_float(up[i] << 16), d = __uint_as_float(up[i] & 0xffff0000);
            }
            w[i] = rounded2(silu(a) * c, silu(b) * d);
          }
          const int own = 8 * (j + lane % 4), column = at.y * half + own;
          const auto store = [&](std::uint32_t(&words)[4], bf16* to) {
            transpose4(words, lane % 4);
            if (row < t.m && own < half && column < t.n) *reinterpret_cast<uint4*>(to + column) = make_uint4(words[0], words[1], words[2], words[3]);
          };
          store(w, t.out + row * t.ld_out);
          if constexpr (Keep) {
            store(gate, t.kept + row * t.ld_kept);
            store(up, t.kept + row * t.ld_kept + t.n);
          }
        }
      }
    }
  }
  sync_cluster();
}

#else
template <int N, bool Keep>
__global__ void kernel(const __grid_constant__ Launch) { __trap(); }  // see hopper::compiled
#endif

/// Rounds of tiles that the card takes, in columns, the end of a tile at some 16 of them.
template <int N>
index_t cost(const GatedTask& t, int multiprocessors) {
  return ceil_div(ceil_div(t.m, 2 * rows) * ceil_div(t.n, N / 2), multiprocessors / 2) * (N + 16);
}

template <int N, bool Keep>
void launch(cudaStream_t stream, const GatedTask& t, int multiprocessors) {
  check(cudaFuncSetAttribute(kernel<N, Keep>, cudaFuncAttributeMaxDynamicSharedMemorySize, Shape<N>::memory), "cudaFuncSetAttribute", "gated_matmul");
  const Launch l{tensor_map(t.x, t.m, t.k, t.ldx, rows), tensor_map(t.gate, t.n, t.k, t.ldw, N / 2), tensor_map(t.up, t.n, t.k, t.ldw, N / 2), t.out, t.kept, t.ld_out, t.ld_kept, t.m, t.n, t.k,
                 static_cast<int>(ceil_div(t.m, 2 * rows)), static_cast<int>(ceil_div(t.n, N / 2))};
  kernel<N, Keep><<<static_cast<unsigned>(multiprocessors / 2 * 2), threads, Shape<N>::memory, stream>>>(l);
  launched("gated_matmul");
}

}  // namespace gated

/// For compute capability 9.0 (hopper::compiled). False where it is not for the shape: below 512 rows the product and swiglu apart are faster.
inline bool gated_matmul(cudaStream_t stream, const GatedTask& t, int multiprocessors) {
  const auto odd = [](const void* p, index_t ld) { return reinterpret_cast<std::uintptr_t>(p) % 16 != 0 || ld % 8 != 0; };
  if (t.m < 512 || t.n % 8 != 0 || odd(t.x, t.ldx) || odd(t.gate, t.ldw) || odd(t.up, t.ldw) || odd(t.out, t.ld_out) || odd(t.kept, t.ld_kept)) return false;
  if (t.kept) gated::launch<256, true>(stream, t, multiprocessors);
  else if (gated::cost<256>(t, multiprocessors) <= gated::cost<176>(t, multiprocessors)) gated::launch<256, false>(stream, t, multiprocessors);
  else gated::launch<176, false>(stream, t, multiprocessors);
  return true;
}

}  // namespace tinyllama::cuda
