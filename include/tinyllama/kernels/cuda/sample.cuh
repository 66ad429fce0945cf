// The next token on the card: the first of the largest logits.
#pragma once

#include "tinyllama/kernels/cuda/vectors.cuh"

namespace tinyllama::cuda {

struct ArgmaxTask {
  std::int32_t* ids;  // [rows]
  const float* x;     // [rows, n]
  index_t ld;
  int rows, n;
};

/// The larger value, the lower index among equals.
__device__ inline void take_larger(float& value, int& index, float other, int other_index) {
  if (other > value || (other == value && other_index < index)) value = other, index = other_index;
}
__device__ inline void warp_argmax(float& value, int& index) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) take_larger(value, index, __shfl_xor_sync(0xffffffffu, value, lane), __shfl_xor_sync(0xffffffffu, index, lane));
}

static __global__ void argmax_kernel(ArgmaxTask t) {
  __shared__ float value_of[32];
  __shared__ int index_of[32];
  const float* x = t.x + blockIdx.x * t.ld;
  const int me = static_cast<int>(threadIdx.x), lane = me % 32;
  float value = -INFINITY;
  int index = t.n;
  for (int i = me; i < t.n; i += static_cast<int>(blockDim.x)) take_larger(value, index, x[i], i);
  warp_argmax(value, index);
  if (lane == 0) value_of[me / 32] = value, index_of[me / 32] = index;
  __syncthreads();
  if (me >= 32) return;
  value = lane < static_cast<int>(blockDim.x) / 32 ? value_of[lane] : -INFINITY, index = lane < static_cast<int>(blockDim.x) / 32 ? index_of[lane] : t.n;
  warp_argmax(value, index);
  if (lane == 0) t.ids[blockIdx.x] = index < t.n ? index : 0;
}

inline void argmax(cudaStream_t stream, const ArgmaxTask& t) {
  if (t.rows == 0 || t.n == 0) return;
  argmax_kernel<<<static_cast<unsigned>(t.rows), 1024, 0, stream>>>(t);
  launched("argmax");
}

}  // namespace tinyllama::cuda
