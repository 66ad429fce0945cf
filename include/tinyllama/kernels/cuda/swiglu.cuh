// swiglu: out = gate sigmoid(gate) up (arXiv 2002.05202).
#pragma once

#include "tinyllama/kernels/cuda/dependent.cuh"
#include "tinyllama/kernels/cuda/vectors.cuh"

namespace tinyllama::cuda {

template <class A>
struct SwigluTask {
  A* out;
  index_t ld_out;
  const A *gate, *up;
  index_t ld_gate, ld_up;
  int rows, n;
};

template <class A, int N>
__global__ void swiglu_kernel(SwigluTask<A> t) {
  let_next_begin();
  wait_for_previous();
  const index_t row = blockIdx.x, i = blockIdx.y * blockDim.x + threadIdx.x;
  if (i >= t.n / N) return;
  const auto g = reinterpret_cast<const Vec<A, N>*>(t.gate + row * t.ld_gate)[i], u = reinterpret_cast<const Vec<A, N>*>(t.up + row * t.ld_up)[i];
  Vec<A, N> o;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float x = to_float(g.at[j]);
    o.at[j] = from_float<A>(x / (1.0f + (sizeof(A) == 4 ? expf(-x) : __expf(-x))) * to_float(u.at[j]));  // __expf is as exact as 16 bits need
  }
  reinterpret_cast<Vec<A, N>*>(t.out + row * t.ld_out)[i] = o;
}

template <class A>
void swiglu(cudaStream_t stream, const SwigluTask<A>& t) {
  if (t.rows == 0 || t.n == 0) return;
  const auto go = [&]<int N>() {
    launch_dependent(swiglu_kernel<A, N>, dim3(static_cast<unsigned>(t.rows), static_cast<unsigned>(ceil_div(t.n / N, 256))), 256, 0, stream, "swiglu", t);
  };
  constexpr int N = per_16<A>;
  if (in_vectors<N>(t.out, t.ld_out, t.n) && in_vectors<N>(t.gate, t.ld_gate, t.n) && in_vectors<N>(t.up, t.ld_up, t.n)) go.template operator()<N>();
  else go.template operator()<1>();
}

}  // namespace tinyllama::cuda
