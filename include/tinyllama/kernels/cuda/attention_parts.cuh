// The end of an attention tile: divide by the sum and store, or keep a partial result, which the last part to finish merges in the order of the parts.
#pragma once

#include "tinyllama/kernels/cuda/attention_plan.hpp"
#include "tinyllama/kernels/cuda/element.cuh"

namespace tinyllama::cuda {

/// The tile's results lie in shared memory: o [rows, pitch], not yet divided; maxima of the scores times log2(e), and sums, [rows]. Called by all `threads` of
/// the block; the caller has synchronised. Partial results in scratch: o [part][tile_rows][head_dim], then max and sum [part][tile_rows].
//   out = sum_i 2^(max_i - max) o_i / sum_i 2^(max_i - max) sum_i, i over the parts in their order, whichever block does it: the same bits every run.
template <class Q, class O>
__device__ void finish_tile(const AttentionArgs<Q, O>& a, const AttentionItem& item, const float* o, int pitch, const float* max, const float* sum, unsigned* shared_flag) {
  const int threads = static_cast<int>(blockDim.x), me = static_cast<int>(threadIdx.x), hd = a.head_dim, n = item.rows * hd;
  const auto store = [&](int row, int d, float x) {
    const int r = item.row + row, token = r / a.group, head = item.kv_head * a.group + r % a.group;
    a.out[(item.first_row + token) * a.ldo + static_cast<std::int64_t>(head) * hd + d] = from_float<O>(x);
  };
  if (item.parts == 1) {
    for (int i = me; i < n; i += threads) store(i / hd, i % hd, o[i / hd * pitch + i % hd] / sum[i / hd]);
    return;
  }
  float* all_o = a.scratch + static_cast<std::int64_t>(item.first_part) * a.tile_rows * hd;
  float* all_max = a.scratch + static_cast<std::int64_t>(a.parts) * a.tile_rows * hd + static_cast<std::int64_t>(item.first_part) * a.tile_rows;
  float* all_sum = all_max + static_cast<std::int64_t>(a.parts) * a.tile_rows;
  for (int i = me; i < n; i += threads) all_o[item.part * a.tile_rows * hd + i] = o[i / hd * pitch + i % hd];
  for (int r = me; r < item.rows; r += threads) all_max[item.part * a.tile_rows + r] = max[r], all_sum[item.part * a.tile_rows + r] = sum[r];
  __syncthreads();
  if (me == 0) {
    __threadfence();  // for the whole block: the barrier orders the others' writes before it
    *shared_flag = atomicAdd(a.counters + item.first_part, 1u);
  }
  __syncthreads();
  if (*shared_flag != static_cast<unsigned>(item.parts - 1)) return;
  __threadfence();
  // A warp a row. Lanes are parts for the weights and then columns for the sums, so that loads do not wait for each other: one after the other they took 12 us.
  const int warp = me / 32, lane = me % 32;
  for (int row = warp; row < item.rows; row += threads / 32) {
    float top = -INFINITY;
    for (int p = lane; p < item.parts; p += 32) top = fmaxf(top, __ldcg(all_max + p * a.tile_rows + row));
    for (int i = 16; i; i >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, i));
    float total = 0;
    for (int d0 = 0; d0 < hd; d0 += 64) {
      float value[2] = {0, 0};
      total = 0;
      const float* from = all_o + row * hd + d0 + lane;
      const bool has[2] = {d0 + lane < hd, d0 + lane + 32 < hd};
      for (int p0 = 0; p0 < item.parts; p0 += 32) {
        float weight = 0, share = 0;
        if (p0 + lane < item.parts) {
          const float m = __ldcg(all_max + (p0 + lane) * a.tile_rows + row);
          weight = m == -INFINITY ? 0.0f : exp2f(m - top);  // -infinity: the part shows the row nothing
          share = weight * __ldcg(all_sum + (p0 + lane) * a.tile_rows + row);
        }
        const int count = min(32, item.parts - p0);
#pragma unroll 8
        for (int p = 0; p < count; ++p) {
          const float w = __shfl_sync(~0u, weight, p);
          total += __shfl_sync(~0u, share, p);
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (has[e]) value[e] += w * __ldcg(from + static_cast<std::int64_t>(p0 + p) * a.tile_rows * hd + 32 * e);
        }
      }
#pragma unroll
      for (int e = 0; e < 2; ++e)
        if (has[e]) store(row, d0 + lane + 32 * e, value[e] / total);
    }
  }
  if (me == 0) a.counters[item.first_part] = 0;  // for the next launch
}

/// An item as three loads of 16 bytes.
__device__ inline AttentionItem load_item(const AttentionItem* from) {
  AttentionItem item;
  const int4* words = reinterpret_cast<const int4*>(from);
  const int4 a = __ldg(words), b = __ldg(words + 1), c = __ldg(words + 2);
  item.first_row = a.x, item.position = a.y, item.length = a.z, item.pages = a.w;
  item.kv_head = b.x, item.row = b.y, item.rows = b.z, item.page_begin = b.w;
  item.page_end = c.x, item.first_part = c.y, item.part = static_cast<std::int16_t>(c.z), item.parts = static_cast<std::int16_t>(c.z >> 16), item.next = c.w;
  return item;
}

}  // namespace tinyllama::cuda
