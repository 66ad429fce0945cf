// out [m, n] = silu(x W_gate^T) (x W_up^T) of bf16 for many rows of x, on Hopper: one pass over memory less than the product and swiglu apart.
//
// The tiles of tile_matmul.cuh with half their columns from gate and half from up, so that a thread has both factors of its elements.
#pragma once

#include "tinyllama/kernels/cuda/tile_matmul.cuh"

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
  RowScale scale = {};        // of both products
  bool early = false;         // gate and up were written by no kernel that may still run
};

namespace tiles {

template <int N, bool Keep>
struct Gated {
  static constexpr int columns = N, half = N / 2, extra = 0;
  CUtensorMap gate, up;
  bf16 *out, *kept;
  index_t ld_out, ld_kept;
  int n;
  RowScale scale;

  static __device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.0f + __expf(-x)); }
  __device__ __forceinline__ void copy_w(std::uint32_t to, int rank, int k, int column, std::uint32_t barrier) const {
    if (rank == 0) hopper::copy_box_to_both(to, gate, k, column * half, barrier);
    else hopper::copy_box_to_both(to + half * depth * 2, up, k, column * half, barrier);
  }
  using Row = float;
  static constexpr bool rows_matter = true;
  __device__ __forceinline__ Row row(int i) const { return scale.of(i); }
  template <class R>
  __device__ __forceinline__ void finish(float (&sum)[N / 2], const Place& p, const Row (&rows)[2], R&) const {
    constexpr int octets = half / 8;  // of columns: a lane has two columns of each, its three neighbours the others
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = p.row + 8 * h;
      const float f = rows[h];
#pragma unroll
      for (int j = 0; j < octets; j += 4) {
        std::uint32_t w[4] = {}, gates[4] = {}, ups[4] = {};
#pragma unroll
        for (int i = 0; i < 4 && j + i < octets; ++i) {
          const int g = 4 * (j + i) + 2 * h, u = g + 4 * octets;
          float a = sum[g] * f, b = sum[g + 1] * f, c = sum[u] * f, d = sum[u + 1] * f;
          if constexpr (Keep) {
            gates[i] = rounded2(a, b), ups[i] = rounded2(c, d);
            a = __uint_as_float(gates[i] << 16), b = __uint_as_float(gates[i] & 0xffff0000), c = __uint_as_float(ups[i] << 16), d = __uint_as_float(ups[i] & 0xffff0000);
          }
          w[i] = rounded2(silu(a) * c, silu(b) * d);
        }
        const int own = 8 * (j + p.lane % 4), column = p.column * half + own;
        const auto store = [&](std::uint32_t(&words)[4], bf16* to) {
          transpose4(words, p.lane % 4);
          if (row < p.m && own < half && column < n) *reinterpret_cast<uint4*>(to + column) = make_uint4(words[0], words[1], words[2], words[3]);
        };
        store(w, out + row * ld_out);
        if constexpr (Keep) {
          store(gates, kept + row * ld_kept);
          store(ups, kept + row * ld_kept + n);
        }
      }
    }
  }
};

template <int N, bool Keep>
void launch_gated(cudaStream_t stream, const GatedTask& t, int multiprocessors) {
  const Gated<N, Keep> end{tensor_map(t.gate, t.n, t.k, t.ldw, N / 2), tensor_map(t.up, t.n, t.k, t.ldw, N / 2), t.out, t.kept, t.ld_out, t.ld_kept, t.n, t.scale};
  launch(stream, t.x, t.m, t.k, t.ldx, ceil_div(t.n, N / 2), t.early, end, multiprocessors, "gated_matmul");
}

}  // namespace tiles

/// For compute capability 9.0 (hopper::compiled). False where it is not for the shape: below 512 rows the product and swiglu apart are faster.
/// `columns` of a tile, 176 or 256: for measurements.
inline bool gated_matmul(cudaStream_t stream, const GatedTask& t, int multiprocessors, int columns = 0) {
  using namespace tiles;
  if (t.m < 512 || t.n % 8 != 0 || !in_pieces(t.x, t.ldx) || !in_pieces(t.gate, t.ldw) || !in_pieces(t.up, t.ldw) || !in_pieces(t.out, t.ld_out) || !in_pieces(t.kept, t.ld_kept)) return false;
  const auto of = [&](int n) { return cost(t.m, ceil_div(t.n, n / 2), n, multiprocessors); };
  if (columns == 0) {
    columns = 256;
    if (!t.kept && of(176) < of(256)) columns = 176;
  }
  if (t.kept) launch_gated<256, true>(stream, t, multiprocessors);
  else if (columns == 256) launch_gated<256, false>(stream, t, multiprocessors);
  else launch_gated<176, false>(stream, t, multiprocessors);
  return true;
}

}  // namespace tinyllama::cuda
