// Rotary position embedding in place: (a, b) -> (a cos - b sin, b cos + a sin) for each pair of a head (arXiv 2104.09864).
#pragma once

#include "tinyllama/config/rope_layout.hpp"
#include "tinyllama/kernels/cuda/vectors.cuh"

namespace tinyllama::cuda {

template <class A>
struct RopeTask {
  A* x;                     // [rows, heads * head_dim]
  index_t ld;
  const float *cos, *sin;   // [rows, head_dim / 2]
  index_t ld_cos;
  int rows, heads, head_dim;
  RopeLayout layout;
};

// A thread turns N neighbouring pairs.
template <class A, int N>
__global__ void rope_kernel(RopeTask<A> t) {
  const int half = t.head_dim / 2, groups = half / N, i = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  const index_t row = blockIdx.x;
  if (i >= t.heads * groups) return;
  const int first = i % groups * N;
  A* head = t.x + row * t.ld + static_cast<index_t>(i / groups) * t.head_dim;
  const auto cos = *reinterpret_cast<const Vec<float, N>*>(t.cos + row * t.ld_cos + first);
  const auto sin = *reinterpret_cast<const Vec<float, N>*>(t.sin + row * t.ld_cos + first);
  const auto turn = [](A& a, A& b, float c, float s) {
    const float u = to_float(a), v = to_float(b);
    a = from_float<A>(u * c - v * s), b = from_float<A>(v * c + u * s);
  };
  if (t.layout == RopeLayout::half) {
    auto &a = *reinterpret_cast<Vec<A, N>*>(head + first), &b = *reinterpret_cast<Vec<A, N>*>(head + half + first);
    Vec<A, N> u = a, v = b;
#pragma unroll
    for (int j = 0; j < N; ++j) turn(u.at[j], v.at[j], cos.at[j], sin.at[j]);
    a = u, b = v;
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      auto& pair = *reinterpret_cast<Vec<A, 2>*>(head + 2 * (first + j));
      Vec<A, 2> p = pair;
      turn(p.at[0], p.at[1], cos.at[j], sin.at[j]);
      pair = p;
    }
  }
}

template <class A>
void rope(cudaStream_t stream, const RopeTask<A>& t) {
  if (t.rows * t.heads == 0) return;
  const int half = t.head_dim / 2;
  const auto go = [&]<int N>() {
    rope_kernel<A, N><<<dim3(static_cast<unsigned>(t.rows), static_cast<unsigned>(ceil_div(t.heads * (half / N), 128))), 128, 0, stream>>>(t);
  };
  const bool four = in_vectors<4>(t.x, t.ld, half) && in_vectors<4>(t.cos, t.ld_cos, half) && in_vectors<4>(t.sin, t.ld_cos, half);
  if (t.layout == RopeLayout::interleaved && !in_vectors<2>(t.x, t.ld, 2)) throw Error("rope", "x", "pairs at addresses that are multiples of their size", "others");
  if (four) go.template operator()<4>();
  else go.template operator()<1>();
  launched("rope");
}

}  // namespace tinyllama::cuda
