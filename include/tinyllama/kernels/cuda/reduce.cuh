// Sums and maxima over a warp and over a block, in a fixed order: the same inputs give the same bits.
#pragma once

namespace tinyllama::cuda {

struct Sum {
  static __device__ float of(float a, float b) { return a + b; }
  static constexpr float none = 0.0f;
};
struct Max {
  static __device__ float of(float a, float b) { return fmaxf(a, b); }
  static constexpr float none = -3.402823466e38f;
};

/// Over the lanes of a warp; all lanes receive it.
template <class Op>
__device__ inline float warp_reduce(float x) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x = Op::of(x, __shfl_xor_sync(0xffffffffu, x, lane));
  return x;
}

/// Over a block of whole warps; all threads receive it. `shared`: 32 floats, free again after the next barrier.
template <class Op>
__device__ inline float block_reduce(float x, float* shared) {
  x = warp_reduce<Op>(x);
  const int warps = static_cast<int>(blockDim.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  if (warps == 1) return x;
  if (lane == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  x = warp_reduce<Op>(lane < warps ? shared[lane] : Op::none);
  __syncthreads();
  return x;
}

/// Sum over a block of whole warps, in double; the first thread receives it. `shared`: one for each warp.
__device__ inline double block_sum(double x, double* shared) {
#pragma unroll
  for (int lane = 16; lane > 0; lane /= 2) x += __shfl_xor_sync(0xffffffffu, x, lane);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = x;
  __syncthreads();
  if (threadIdx.x) return 0;
  for (unsigned w = 1; w < blockDim.x / 32; ++w) x += shared[w];
  return x;
}

}  // namespace tinyllama::cuda
