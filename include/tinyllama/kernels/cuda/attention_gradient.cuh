// Causal attention among the rows of each sequence, and its gradients, for any head size and type: plain kernels, a warp a row, sums in a fixed order. What
// cuDNN does not take, and its oracle.
//
//   s_j = scale q . k_j for j <= i;  lse = log sum_j exp(s_j);  o = sum_j exp(s_j - lse) v_j
//   p = exp(s - lse);  dv_j = sum_i p_ij do_i;  ds_ij = p_ij (do_i . v_j - do_i . o_i);  dq_i = scale sum_j ds_ij k_j, dk alike
#pragma once

#include "tinyllama/kernels/cuda/batch.hpp"
#include "tinyllama/kernels/cuda/reduce.cuh"
#include "tinyllama/kernels/cuda/vectors.cuh"

namespace tinyllama::cuda {

/// qkv [rows, (heads + 2 kv_heads) head_dim]: queries, keys, values; the others like its queries, dqkv like all of it.
template <class A>
struct AttentionGradientTask {
  const A* qkv;
  index_t ld;
  A* out;
  index_t ld_out;
  float* lse;        // [rows, heads]
  const A* d_out;    // rows ld_d_out apart
  index_t ld_d_out;
  A* dqkv;
  index_t ld_dqkv;
  float* delta;      // [rows, heads]: do . o
  const BatchSequence* sequences;
  int count, most_tokens, heads, kv_heads, head_dim;
  float scale;
};

// A row of a head in a warp's registers: lane l has elements l, l + 32, ...
template <int E>
struct WarpRow {
  float at[E];
  template <class A>
  __device__ void load(const A* p, int n) {
#pragma unroll
    for (int e = 0; e < E; ++e) {
      const int d = static_cast<int>(threadIdx.x) % 32 + 32 * e;
      at[e] = d < n ? to_float(p[d]) : 0.0f;
    }
  }
  template <class A>
  __device__ void store(A* p, int n, float by) const {
#pragma unroll
    for (int e = 0; e < E; ++e) {
      const int d = static_cast<int>(threadIdx.x) % 32 + 32 * e;
      if (d < n) p[d] = from_float<A>(at[e] * by);
    }
  }
  __device__ void zero() {
#pragma unroll
    for (int e = 0; e < E; ++e) at[e] = 0.0f;
  }
  __device__ void add(float f, const WarpRow& o) {
#pragma unroll
    for (int e = 0; e < E; ++e) at[e] += f * o.at[e];
  }
  __device__ float dot(const WarpRow& o) const {
    float sum = 0;
#pragma unroll
    for (int e = 0; e < E; ++e) sum += at[e] * o.at[e];
    return warp_reduce<Sum>(sum);
  }
};

// blockIdx: 4 rows, head, sequence.
template <class A, int E>
__global__ void __launch_bounds__(128) attention_forward_kernel(AttentionGradientTask<A> t) {
  const BatchSequence s = t.sequences[blockIdx.z];
  const int i = static_cast<int>(blockIdx.x * 4 + threadIdx.x / 32), head = static_cast<int>(blockIdx.y), kv = head * t.kv_heads / t.heads, hd = t.head_dim;
  if (i >= s.tokens) return;
  const A* const rows = t.qkv + s.first_row * t.ld;
  const A *const keys = rows + (t.heads + kv) * hd, *const values = rows + (t.heads + t.kv_heads + kv) * hd;
  WarpRow<E> q, k, v, o;
  q.load(rows + i * t.ld + head * hd, hd), o.zero();
  float most = Max::none, sum = 0;
  for (int j = 0; j <= i; ++j) {
    k.load(keys + j * t.ld, hd), v.load(values + j * t.ld, hd);
    const float score = t.scale * q.dot(k);
    if (score > most) {
      const float c = expf(most - score);
      sum *= c, most = score;
#pragma unroll
      for (int e = 0; e < E; ++e) o.at[e] *= c;
    }
    const float p = expf(score - most);
    sum += p, o.add(p, v);
  }
  o.store(t.out + (s.first_row + i) * t.ld_out + head * hd, hd, 1.0f / sum);
  if (threadIdx.x % 32 == 0) t.lse[(s.first_row + i) * t.heads + head] = most + logf(sum);
}

template <class A, int E>
__global__ void __launch_bounds__(128) attention_dq_kernel(AttentionGradientTask<A> t) {
  const BatchSequence s = t.sequences[blockIdx.z];
  const int i = static_cast<int>(blockIdx.x * 4 + threadIdx.x / 32), head = static_cast<int>(blockIdx.y), kv = head * t.kv_heads / t.heads, hd = t.head_dim;
  if (i >= s.tokens) return;
  const A* const rows = t.qkv + s.first_row * t.ld;
  const A *const keys = rows + (t.heads + kv) * hd, *const values = rows + (t.heads + t.kv_heads + kv) * hd;
  const index_t row = s.first_row + i;
  WarpRow<E> q, k, v, d_o, dq;
  q.load(rows + i * t.ld + head * hd, hd), d_o.load(t.d_out + row * t.ld_d_out + head * hd, hd), k.load(t.out + row * t.ld_out + head * hd, hd), dq.zero();
  const float lse = t.lse[row * t.heads + head], delta = d_o.dot(k);
  if (threadIdx.x % 32 == 0) t.delta[row * t.heads + head] = delta;
  for (int j = 0; j <= i; ++j) {
    k.load(keys + j * t.ld, hd), v.load(values + j * t.ld, hd);
    const float p = expf(t.scale * q.dot(k) - lse);
    dq.add(p * (d_o.dot(v) - delta), k);
  }
  dq.store(t.dqkv + row * t.ld_dqkv + head * hd, hd, t.scale);
}

// A warp a key of a KV head, over all queries of the heads that share it.
template <class A, int E>
__global__ void __launch_bounds__(128) attention_dkv_kernel(AttentionGradientTask<A> t) {
  const BatchSequence s = t.sequences[blockIdx.z];
  const int j = static_cast<int>(blockIdx.x * 4 + threadIdx.x / 32), kv = static_cast<int>(blockIdx.y), group = t.heads / t.kv_heads, hd = t.head_dim;
  if (j >= s.tokens) return;
  const index_t row = s.first_row + j;
  WarpRow<E> k, v, q, d_o, dk, dv;
  k.load(t.qkv + row * t.ld + (t.heads + kv) * hd, hd), v.load(t.qkv + row * t.ld + (t.heads + t.kv_heads + kv) * hd, hd), dk.zero(), dv.zero();
  for (int head = kv * group; head < (kv + 1) * group; ++head)
    for (int i = j; i < s.tokens; ++i) {
      const index_t r = s.first_row + i;
      q.load(t.qkv + r * t.ld + head * hd, hd), d_o.load(t.d_out + r * t.ld_d_out + head * hd, hd);
      const float p = expf(t.scale * q.dot(k) - t.lse[r * t.heads + head]);
      dv.add(p, d_o);
      dk.add(p * (d_o.dot(v) - t.delta[r * t.heads + head]), q);
    }
  dk.store(t.dqkv + row * t.ld_dqkv + (t.heads + kv) * hd, hd, t.scale);
  dv.store(t.dqkv + row * t.ld_dqkv + (t.heads + t.kv_heads + kv) * hd, hd, 1.0f);
}

template <class A, class F>
void with_head_dim(const AttentionGradientTask<A>& t, F&& f) {
  if (t.head_dim <= 64) f.template operator()<2>();
  else if (t.head_dim <= 128) f.template operator()<4>();
  else if (t.head_dim <= 256) f.template operator()<8>();
  else throw Error("flash_attention", "head_dim", "at most 256", std::to_string(t.head_dim));
}

template <class A>
void attention_forward_any(cudaStream_t stream, const AttentionGradientTask<A>& t) {
  if (t.count == 0) return;
  const dim3 grid(static_cast<unsigned>(ceil_div(t.most_tokens, 4)), static_cast<unsigned>(t.heads), static_cast<unsigned>(t.count));
  with_head_dim(t, [&]<int E>() { attention_forward_kernel<A, E><<<grid, 128, 0, stream>>>(t); });
  launched("attention_forward");
}

template <class A>
void attention_backward_any(cudaStream_t stream, const AttentionGradientTask<A>& t) {
  if (t.count == 0) return;
  const auto blocks = static_cast<unsigned>(ceil_div(t.most_tokens, 4)), count = static_cast<unsigned>(t.count);
  with_head_dim(t, [&]<int E>() {
    attention_dq_kernel<A, E><<<dim3(blocks, static_cast<unsigned>(t.heads), count), 128, 0, stream>>>(t);
    attention_dkv_kernel<A, E><<<dim3(blocks, static_cast<unsigned>(t.kv_heads), count), 128, 0, stream>>>(t);
  });
  launched("attention_backward");
}

}  // namespace tinyllama::cuda
