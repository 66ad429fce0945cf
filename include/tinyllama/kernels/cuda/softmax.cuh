// Rows of out = softmax(scale x), a block a row; in place allowed.
#pragma once

#include "tinyllama/kernels/cuda/vectors.cuh"
#include "tinyllama/kernels/cuda/reduce.cuh"

namespace tinyllama::cuda {

struct SoftmaxTask {
  float* out;
  index_t ld_out;
  const float* x;
  index_t ld_x;
  int rows, n;
  float scale;
};

static __global__ void softmax_kernel(SoftmaxTask t) {
  __shared__ float shared[32];
  const float* x = t.x + blockIdx.x * t.ld_x;
  float* out = t.out + blockIdx.x * t.ld_out;
  float most = -INFINITY, sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < t.n; i += static_cast<int>(blockDim.x)) most = fmaxf(most, x[i] * t.scale);
  most = block_reduce<Max>(most, shared);
  for (int i = static_cast<int>(threadIdx.x); i < t.n; i += static_cast<int>(blockDim.x)) sum += out[i] = expf(x[i] * t.scale - most);
  sum = block_reduce<Sum>(sum, shared);
  for (int i = static_cast<int>(threadIdx.x); i < t.n; i += static_cast<int>(blockDim.x)) out[i] /= sum;
}

inline void softmax(cudaStream_t stream, const SoftmaxTask& t) {
  if (t.rows == 0 || t.n == 0) return;
  softmax_kernel<<<static_cast<unsigned>(t.rows), t.n > 1024 ? 1024 : 256, 0, stream>>>(t);
  launched("softmax");
}

}  // namespace tinyllama::cuda
