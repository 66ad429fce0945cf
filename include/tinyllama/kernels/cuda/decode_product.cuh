// Dot products of the decode kernel: four rows of weights in a slot of the ring times the vector in shared memory, by the four warps of a team.
//
// Each warp takes a quarter of the columns of all four rows: a value of x that it reads serves two rows (block formats) or four (values), and all teams of a
// block are busy however few rows there are. Lanes add up by halving: a step of the butterfly hands over half of the rows, so four sums take 6 shuffles
// rather than 20. What the four warps have goes through shared memory to the warp that sends it on.
#pragma once

#include "tinyllama/kernels/cuda/decode_plan.cuh"
#include "tinyllama/kernels/cuda/matvec.cuh"

namespace tinyllama::cuda::decode {

/// Sums of a lane: of rows 2 (lane / 16) and the next for block formats, of all four for values.
template <Format F>
inline constexpr int lane_rows = block_columns(F) == 1 ? 4 : 2;

/// Columns [c, c + n) of four rows: this lane's share. A row's scale, where the format has one, comes with the last.
template <Format F>
__device__ __forceinline__ void dot_slot(float (&sum)[lane_rows<F>], const std::byte* slot, int n, const std::byte* vector, int k, int c, int warp, int lane) {
  constexpr int whole = ring_columns(F);
  const int row = static_cast<int>(tile_bytes(F, n)) + (c + n == k ? row_end_bytes(F) : 0);
  if constexpr (block_columns(F) == 1) {
    const FloatVector x(vector, (k + 7) / 8);
    const auto piece = [&](int p, int row) {
      const float4 low = x.low[c / 8 + p], high = x.high[c / 8 + p];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const Values8<F> w(slot + r * row, p);
        sum[r] += ((w.v[0] * low.x + w.v[1] * low.y) + (w.v[2] * low.z + w.v[3] * low.w)) + ((w.v[4] * high.x + w.v[5] * high.y) + (w.v[6] * high.z + w.v[7] * high.w));
      }
    };
    constexpr int at_once = 32 * 8 * team_warps;
    if (n == whole && whole >= at_once) {
#pragma unroll
      for (int u = 0; u < whole / at_once; ++u) piece(32 * (warp + team_warps * u) + lane, row_end_bytes(F) ? row : static_cast<int>(tile_bytes(F, whole)));
    } else {
#pragma unroll 1
      for (int p = 32 * warp + lane; p < (n + 7) / 8; p += 32 * team_warps) piece(p, row);
    }
    if constexpr (row_end_bytes(F) != 0) {
      if (c + n == k) {
#pragma unroll
        for (int r = 0; r < 4; ++r) sum[r] *= *reinterpret_cast<const float*>(slot + (r + 1) * row - row_end_bytes(F));
      }
    }
  } else {
    const QuantisedVector x(vector, k / 32);
    const auto block = [&](int b, int nb, int row) {
      const std::byte* const rows = slot + lane / 16 * 2 * row;
      const uint4 low = x.low[c / 32 + b], high = x.high[c / 32 + b];
      const float2 s = x.scale_sum[c / 32 + b];
#pragma unroll
      for (int r = 0; r < 2; ++r) sum[r] += dot_block(Block32<F>(rows + r * row, nb, b), low, high, s);
    };
    static_assert(whole == 32 * 16 * team_warps);
    if (n == whole) block(16 * warp + lane % 16, whole / 32, static_cast<int>(tile_bytes(F, whole)));
    else
#pragma unroll 1
      for (int b = 16 * warp + lane % 16; b < n / 32; b += 16 * team_warps) block(b, n / 32, row);
  }
}

/// Adds N sums up over `lanes` lanes. Of the first step's two halves each lane keeps one, and so on: bits of the lane from lanes / 2 down say which of the N
/// it ends with.
template <int lanes, int N>
__device__ __forceinline__ float fold(float (&sum)[N], int lane) {
  int o = lanes / 2;
#pragma unroll
  for (int n = N / 2; n; n /= 2, o /= 2) {
    const bool upper = lane & o;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const float give = upper ? sum[i] : sum[i + n], keep = upper ? sum[i + n] : sum[i];
      sum[i] = keep + __shfl_xor_sync(~0u, give, o);
    }
  }
#pragma unroll
  for (; o; o /= 2) sum[0] += __shfl_xor_sync(~0u, sum[0], o);
  return sum[0];
}

/// What the warps of a team have: [part][warp][row].
using TeamSums = float[2][team_warps][group_rows];

/// A group's rows, those of gate and up in turn where `parts` is 2, into the team's sums.
template <Format F, int parts, class Ring>
__device__ __forceinline__ void multiply_group(TeamSums& to, int part, Ring& ring, const std::byte* vector, int k, int warp, int lane) {
  constexpr int n = lane_rows<F>, lanes = n == 4 ? 32 : 16, last = lanes / (n * parts);  // lanes that end with the same sum
  float sum[parts][n] = {};
#pragma unroll
  for (int i = 0; i < parts; ++i) {
#pragma unroll 1
    for (int c = 0; c < k; c += ring_columns(F)) {
      dot_slot<F>(sum[i], ring.wait(), min(ring_columns(F), k - c), vector, k, c, warp, lane);
      ring.release(lane);
    }
  }
  const float y = fold<lanes>(reinterpret_cast<float(&)[parts * n]>(sum), lane);
  if (lane % last == 0) {
    const int index = lane % lanes / last;  // part n + row
    to[parts == 2 ? index / n : part][warp][lane / lanes * n + index % n] = y;
  }
}

}  // namespace tinyllama::cuda::decode
