// What is asked of the products of batched decoding on Hopper (stream_gemm.cuh, cluster_gemm.cuh).
#pragma once

#include "tinyllama/kernels/cuda/pack.cuh"

namespace tinyllama::cuda {

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
};

}  // namespace tinyllama::cuda
