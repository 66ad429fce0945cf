// y [m, n] = x [m, k] w [n, k]^T for many rows of x: on tensor cores by cuBLASLt, weights of another format than the activations' through scratch.
#pragma once

#include "tinyllama/kernels/cuda/blas.cuh"
#include "tinyllama/kernels/cuda/dequantise.cuh"
#include "tinyllama/kernels/cuda/matvec.cuh"
#include "tinyllama/kernels/cuda/vectors.cuh"

namespace tinyllama::cuda {

/// One packed matrix; rows of x and y lie ldx and ldy elements apart.
template <class A, class Y>
struct MatmulTask {
  Format format;
  const std::byte* w;   // packed rows of W [n, k]
  index_t n, k;
  const A* x;
  index_t ldx, m;
  Y* y;
  index_t ldy;
  const Y* add = nullptr;  // y [m, n] += this, which has y's shape and distance of rows, and is not y
};

/// False where t.add is still to be added. `weights`: room for some rows of W as A's.
template <class A, class Y>
bool matmul(cudaStream_t stream, BlasPlans& blas, const MatmulTask<A, Y>& t, std::byte* workspace, std::size_t workspace_bytes, std::byte* weights, std::size_t weights_bytes) {
  const auto multiply = [&](const std::byte* w, index_t ldw, index_t first, index_t n) {
    const BlasTask task{w, t.x, t.y + first, ldw, t.ldx, t.ldy, t.m, n, t.k, blas_type<A>(), blas_type<Y>(), t.add ? t.add + first : nullptr};
    return blas.multiply(stream, task, workspace, workspace_bytes);
  };
  const index_t row = packed_row_bytes(t.format, t.k);
  if (t.format == format_of<A>) {
    if (multiply(t.w, row / static_cast<index_t>(sizeof(A)), 0, t.n)) return true;
  } else if (t.k % 8 == 0) {
    const index_t rows = std::max<index_t>(1, static_cast<index_t>(weights_bytes / sizeof(A)) / t.k);
    // Slices of equal size: a last one of few rows would leave most of the card idle.
    const index_t slices = ceil_div(t.n, rows), step = ceil_div(ceil_div(t.n, slices), 128) * 128 <= rows ? ceil_div(ceil_div(t.n, slices), 128) * 128 : rows;
    index_t first = 0;
    for (; first < t.n; first += step) {
      const index_t n = std::min(step, t.n - first);
      dequantise(stream, t.format, t.w + first * row, static_cast<int>(n), static_cast<int>(t.k), reinterpret_cast<A*>(weights), t.k);
      launched("dequantise");
      if (!multiply(weights, t.k, first, n)) break;
    }
    if (first >= t.n) return true;
  }
  // What the library does not take: rows of odd lengths. A few rows of x at a time.
  for (index_t r = 0; r < t.m; r += matvec_rows) {
    const auto rows = static_cast<int>(std::min<index_t>(matvec_rows, t.m - r));
    matvec_float<A, Y>(stream, {t.w, t.format, rows, static_cast<int>(t.n), static_cast<int>(t.k), t.x + r * t.ldx, t.ldx, t.y + r * t.ldy, t.ldy});
    launched("matvec");
  }
  return t.add == nullptr;
}

}  // namespace tinyllama::cuda
