// The scores of attention as numbers, for observers: plain, not for speed.
#pragma once

#include "tinyllama/device/operands.hpp"
#include "tinyllama/kernels/cuda/batch.hpp"
#include "tinyllama/kernels/cuda/cache.cuh"
#include "tinyllama/kernels/cuda/vectors.cuh"

namespace tinyllama::cuda {

/// scale q . k_p into out [heads, tokens, length] for the rows of one sequence, -infinity behind each row's own position: before softmax.
template <class A>
struct ScoresTask {
  float* out;
  const A* q;             // [T, heads * head_dim]
  index_t ld;
  int heads, kv_heads, head_dim;
  float scale;
  index_t k_offset, head_bytes;
};

template <Format F, class A>
__global__ void attention_scores_kernel(ScoresTask<A> t, BatchView b, int sequence) {
  const BatchSequence s = b.sequences[sequence];
  const int token = static_cast<int>(blockIdx.x), head = static_cast<int>(blockIdx.y), length = s.position + s.tokens;
  const index_t at = t.k_offset + head * t.kv_heads / t.heads * t.head_bytes;
  for (int p = static_cast<int>(threadIdx.x); p < length; p += static_cast<int>(blockDim.x)) {
    const std::byte* page = b.pages[s.first_page + p / page_positions] + at;
    float dot = 0;
    for (int d = 0; d < t.head_dim; ++d) dot += to_float(t.q[(s.first_row + token) * t.ld + head * t.head_dim + d]) * load_cached<F>(page, t.head_dim, p % page_positions, d);
    t.out[(static_cast<index_t>(head) * s.tokens + token) * length + p] = p <= s.position + token ? dot * t.scale : -INFINITY;
  }
}

template <class A>
void attention_scores(cudaStream_t stream, Format format, const ScoresTask<A>& t, const BatchView& b, int sequence, int tokens) {
  visit_cache(format, [&]<Format F>() {
    attention_scores_kernel<F, A><<<dim3(static_cast<unsigned>(tokens), static_cast<unsigned>(t.heads)), 128, 0, stream>>>(t, b, sequence);
  });
  launched("attention_scores");
}

}  // namespace tinyllama::cuda
