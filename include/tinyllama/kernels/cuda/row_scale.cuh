// The second half of a norm whose first was done where its rows were made: the factor of a row, from sums of squares of its pieces.
#pragma once

#include "tinyllama/kernels/cuda/element.cuh"

namespace tinyllama::cuda {

/// What the sums of row i of x are multiplied by, 1 / sqrt(mean square + eps): squares [m, parts] of its pieces, one_nth = 1 / its elements. Null: by 1.
/// Pieces lie in fours, and are read so: one by one, each multiprocessor asked the second-level cache for 32 bytes a piece, and a gated product of 512 rows
/// took 42 us for 35.
struct RowScale {
  const float* squares = nullptr;  // at a multiple of 16 bytes
  int parts = 0;                   // a multiple of 4
  float one_nth = 0, eps = 0;

  __device__ __forceinline__ static float four(const float* at) {
    const float4 v = __ldcg(reinterpret_cast<const float4*>(at));
    return (v.x + v.y) + (v.z + v.w);
  }
  /// By a thread alone.
  __device__ __forceinline__ float of(index_t row) const {
    if (!squares) return 1.0f;
    float all = 0;
#pragma unroll 4
    for (int i = 0; i < parts; i += 4) all += four(squares + row * parts + i);
    return rsqrtf(all * one_nth + eps);
  }
  /// By `Lanes` neighbouring lanes together, all of which call it or none.
  template <int Lanes>
  __device__ __forceinline__ float of_together(index_t row, int lane) const {
    if (!squares) return 1.0f;
    float all = 0;
    for (int i = 4 * (lane % Lanes); i < parts; i += 4 * Lanes) all += four(squares + row * parts + i);
    const unsigned us = (Lanes == 32 ? ~0u : (1u << Lanes % 32) - 1) << (lane / Lanes * Lanes);
#pragma unroll
    for (int l = Lanes / 2; l; l >>= 1) all += __shfl_xor_sync(us, all, l);
    return rsqrtf(all * one_nth + eps);
  }
};

}  // namespace tinyllama::cuda
