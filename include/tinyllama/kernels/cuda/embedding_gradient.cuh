// The embedding's gradient: rows of dx added to the rows of their ids, equal ids in their order, so that the sums are the same every time.
#pragma once

#include "tinyllama/kernels/cuda/vectors.cuh"

namespace tinyllama::cuda {

/// Rows sorted by id: the i-th of *distinct ids, ids[i], has rows order[starts[i]] to order[starts[i + 1] - 1].
struct EmbeddingGradientTask {
  float* table;                 // [vocab, n]: +=
  const float* dx;              // [rows, n]
  index_t ld_table, ld_dx;
  const std::int32_t *distinct, *ids, *starts, *order;
  int rows, n;
};

// A thread N columns of an id, then of another; 8 rows are on their way at a time. The launch is the same whatever the ids are, as a graph wants it.
template <int N>
__global__ void embedding_gradient_kernel(EmbeddingGradientTask t) {
  using F = Vec<float, N>;
  const int v = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x), distinct = *t.distinct;
  if (v >= t.n / N) return;
  for (int id = static_cast<int>(blockIdx.x); id < distinct; id += static_cast<int>(gridDim.x)) {
    const int begin = t.starts[id], end = t.starts[id + 1];
    F& to = reinterpret_cast<F*>(t.table + t.ids[id] * t.ld_table)[v];
    F sum = to;
    for (int r = begin; r < end; r += 8) {
      F x[8];
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (r + i < end) x[i] = reinterpret_cast<const F*>(t.dx + t.order[r + i] * t.ld_dx)[v];
#pragma unroll
      for (int i = 0; i < 8; ++i)
        if (r + i < end)
#pragma unroll
          for (int j = 0; j < N; ++j) sum.at[j] += x[i].at[j];
    }
    to = sum;
  }
}

inline void embedding_gradient(cudaStream_t stream, const EmbeddingGradientTask& t) {
  if (t.rows == 0) return;
  const auto go = [&]<int N>() {
    embedding_gradient_kernel<N><<<dim3(static_cast<unsigned>(std::min(t.rows, 4096)), static_cast<unsigned>(ceil_div(t.n / N, 128))), 128, 0, stream>>>(t);
  };
  if (in_vectors<4>(t.table, t.ld_table, t.n) && in_vectors<4>(t.dx, t.ld_dx, t.n)) go.template operator()<4>();
  else go.template operator()<1>();
  launched("embedding_gradient");
}

}  // namespace tinyllama::cuda
