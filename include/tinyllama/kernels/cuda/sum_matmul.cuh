// y [m, n] = x W^T + residual in f32 for many rows of x of bf16, on Hopper, and half of the norm that follows: gain y in bf16 and sums of squares of y, so that
// the product that reads them multiplies its own sums by 1 / sqrt(mean(y^2) + eps) (RowScale) and no kernel is the norm's.
//
// The tiles of tile_matmul.cuh; the residual comes through their ring of stages behind the last of k, while the last products run.
#pragma once

#include "tinyllama/kernels/cuda/tile_matmul.cuh"

namespace tinyllama::cuda {

/// Rows of x, w, y and normed lie ld elements apart, those of residual as y's.
struct SumTask {
  const bf16 *x, *w;           // [m, k], [n, k]
  index_t ldx, ldw;
  const float* residual;       // [m, n]; may be y
  float* y;                    // [m, n]
  index_t ldy;
  int m, n, k;
  const float* gain = nullptr; // [n]; null: no norm
  bf16* normed = nullptr;      // [m, n]: gain y
  index_t ld_normed = 0;
  float* squares = nullptr;    // [m, sum_parts(...)]: of y's columns in each tile, and zeros up to a multiple of four (RowScale)
  bool early = false;          // w was written by no kernel that may still run
};

namespace tiles {

template <int N>
struct Sum {
  static constexpr int columns = N, half = N / 2, together = N < 128 ? 32 : 64, extra = N / together;  // columns of the residual in a stage
  static_assert(together * rows * 4 <= Shape<N>::stage);
  CUtensorMap w, residual;
  float* y;
  index_t ldy;
  int n;
  const float* gain;
  bf16* normed;
  index_t ld_normed;
  float* squares;
  int parts;

  __device__ __forceinline__ void copy_w(std::uint32_t to, int rank, int k, int column, std::uint32_t barrier) const {
    hopper::copy_box_to_both(to + rank * half * depth * 2, w, k, column * N + rank * half, barrier);
  }
  static constexpr __host__ __device__ int extra_bytes() { return together * rows * 4; }
  __device__ __forceinline__ void copy_extra(int i, std::uint32_t to, int row, int column, std::uint32_t barrier) const {
    for (int j = 0; j < together; j += 32) hopper::copy_box(to + j * rows * 4, residual, column * N + i * together + j, row, barrier);
  }
  static __device__ __forceinline__ float2 load2(std::uint32_t at) {
    float2 v;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(at) : "memory");
    return v;
  }
  using Row = Nothing;
  static constexpr bool rows_matter = false;
  template <class R>
  __device__ __forceinline__ void finish(float (&sum)[N / 2], const Place& p, const Row (&)[2], R& ring) const {
    constexpr int octets = together / 8;
    const int g = p.lane / 4, c = p.lane % 4;
    const bool odd = g & 1, high = c & 1;
    float all[2] = {};
#pragma unroll
    for (int e = 0; e < extra; ++e) {
      const int first = p.column * N + e * together;  // of n
      float2 gains[octets];
#pragma unroll
      for (int o = 0; o < octets; ++o) gains[o] = gain && first + 8 * o < n ? *reinterpret_cast<const float2*>(gain + first + 8 * o + 2 * c) : make_float2(0, 0);
      float v[4 * octets];  // not the sums themselves: as registers of products the compiler would guard them
      hopper::wait(ring.full(), ring.parity);
      // Boxes of [128 rows][32 columns], whose 16-byte chunk i of row r stands at i ^ (r & 7). Odd rows take octets in another order: no two of four rows are
      // then in the same banks.
#pragma unroll
      for (int j = 0; j < octets; j += 4)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const std::uint32_t row = ring.stage() + (8 * j * rows + (p.local + 8 * h) * 32) * 4;
#pragma unroll
          for (int o = 0; o < 2; ++o) {
            const int mine = odd ? o + 2 : o;
            const float2 a = load2(row + ((2 * mine + c / 2) ^ g) * 16 + c % 2 * 8), b = load2(row + ((2 * (mine ^ 2) + c / 2) ^ g) * 16 + c % 2 * 8);
            const int to = 4 * (j + o) + 2 * h, from = 4 * e * octets + to;
            v[to] = sum[from] + (odd ? b.x : a.x), v[to + 1] = sum[from + 1] + (odd ? b.y : a.y);
            v[to + 8] = sum[from + 8] + (odd ? a.x : b.x), v[to + 9] = sum[from + 9] + (odd ? a.y : b.y);
          }
        }
      hopper::named_wait(within + p.warpgroup, 128);
      ring.release(ring.empty(), p.thread);
      ring.next();
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int row = p.row + 8 * h;
#pragma unroll
        for (int o = 0; o < octets; o += 2) {  // four columns a lane: of the first octet even lanes, of the second odd ones
          const float *const a = v + 4 * o + 2 * h, *const b = a + 4;
          all[h] += a[0] * a[0] + a[1] * a[1] + b[0] * b[0] + b[1] * b[1];
          const float x0 = __shfl_xor_sync(~0u, high ? a[0] : b[0], 1), x1 = __shfl_xor_sync(~0u, high ? a[1] : b[1], 1);
          const int column = first + 8 * (o + c % 2) + c / 2 * 4;
          if (row < p.m && column < n) {
            const float4 four = high ? make_float4(x0, x1, b[0], b[1]) : make_float4(a[0], a[1], x0, x1);
            __stcs(reinterpret_cast<float4*>(y + row * ldy + column), four);  // not read before much else is
          }
        }
        if (gain) {
#pragma unroll
          for (int o = 0; o < octets; o += 4) {
            std::uint32_t words[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              const float* const a = v + 4 * (o + i) + 2 * h;
              words[i] = rounded2(a[0] * gains[o + i].x, a[1] * gains[o + i].y);
            }
            transpose4(words, c);
            const int column = first + 8 * (o + c);
            if (row < p.m && column < n) *reinterpret_cast<uint4*>(normed + row * ld_normed + column) = make_uint4(words[0], words[1], words[2], words[3]);
          }
        }
      }
    }
    if (!gain) return;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float squared = sum4(all[h]);
      if (c != 0 || p.row + 8 * h >= p.m) continue;
      float* const to = squares + static_cast<index_t>(p.row + 8 * h) * parts;
      to[p.column] = squared;
      if ((p.column + 1) * N >= n)
        for (int i = p.column + 1; i < parts; ++i) to[i] = 0.0f;
    }
  }
};

/// Columns of a tile for the shape.
inline int sum_columns(index_t m, index_t n, int multiprocessors) {
  int best = 256;
  for (const int c : {192, 128, 64})
    if (cost(m, ceil_div(n, c), c, multiprocessors) < cost(m, ceil_div(n, best), best, multiprocessors)) best = c;
  return best;
}

}  // namespace tiles

/// Parts of a row's sum of squares that sum_matmul leaves; `columns`: as given to it.
inline int sum_parts(index_t m, index_t n, int multiprocessors, int columns = 0) {
  return static_cast<int>(ceil_div(ceil_div(n, columns ? columns : tiles::sum_columns(m, n, multiprocessors)), 4) * 4);
}

namespace tiles {

template <int N>
void launch_sum(cudaStream_t stream, const SumTask& t, int multiprocessors) {
  const index_t columns = ceil_div(t.n, N);
  const Sum<N> end{tensor_map(t.w, t.n, t.k, t.ldw, N / 2), tensor_map_f32(t.residual, t.m, t.n, t.ldy, rows), t.y, t.ldy, t.n, t.gain, t.normed, t.ld_normed, t.squares, sum_parts(t.m, t.n, multiprocessors, N)};
  launch(stream, t.x, t.m, t.k, t.ldx, columns, t.early, end, multiprocessors, "sum_matmul");
}

}  // namespace tiles

/// Whether it is faster than cuBLASLt's product and a norm behind it: of some 512 rows, whose tiles of 64 columns each fetch x anew, not for long rows
/// (a step of 512 tokens with TinyLlama's down product by it: 2.25 ms for 2.17).
inline bool sum_matmul_pays(index_t m, index_t n, index_t k, int multiprocessors) { return m >= 512 && (k <= 2048 || tiles::sum_columns(m, n, multiprocessors) > 64); }

/// For compute capability 9.0 (hopper::compiled). False where it is not for the shape or its addresses. `columns` of a tile, 64, 128, 192 or 256: for measurements.
inline bool sum_matmul(cudaStream_t stream, const SumTask& t, int multiprocessors, int columns = 0) {
  using namespace tiles;
  if (t.m < 1 || t.n % 8 != 0 || t.k % 8 != 0 || !in_pieces(t.x, t.ldx) || !in_pieces(t.w, t.ldw) || !in_pieces(t.residual, 2 * t.ldy) || !in_pieces(t.y, 2 * t.ldy)) return false;
  if (t.gain && (!in_pieces(t.normed, t.ld_normed) || reinterpret_cast<std::uintptr_t>(t.gain) % 8 != 0 || !in_pieces(t.squares, 0))) return false;
  if (columns == 0) columns = sum_columns(t.m, t.n, multiprocessors);
  if (columns == 256) launch_sum<256>(stream, t, multiprocessors);
  else if (columns == 192) launch_sum<192>(stream, t, multiprocessors);
  else if (columns == 128) launch_sum<128>(stream, t, multiprocessors);
  else launch_sum<64>(stream, t, multiprocessors);
  return true;
}

}  // namespace tinyllama::cuda
