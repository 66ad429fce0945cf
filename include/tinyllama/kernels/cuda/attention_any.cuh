// Attention without tensor cores, in f32: any head dimension, cache format and type of q; what the fast kernels do not take.
#pragma once

#include "tinyllama/kernels/cuda/attention_parts.cuh"
#include "tinyllama/kernels/cuda/cache.cuh"

namespace tinyllama::cuda {

inline constexpr int any_tile_rows = 16;

/// Bytes of shared memory: q [16, hd], o [16, hd], a page's K or V [64, hd + 1] (a pitch without bank conflicts), scores [16, 64], max, sum, factor [16].
constexpr std::size_t any_shared_bytes(int head_dim) {
  return sizeof(float) * static_cast<std::size_t>(2 * any_tile_rows * head_dim + page_positions * (head_dim + 1) + any_tile_rows * (page_positions + 3) + 1);
}

/// s = scale q k;  m' = max(m, s);  o = 2^(m - m') o + sum 2^(s - m') v: the online softmax (arXiv 1805.02867), a page at a time, in base 2.
template <class Q, class O, Format F>
__global__ __launch_bounds__(128) void attention_any_kernel(const AttentionArgs<Q, O> a) {
  extern __shared__ __align__(16) float any_shared[];
  const int hd = a.head_dim, pitch = hd + 1, me = static_cast<int>(threadIdx.x), warp = me / 32, lane = me % 32;
  float *q = any_shared, *o = q + any_tile_rows * hd, *kv = o + any_tile_rows * hd, *s = kv + page_positions * pitch;
  float *max = s + any_tile_rows * page_positions, *sum = max + any_tile_rows, *factor = sum + any_tile_rows;
  auto* flag = reinterpret_cast<unsigned*>(factor + any_tile_rows);
  const float scale = a.scale * 1.4426950408889634f;  // log2(e): exp(x) = 2^(x log2 e)
  for (int i = static_cast<int>(blockIdx.x), next; i >= 0; i = next) {
    const AttentionItem item = load_item(a.items + i);
    next = item.next;
    if (item.rows == 0) return;
    __syncthreads();
    for (int e = me; e < any_tile_rows * hd; e += 128) {
      const int row = e / hd, r = item.row + row, head = item.kv_head * a.group + r % a.group;
      q[e] = row < item.rows ? to_float(a.q[(item.first_row + r / a.group) * a.ldq + static_cast<std::int64_t>(head) * hd + e % hd]) : 0.0f;
      o[e] = 0;
    }
    if (me < any_tile_rows) max[me] = -INFINITY, sum[me] = 0;
    for (int p = item.page_begin; p < item.page_end; ++p) {
      const std::byte* page = a.pages[item.pages + p] + item.kv_head * a.head_bytes;
      const int valid = min(page_positions, item.length - p * page_positions), width_v = (hd + 15) / 16 * 16;
      __syncthreads();
      for (int e = me; e < valid * hd; e += 128) kv[e / hd * pitch + e % hd] = load_cached<F>(page + a.k_offset, hd, e / hd, e % hd);
      __syncthreads();
      {
        const int position = me % page_positions, row0 = me / page_positions * 8;
        float dot[8] = {};
        for (int d = 0; d < hd; ++d) {
          const float k = kv[position * pitch + d];
#pragma unroll
          for (int r = 0; r < 8; ++r) dot[r] += q[(row0 + r) * hd + d] * k;
        }
#pragma unroll
        for (int r = 0; r < 8; ++r) {
          const bool seen = p * page_positions + position <= item.position + (item.row + row0 + r) / a.group && position < valid;
          s[(row0 + r) * page_positions + position] = seen ? dot[r] * scale : -INFINITY;
        }
      }
      __syncthreads();
      for (int row = warp * 4; row < warp * 4 + 4; ++row) {
        float x = s[row * page_positions + lane], y = s[row * page_positions + lane + 32], m = fmaxf(x, y);
        for (int j = 16; j; j >>= 1) m = fmaxf(m, __shfl_xor_sync(~0u, m, j));
        const float before = max[row], now = fmaxf(before, m), base = now == -INFINITY ? 0.0f : now;
        x = exp2f(x - base), y = exp2f(y - base);
        s[row * page_positions + lane] = x, s[row * page_positions + lane + 32] = y;
        float total = x + y;
        for (int j = 16; j; j >>= 1) total += __shfl_xor_sync(~0u, total, j);
        __syncwarp();
        if (lane == 0) {
          factor[row] = exp2f(before - base);
          max[row] = now, sum[row] = sum[row] * factor[row] + total;
        }
      }
      __syncthreads();
      for (int e = me; e < valid * hd; e += 128) kv[e / hd * pitch + e % hd] = load_cached<F>(page + a.v_offset, width_v, e / hd, e % hd);
      __syncthreads();
      for (int e = me; e < item.rows * hd; e += 128) {
        const int row = e / hd, d = e % hd;
        float value = o[e] * factor[row];
        for (int j = 0; j < valid; ++j) value += s[row * page_positions + j] * kv[j * pitch + d];
        o[e] = value;
      }
    }
    __syncthreads();
    finish_tile(a, item, o, hd, max, sum, flag);
  }
}

}  // namespace tinyllama::cuda
