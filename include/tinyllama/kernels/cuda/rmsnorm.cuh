// rmsnorm, alone and with the residual added on the way: out = gain x / sqrt(mean(x^2) + eps) for each row (arXiv 1910.07467).
#pragma once

#include "tinyllama/kernels/cuda/dependent.cuh"
#include "tinyllama/kernels/cuda/vectors.cuh"
#include "tinyllama/kernels/cuda/reduce.cuh"

namespace tinyllama::cuda {

/// out [rows, n]; x [rows, n], which becomes x + residual where there is one.
template <class A>
struct RmsnormTask {
  A* out;
  index_t ld_out;
  float* x;
  index_t ld_x;
  const float* residual;  // or null
  index_t ld_residual;
  const float* gain;      // [n]
  int rows, n;
  float eps;
};

// A block a row. Each thread keeps its elements in registers between the two passes, `Keep` vectors of N of them; what does not fit is read again.
template <class A, int N, int Keep>
__global__ void rmsnorm_kernel(RmsnormTask<A> t) {
  __shared__ float shared[32];
  let_next_begin();
  const index_t row = blockIdx.x;
  float* x = t.x + row * t.ld_x;
  const float* residual = t.residual ? t.residual + row * t.ld_residual : nullptr;
  A* out = t.out + row * t.ld_out;
  const int vectors = t.n / N, threads = static_cast<int>(blockDim.x), me = static_cast<int>(threadIdx.x);
  using F = Vec<float, N>;
  F keep[Keep], gain[Keep];
#pragma unroll
  for (int i = 0; i < Keep; ++i)
    if (me + i * threads < vectors) gain[i] = reinterpret_cast<const F*>(t.gain)[me + i * threads];
  wait_for_previous();
  float squares = 0;
  const auto fetch = [&](int v) {
    F a = reinterpret_cast<const F*>(x)[v];
    if (residual) {
      const F b = reinterpret_cast<const F*>(residual)[v];
#pragma unroll
      for (int j = 0; j < N; ++j) a.at[j] += b.at[j];
      reinterpret_cast<F*>(x)[v] = a;
    }
#pragma unroll
    for (int j = 0; j < N; ++j) squares += a.at[j] * a.at[j];
    return a;
  };
#pragma unroll
  for (int i = 0; i < Keep; ++i)
    if (me + i * threads < vectors) keep[i] = fetch(me + i * threads);
  for (int v = me + Keep * threads; v < vectors; v += threads) fetch(v);
  const float scale = rsqrtf(block_reduce<Sum>(squares, shared) / static_cast<float>(t.n) + t.eps);
  const auto write = [&](int v, const F& a, const F& g) {
    Vec<A, N> o;
#pragma unroll
    for (int j = 0; j < N; ++j) o.at[j] = from_float<A>(a.at[j] * scale * g.at[j]);
    reinterpret_cast<Vec<A, N>*>(out)[v] = o;
  };
#pragma unroll
  for (int i = 0; i < Keep; ++i)
    if (me + i * threads < vectors) write(me + i * threads, keep[i], gain[i]);
  for (int v = me + Keep * threads; v < vectors; v += threads) write(v, reinterpret_cast<const F*>(x)[v], reinterpret_cast<const F*>(t.gain)[v]);
}

template <class A>
void rmsnorm(cudaStream_t stream, const RmsnormTask<A>& t) {
  if (t.rows == 0) return;
  const bool four = in_vectors<4>(t.x, t.ld_x, t.n) && in_vectors<4>(t.out, t.ld_out, t.n) && in_vectors<4>(t.gain, 0, t.n) &&
                    (!t.residual || in_vectors<4>(t.residual, t.ld_residual, t.n));
  const auto rows = static_cast<unsigned>(t.rows);
  launch_dependent(four ? rmsnorm_kernel<A, 4, 4> : rmsnorm_kernel<A, 1, 4>, dim3(rows), 256, 0, stream, "rmsnorm", t);
}

/// x [rows, n] += residual
static __global__ void add_kernel(float* x, index_t ld, const float* residual, index_t ld_residual, index_t n) {
  const index_t row = blockIdx.x, i = blockIdx.y * blockDim.x + threadIdx.x;
  if (i < n) x[row * ld + i] += residual[row * ld_residual + i];
}
inline void add(cudaStream_t stream, float* x, index_t ld, const float* residual, index_t ld_residual, index_t rows, index_t n) {
  if (rows * n == 0) return;
  add_kernel<<<dim3(static_cast<unsigned>(rows), static_cast<unsigned>(ceil_div(n, 256))), 256, 0, stream>>>(x, ld, residual, ld_residual, n);
  launched("add");
}

}  // namespace tinyllama::cuda
