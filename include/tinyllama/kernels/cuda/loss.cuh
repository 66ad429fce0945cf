// Cross-entropy of rows of logits and its gradient, in place: one read and one write of a row.
//
//   loss = log sum exp(x) - x[target];  dx = weight (exp(x) / sum exp(x) - onehot(target)).  A target below 0 does not count: both are 0.
#pragma once

#include "tinyllama/kernels/cuda/reduce.cuh"
#include "tinyllama/kernels/cuda/vectors.cuh"
#include "tinyllama/kernels/training.hpp"

namespace tinyllama::cuda {

template <class A>
struct CrossEntropyTask {
  A* gradient;                   // [rows, n], may be logits; null: not wanted
  index_t ld_gradient;
  const A* logits;               // [rows, n]
  index_t ld;
  const std::int32_t* targets;   // [rows]
  const float* weights;          // [rows]
  float* losses;                 // [rows]
  int rows, n;
};

// A block a row. A thread keeps Keep vectors, 64 bytes of them: 32,000 logits of 2 bytes are there whole; what does not fit is read again.
template <class A, int N, int Keep>
__global__ void __launch_bounds__(1024) cross_entropy_kernel(CrossEntropyTask<A> t) {
  using V = Vec<A, N>;
  __shared__ float shared[32];
  const index_t row = blockIdx.x;
  const auto* x = reinterpret_cast<const V*>(t.logits + row * t.ld);
  auto* dx = t.gradient ? reinterpret_cast<V*>(t.gradient + row * t.ld_gradient) : nullptr;
  const int target = t.targets[row], vectors = t.n / N, me = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  if (target < 0) {
    if (me == 0) t.losses[row] = 0.0f;
    V none;
#pragma unroll
    for (int j = 0; j < N; ++j) none.at[j] = from_float<A>(0.0f);
    if (dx)
      for (int v = me; v < vectors; v += threads) dx[v] = none;
    return;
  }
  const float at_target = to_float(t.logits[row * t.ld + target]);
  const auto exp_of = [](float a) { return sizeof(A) == 4 ? expf(a) : __expf(a); };
  V keep[Keep];
  float most = Max::none, sum = 0;
  const auto each = [&](auto&& f) {
#pragma unroll
    for (int i = 0; i < Keep; ++i)
      if (me + i * threads < vectors) f(me + i * threads, keep[i]);
    for (int v = me + Keep * threads; v < vectors; v += threads) {
      const V again = x[v];
      f(v, again);
    }
  };
#pragma unroll
  for (int i = 0; i < Keep; ++i)
    if (me + i * threads < vectors) keep[i] = x[me + i * threads];
  each([&](int, const V& a) {
#pragma unroll
    for (int j = 0; j < N; ++j) most = fmaxf(most, to_float(a.at[j]));
  });
  most = block_reduce<Max>(most, shared);
  each([&](int, const V& a) {
#pragma unroll
    for (int j = 0; j < N; ++j) sum += exp_of(to_float(a.at[j]) - most);
  });
  sum = block_reduce<Sum>(sum, shared);  // behind its barriers every thread has read at_target
  if (me == 0) t.losses[row] = logf(sum) + (most - at_target);
  if (!dx) return;
  const float weight = t.weights[row], scale = weight / sum;
  each([&](int v, const V& a) {
    V d;
#pragma unroll
    for (int j = 0; j < N; ++j) d.at[j] = from_float<A>(exp_of(to_float(a.at[j]) - most) * scale - (v * N + j == target ? weight : 0.0f));
    dx[v] = d;
  });
}

template <class A>
void cross_entropy(cudaStream_t stream, const CrossEntropyTask<A>& t) {
  if (t.rows == 0) return;
  constexpr int N = per_16<A>;
  const auto go = [&]<int M>() {
    const int threads = t.n / M >= 1024 ? 1024 : 256;
    cross_entropy_kernel<A, M, 64 / (M * static_cast<int>(sizeof(A)))><<<static_cast<unsigned>(t.rows), threads, 0, stream>>>(t);
  };
  if (in_vectors<N>(t.logits, t.ld, t.n) && (!t.gradient || in_vectors<N>(t.gradient, t.ld_gradient, t.n))) go.template operator()<N>();
  else go.template operator()<1>();
  launched("cross_entropy");
}

/// to->loss += sum_i weights_i losses_i: one block, so that the order is fixed.
static __global__ void __launch_bounds__(1024) add_loss_kernel(StepSums* to, const float* losses, const float* weights, index_t n) {
  __shared__ double sums[32];
  double sum = 0;
  for (index_t i = threadIdx.x; i < n; i += 1024) sum += static_cast<double>(losses[i]) * weights[i];
  sum = block_sum(sum, sums);
  if (threadIdx.x == 0) to->loss += sum;
}
inline void add_loss(cudaStream_t stream, StepSums* to, const float* losses, const float* weights, index_t n) {
  add_loss_kernel<<<1, 1024, 0, stream>>>(to, losses, weights, n);
  launched("add_loss");
}

}  // namespace tinyllama::cuda
