// Products x W^T of bf16 for many rows of x on Hopper, by their ends: what becomes of a tile's sums while they are in registers (gated_matmul, sum_matmul).
//
// A block computes 128 rows and N columns: two warpgroups of 64 rows each hold N sums a row. Two warps keep the copy engine ahead by S stages of 64 columns of
// k, one of x and one of W: a single thread's copies would take longer than a narrow tile's products. Two blocks, one below the other, share their tiles of W: each
// fetches half of W's rows for both. Blocks stay and take tiles in turn. Where W depends on no kernel before (`early`), stages fill with it while that one ends
// (dependent.cuh).
//
// An End is a struct that travels with the launch:
//   columns                                 N
//   extra                                   stages behind those of k that it fills itself, of its own block's rows, in one ring with the others:
//   extra_bytes(), copy_extra(i, ...)       so that they come while the last products run
//   copy_w(...)                             the half of W's tile that a block fetches
//   Row, row(i)                             what is to be known of row i of x: found by warps that have nothing else to do while the products run
//   finish(sum, place, rows, ring)          what becomes of the sums; it waits for its extra stages and gives them back
#pragma once

#include "tinyllama/kernels/cuda/dependent.cuh"
#include "tinyllama/kernels/cuda/row_scale.cuh"
#include "tinyllama/kernels/cuda/tensor_map.cuh"
#include "tinyllama/kernels/cuda/vectors.cuh"
#include "tinyllama/kernels/cuda/wgmma.cuh"

namespace tinyllama::cuda {

namespace tiles {

inline constexpr int rows = 128, depth = 64, threads = 384;
enum Barrier { within = 1, rows_known = 3, rows_taken = 5 };  // one for each warpgroup

template <class End>
struct Launch {
  CUtensorMap x;
  int m, steps, pairs, columns;  // steps of 64 of k; tiles: pairs of blocks along m, columns along n
  bool early;
  End end;
};

template <int N>
struct Shape {
  static constexpr int x_bytes = rows * depth * 2, w_bytes = N * depth * 2, stage = x_bytes + w_bytes, stages = 220 * 1024 / stage;
  static constexpr int memory = stages * stage + 1024 + 16 * stages;  // 1024: swizzled tiles begin at multiples of it
};

/// Where a thread is in the ring of stages.
template <int N>
struct Ring {
  using S = Shape<N>;
  std::uint32_t base;
  int s = 0, parity = 0;
  __device__ __forceinline__ std::uint32_t stage() const { return base + s * S::stage; }
  __device__ __forceinline__ std::uint32_t full() const { return base + S::stages * S::stage + 8 * s; }
  __device__ __forceinline__ std::uint32_t empty() const { return full() + 8 * S::stages; }
  __device__ __forceinline__ void next() {
    if (++s == S::stages) s = 0, parity ^= 1;
  }
  /// A warpgroup is done with a stage: to both blocks, whose tiles of W come from both.
  __device__ __forceinline__ void release(std::uint32_t empty, int thread) const {
    if (thread < 2) hopper::arrive_at(empty, thread);
  }
};

/// A thread's sums: 4 j + i is row `row` + 8 (i / 2), column 8 j + 2 (lane % 4) + i % 2 of tile number `column`.
struct Place {
  int m, row, local, column;  // local: the row within the block's
  int warpgroup, thread, lane;
};

struct Nothing {};

__device__ __forceinline__ std::uint32_t rounded2(float a, float b) {
  std::uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
  return r;
}
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
/// By four neighbouring lanes together.
__device__ __forceinline__ float sum4(float v) {
  v += __shfl_xor_sync(~0u, v, 1);
  return v + __shfl_xor_sync(~0u, v, 2);
}
/// Tile number i: eight pairs of blocks along m for each column, so that what the card works on at a time stays in L2.
__device__ __forceinline__ int2 pair_and_column(int pairs, int columns, int i) {
  constexpr int together = 8;
  const int group = i / (together * columns), within = i % (together * columns), height = min(together, pairs - group * together);
  return {group * together + within % height, within / height};
}

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <class End>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(threads, 1) kernel(const __grid_constant__ Launch<End> t) {
  using namespace hopper;
  constexpr int N = End::columns;
  using S = Shape<N>;
  extern __shared__ std::byte memory[];
  __shared__ typename End::Row known[rows];
  Ring<N> ring{(static_cast<std::uint32_t>(__cvta_generic_to_shared(memory)) + 1023) / 1024 * 1024};
  const int warp = static_cast<int>(threadIdx.x) / 32, rank = cluster_rank(), cluster = static_cast<int>(blockIdx.x) / 2, clusters = static_cast<int>(gridDim.x) / 2;
  const int tiles = t.pairs * t.columns;
  let_next_begin();
  if (threadIdx.x == 0) {
    for (int s = 0; s < S::stages; ++s) init_barrier(ring.full() + 8 * s, 2), init_barrier(ring.empty() + 8 * s, 4);  // two warps that copy; both warpgroups of both blocks
    fence_barrier_init();
  }
  sync_cluster();
  if (warp < 4) {
    give_registers<40>();
    if (warp < 2) {
      if (threadIdx.x % 32 == 0) {
        const bool of_w = warp == 1;
        if (!of_w || !t.early) wait_for_previous();
        for (int tile = cluster; tile < tiles; tile += clusters) {
          const int2 at = pair_and_column(t.pairs, t.columns, tile);
          const int row = (2 * at.x + rank) * rows;
          for (int k = 0; k < t.steps; ++k, ring.next()) {
            wait(ring.empty(), ring.parity ^ 1);
            arrive_expect(ring.full(), of_w ? S::w_bytes : S::x_bytes);
            if (of_w) t.end.copy_w(ring.stage() + S::x_bytes, rank, k * depth, at.y, ring.full());
            else copy_box(ring.stage(), t.x, k * depth, row, ring.full());
          }
          if constexpr (End::extra > 0) {
            for (int i = 0; i < End::extra; ++i, ring.next()) {
              wait(ring.empty(), ring.parity ^ 1);
              if (of_w) {
                arrive(ring.full());
              } else {
                arrive_expect(ring.full(), End::extra_bytes());
                t.end.copy_extra(i, ring.stage(), row, at.y, ring.full());
              }
            }
          }
        }
      }
    } else if constexpr (End::rows_matter) {
      wait_for_previous();
      const int thread = static_cast<int>(threadIdx.x) - 64;
      for (int tile = cluster; tile < tiles; tile += clusters) {
        const int row = (2 * pair_and_column(t.pairs, t.columns, tile).x + rank) * rows + thread;
        typename End::Row found[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) found[i] = t.end.row(min(row + 64 * i, t.m - 1));
        if (tile != cluster) named_wait(rows_taken, 192), named_wait(rows_taken + 1, 192);
#pragma unroll
        for (int i = 0; i < 2; ++i) known[thread + 64 * i] = found[i];
        named_arrive(rows_known, 192), named_arrive(rows_known + 1, 192);
      }
    }
  } else {
    take_registers<232>();
    const int warpgroup = warp / 4 - 1, thread = static_cast<int>(threadIdx.x) % 128, lane = thread % 32, band = warpgroup * 64;
    wait_for_previous();
    float sum[N / 2];
    for (int tile = cluster; tile < tiles; tile += clusters) {
      const int2 at = pair_and_column(t.pairs, t.columns, tile);
      const int local = band + thread / 32 * 16 + lane / 4;
      const Place place{t.m, (2 * at.x + rank) * rows + local, local, at.y, warpgroup, thread, lane};
      std::uint32_t held = 0;  // the barrier of the stage that products not yet waited for read
      const auto release = [&] {
        if (held) ring.release(held, thread);
      };
      for (int k = 0; k < t.steps; ++k, ring.next()) {
        wait(ring.full(), ring.parity);
        const std::uint64_t a = operand(ring.stage() + band * depth * 2, 1024, 16), b = operand(ring.stage() + S::x_bytes, 1024, 16);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < depth / 16; ++i) wgmma_shared(sum, a + 2 * i, b + 2 * i, k + i);
        wgmma_commit();
        wgmma_wait<1>();
        release();
        held = ring.empty();
      }
      wgmma_wait<0>();
      release();
      pin(sum);
      typename End::Row of[2] = {};
      if constexpr (End::rows_matter) {
        named_wait(rows_known + warpgroup, 192);
        of[0] = known[local], of[1] = known[local + 8];
        if (tile + clusters < tiles) named_arrive(rows_taken + warpgroup, 192);
      }
      t.end.finish(sum, place, of, ring);
    }
  }
  sync_cluster();
}

#else
template <class End>
__global__ void kernel(const __grid_constant__ Launch<End>) { __trap(); }  // see hopper::compiled
#endif

/// Rounds of tiles that the card takes, in columns, the end of a tile at some 16 of them.
inline index_t cost(index_t m, index_t tiles_of_n, int n, int multiprocessors) { return ceil_div(ceil_div(m, 2 * rows) * tiles_of_n, multiprocessors / 2) * (n + 16); }

/// x [m, k], rows ldx apart; `columns`: tiles of W's rows.
template <class End>
void launch(cudaStream_t stream, const bf16* x, index_t m, index_t k, index_t ldx, index_t columns, bool early, const End& end, int multiprocessors, const char* name) {
  constexpr int memory = Shape<End::columns>::memory;
  check(cudaFuncSetAttribute(kernel<End>, cudaFuncAttributeMaxDynamicSharedMemorySize, memory), "cudaFuncSetAttribute", name);
  const Launch<End> l{tensor_map(x, m, k, ldx, rows), static_cast<int>(m), static_cast<int>(ceil_div(k, depth)), static_cast<int>(ceil_div(m, 2 * rows)), static_cast<int>(columns), early, end};
  const index_t clusters = std::min<index_t>(multiprocessors / 2, l.pairs * columns);
  launch_dependent(kernel<End>, dim3(static_cast<unsigned>(2 * clusters)), threads, memory, stream, name, l);
}

/// Whether rows of 16-bit elements, ld apart, can be copied in pieces of 16 bytes.
inline bool in_pieces(const void* p, index_t ld) { return reinterpret_cast<std::uintptr_t>(p) % 16 == 0 && ld % 8 == 0; }

}  // namespace tiles
}  // namespace tinyllama::cuda
