// swiglu's gradients: h = g s u with s = sigmoid(g);  du = dh g s,  dg = dh u s (1 + g (1 - s)).
#pragma once

#include "tinyllama/kernels/cuda/vectors.cuh"

namespace tinyllama::cuda {

/// dgate and dup may be gate and up, and h may be dh: where it is asked for, swiglu is computed once more on the way.
template <class A>
struct SwigluGradientTask {
  A *dgate, *dup;
  index_t ld_d;
  const A* dh;
  index_t ld_dh;
  const A *gate, *up;
  index_t ld;
  A* h;  // or null
  index_t ld_h;
  int rows, n;
};

template <class A, int N>
__global__ void swiglu_gradient_kernel(SwigluGradientTask<A> t) {
  using V = Vec<A, N>;
  const index_t row = blockIdx.x, i = blockIdx.y * blockDim.x + threadIdx.x;
  if (i >= t.n / N) return;
  const V g = reinterpret_cast<const V*>(t.gate + row * t.ld)[i], u = reinterpret_cast<const V*>(t.up + row * t.ld)[i], d = reinterpret_cast<const V*>(t.dh + row * t.ld_dh)[i];
  V dg, du, h;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float x = to_float(g.at[j]), y = to_float(u.at[j]), dy = to_float(d.at[j]);
    const float e = 1.0f + (sizeof(A) == 4 ? expf(-x) : __expf(-x)), s = 1.0f / e;
    dg.at[j] = from_float<A>(dy * y * s * (1.0f + x * (1.0f - s))), du.at[j] = from_float<A>(dy * x * s), h.at[j] = from_float<A>(x / e * y);  // as swiglu has it, to the bit
  }
  reinterpret_cast<V*>(t.dgate + row * t.ld_d)[i] = dg, reinterpret_cast<V*>(t.dup + row * t.ld_d)[i] = du;
  if (t.h) reinterpret_cast<V*>(t.h + row * t.ld_h)[i] = h;
}

template <class A>
void swiglu_gradient(cudaStream_t stream, const SwigluGradientTask<A>& t) {
  if (t.rows == 0 || t.n == 0) return;
  const auto go = [&]<int N>() {
    swiglu_gradient_kernel<A, N><<<dim3(static_cast<unsigned>(t.rows), static_cast<unsigned>(ceil_div(t.n / N, 256))), 256, 0, stream>>>(t);
  };
  constexpr int N = per_16<A>;
  if (in_vectors<N>(t.dgate, t.ld_d, t.n) && in_vectors<N>(t.dup, t.ld_d, t.n) && in_vectors<N>(t.dh, t.ld_dh, t.n) && in_vectors<N>(t.gate, t.ld, t.n) &&
      in_vectors<N>(t.up, t.ld, t.n) && (!t.h || in_vectors<N>(t.h, t.ld_h, t.n)))
    go.template operator()<N>();
  else go.template operator()<1>();
  launched("swiglu_gradient");
}

}  // namespace tinyllama::cuda
