// What is asked of the products of batched decoding on Hopper (stream_gemm.cuh, cluster_gemm.cuh).
#pragma once

#include "tinyllama/kernels/cuda/pack.cuh"

namespace tinyllama::cuda {

/// rmsnorm in two halves, one in each of the products that it stands between (cluster_gemm.cuh): what makes y leaves gain y as `normed`, and sums of squares of y;
/// what reads `normed` multiplies its sums of a row by 1 / sqrt(mean(y^2) + eps).
struct SplitNorm {
  static constexpr int most_rows = 128, most_parts = 64;
  float* squares = nullptr;  // [m][parts]: of a row's columns in each of the product's tiles; of more than most_rows rows sum_matmul's, which RowScale reads
  bf16* normed = nullptr;    // [m, n]
  index_t ld = 0, n = 0;
  const float* gain = nullptr;  // [n]
  float eps = 0;
  int parts = 0;             // set by the product that makes y
  const float* y = nullptr;  // [m, n], for who does the norm in full after all
  index_t ld_y = 0, m = 0;
};

/// y [m, n] = x [m, k] W^T + add of one packed matrix W [n, k]; or of two, `up` behind `w`, y = silu(x w^T) (x up^T). Rows of x, y and add lie ld elements apart.
struct StreamTask {
  Format format;
  const std::byte* w;
  const std::byte* up;  // or null
  index_t n, k;
  const bf16* x;
  index_t ldx, m;
  void* y;
  index_t ldy;
  bool float_out;       // y and add are of f32, else of bf16
  const void* add;      // or null
  const SplitNorm* scales = nullptr;  // x is its `normed`
  SplitNorm* norm = nullptr;          // y, of f32, is to be normed
};

}  // namespace tinyllama::cuda
