// y [m, n] = x [m, k] W [n, k]^T of bf16 for up to 128 rows of x, on Hopper: batched decoding, whose time is that of reading W once.
//
// A cluster of C blocks takes N rows of W at a time, and each of its blocks a C-th of k, in stages of 64 columns of x and W that a warp keeps the copy engine
// ahead by. The sums of a product of x [m, ...] by W^T [..., N] then meet in shared memory: of every 16 rows of x, one block of the cluster receives all C blocks'
// sums and adds them. x, which all clusters read whole, so reaches a multiprocessor in a C-th only, and N, a multiple of 8, divides W evenly
// among clusters.
//
//   more than 64 rows of x: a warpgroup takes 64 of them;   up to 64: both take the same ones, and half of W's N rows each
//
// rmsnorm between two products costs no kernel: SplitNorm (stream_task.cuh) is half in the end of the one and half in the end of the other.
//
// W depends on no kernel before: the stages fill with it while that one ends (dependent.cuh). The order of a sum depends on n, k and the card, not on m.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <utility>

#include "tinyllama/kernels/cuda/dependent.cuh"
#include "tinyllama/kernels/cuda/stream_task.cuh"
#include "tinyllama/kernels/cuda/tensor_map.cuh"
#include "tinyllama/kernels/cuda/vectors.cuh"
#include "tinyllama/kernels/cuda/wgmma.cuh"

namespace tinyllama::cuda {
namespace cluster {

/// Rows of x up to which it is the faster way in a model's steps, by measurement (H100): of 128 rows cuBLASLt multiplies faster.
inline constexpr int most_rows = 112;
inline constexpr int depth = 64, most_m = 128, consumer_warps = 8, threads = 32 * (consumer_warps + 4), most_stages = 16, most_shared = 227 * 1024;

struct Launch {
  CUtensorMap x, w, up;  // boxes of x_rows, and of N rows of W, or N / 2 of gate and of up
  int n, m, x_rows;      // of y; x_rows: m to a multiple of 8
  int units, tiles;      // of 64 columns; of N rows of W
  int size, stages;      // blocks of a cluster; of the ring
  void* y;
  const void* add;
  index_t ldy;
  bool float_out, gated;
  bool once;             // a cluster has one tile: its sums are received where the stages were
  const float *scale_squares, *gain;  // of SplitNorm: of x, or null; of y, or null
  float* squares;
  bf16* normed;
  index_t ld_normed;
  int scale_parts;
  float scale_n, scale_eps;
};

/// Bytes: a stage, and what a block receives: its share of m's 16s, of each the sums of N columns by `size` blocks.
constexpr int stage_bytes(int n, int x_rows) { return (x_rows + n) * depth * 2; }
constexpr int received_bytes(int n, int m, int size) { return ((m + 15) / 16 + size - 1) / size * size * 16 * n * 4; }
/// Of what SplitNorm needs: a factor for each of a block's rows, and sums of squares of each of their octets.
constexpr int norm_bytes(int n, int m, int size) { return ((m + 15) / 16 + size - 1) / size * 16 * 4 * (1 + n / 8); }
constexpr int stages_for(int n, int m, int size, bool once) {
  const int room = most_shared - 2048 - norm_bytes(n, m, size) - (once ? 0 : received_bytes(n, m, size)), stages = room / stage_bytes(n, (m + 7) / 8 * 8);
  return stages < most_stages ? stages : most_stages;
}

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

// Two neighbours in one row of y's shape and type: columns `column` and the next.
__device__ __forceinline__ float2 load_pair(const Launch& t, int row, int column) {
  const index_t at = row * t.ldy + column;
  if (t.float_out) return *reinterpret_cast<const float2*>(static_cast<const float*>(t.add) + at);
  const std::uint32_t w = *reinterpret_cast<const std::uint32_t*>(static_cast<const bf16*>(t.add) + at);
  return make_float2(__uint_as_float(w << 16), __uint_as_float(w & 0xffff0000u));
}
__device__ __forceinline__ void store_pair(const Launch& t, int row, int column, float a, float b) {
  const index_t at = row * t.ldy + column;
  if (t.float_out) *reinterpret_cast<float2*>(static_cast<float*>(t.y) + at) = make_float2(a, b);
  else *reinterpret_cast<std::uint32_t*>(static_cast<bf16*>(t.y) + at) = pair<bf16>(a, b);
}
__device__ __forceinline__ float gate(float g, float u) { return __fdividef(g, 1.0f + __expf(-g)) * u; }

/// Where registers suffice for two blocks a multiprocessor: of few rows of x, whose stages leave room, one begins while the kernel before ends (a step of 16 sequences: 1377 to 1254 us).
template <int N>
inline constexpr bool two_blocks = N <= 96;

template <int N, bool Two>
__global__ void __launch_bounds__(threads, two_blocks<N> ? 2 : 1) kernel(const __grid_constant__ Launch t) {
  using namespace hopper;
  // Of up to 64 rows, where N / 8 is odd, both warpgroups compute the octet in the middle.
  constexpr int octets = N / 8, width = Two ? N : (octets + 1) / 2 * 8;
  extern __shared__ std::byte cluster_memory[];
  const auto shared_base = static_cast<std::uint32_t>(__cvta_generic_to_shared(cluster_memory)), base = (shared_base + 1023) / 1024 * 1024;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int rank = cluster_rank(), size = t.size, cluster = static_cast<int>(blockIdx.x) / size, clusters = static_cast<int>(gridDim.x) / size;
  const int first_unit = t.units * rank / size, units = t.units * (rank + 1) / size - first_unit;
  const int turned = first_unit + cluster % units;  // where a cluster begins: at the same lines of x, all at once, second-level cache is slow
  const int x_bytes = t.x_rows * depth * 2, stage = x_bytes + N * depth * 2;
  // Groups of 16 rows of x: group g is added up by block g % size.
  const int groups = (t.m + 15) / 16, own = rank < groups ? (groups - rank + size - 1) / size : 0;
  const int inbox = (groups + size - 1) / size * size * octets * 512;
  const std::uint32_t sums = t.once ? base : base + t.stages * stage, full = base + (t.once ? max(t.stages * stage, inbox) : t.stages * stage + inbox), empty = full + 8 * most_stages, received = empty + 8 * most_stages, free = received + 8;
  auto* const factors = reinterpret_cast<float*>(cluster_memory + (free + 8 - shared_base));  // [16 own]
  float* const octet_squares = factors + (groups + size - 1) / size * 16;                       // [16 own][octets]
  let_next_begin();
  if (threadIdx.x == 0) {
    for (int s = 0; s < t.stages; ++s) init_barrier(full + 8 * s, 1), init_barrier(empty + 8 * s, consumer_warps);
    init_barrier(received, 1), init_barrier(free, consumer_warps * size);
    fence_barrier_init();
    arrive_expect(received, own * size * octets * 512);
  }
  __syncwarp();
  sync_cluster();

  if (warp >= consumer_warps) {
    give_registers<(two_blocks<N> ? 32 : 40)>();
    if (warp == consumer_warps && lane == 0) {  // what keeps the stages full
      const int count = (t.tiles - cluster + clusters - 1) / clusters * units, ahead = min(count, t.stages);
      int tile = cluster, unit = 0, x_unit = 0;  // of W; x follows
      const auto column = [&](int u) { return (turned + u < first_unit + units ? turned + u : turned + u - units) * depth; };
      const auto copy_w = [&](int s) {
        const std::uint32_t to = base + s * stage + x_bytes;
        arrive_expect(full + 8 * s, stage);
        if (t.gated) {
          copy_box(to, t.w, column(unit), tile * (N / 2), full + 8 * s);
          copy_box(to + N * depth, t.up, column(unit), tile * (N / 2), full + 8 * s);
        } else {
          copy_box(to, t.w, column(unit), tile * N, full + 8 * s);
        }
        if (++unit == units) unit = 0, tile += clusters;
      };
      const auto copy_x = [&](int s) {
        copy_box(base + s * stage, t.x, column(x_unit), 0, full + 8 * s);
        if (++x_unit == units) x_unit = 0;
      };
      for (int i = 0; i < ahead; ++i) copy_w(i);
      wait_for_previous();
      for (int i = 0; i < ahead; ++i) copy_x(i);
      int s = 0, parity = 0;
      for (int i = ahead; i < count; ++i) {
        wait(empty + 8 * s, parity);
        copy_w(s), copy_x(s);
        if (++s == t.stages) s = 0, parity ^= 1;
      }
    } else if (warp > consumer_warps && t.scale_squares) {  // the factors of this block's rows, four rows of a warp at a time
      wait_for_previous();
      for (int first = (warp - consumer_warps - 1) * 4; first < own * 16; first += 12) {
        float squares[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = (first / 16 * size + rank) * 16 + first % 16 + i;
          const float* const from = t.scale_squares + row * t.scale_parts + lane;
          squares[i] = row < t.m && lane < t.scale_parts ? __ldcg(from) : 0.0f;
          if (row < t.m && lane + 32 < t.scale_parts) squares[i] += __ldcg(from + 32);
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          for (int l = 16; l; l >>= 1) squares[i] += __shfl_xor_sync(~0u, squares[i], l);
          if (lane == 0) factors[first + i] = rsqrtf(squares[i] * t.scale_n + t.scale_eps);
        }
      }
      named_arrive(1, threads - 32);
    }
  } else {
    take_registers<(two_blocks<N> ? 104 : 232)>();
    const int warpgroup = warp / 4, group = (Two ? 4 * warpgroup : 0) + warp % 4, local = group / size, owner = group % size, g = lane / 4, c = lane % 4;
    const int first_octet = Two ? 0 : warpgroup * (octets - width / 8), skip = first_octet > 0 ? octets % 2 : 0;
    const std::uint32_t to = in_block(sums + ((local * size + rank) * octets + first_octet) * 512 + lane * 16, owner), to_received = in_block(received, owner);
    int s = 0, parity = 0, turn = 0;
    float sum[width / 2];
    for (int tile = cluster; tile < t.tiles; tile += clusters, turn ^= 1) {
      int held = -1;  // the stage that products not yet waited for read
      const auto release = [&] {
        if (held >= 0 && lane == 0) arrive(empty + 8 * held);
      };
      for (int u = 0; u < units; ++u) {
        wait(full + 8 * s, parity);
        const std::uint32_t a = base + s * stage + (Two ? warpgroup * 64 * depth * 2 : 0), b = base + s * stage + x_bytes + first_octet * 8 * depth * 2;
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < depth / 16; ++i) wgmma_shared(sum, operand_rows(a, i), operand_rows(b, i), u + i);
        wgmma_commit();
        wgmma_wait<1>();
        release();
        held = s;
        if (++s == t.stages) s = 0, parity ^= 1;
      }
      wgmma_wait<0>();
      release();
      pin(sum);

      if (t.once) {  // all blocks are done with their stages
        __syncwarp();
        if (lane < size) arrive_at(free, lane);
        wait(free, 0);
      } else if (tile != cluster) {
        wait(free, turn ^ 1);  // all blocks have read the sums of the tile before
      }
      if (group < groups) {
#pragma unroll
        for (int j = 0; j < width / 8; ++j)
          if (j >= skip) send16(to + j * 512, sum[4 * j], sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3], to_received);
      }
      wait_for_previous();  // who wrote `add`, who still reads y
      if (t.scale_squares && tile == cluster) named_wait(1, threads - 32);
      const bool last = tile + clusters >= t.tiles;
      if (own > 0) {
        // A warp takes each eighth octet of columns, several of them at a time: their loads are on their way together.
        const auto finish = [&]<bool Gated>() {
          constexpr int together = 2, each = Gated ? octets / 2 : octets;
          for (int first = warp; first == warp || first < own * each; first += together * consumer_warps) {
            int at[together], row[together], column[together];
            float2 add[together][2], gain[together];
#pragma unroll
            for (int e = 0; e < together; ++e) {
              const int item = first + e * consumer_warps, l = item / each, j = item % each;
              at[e] = item < own * each ? l * size * octets + j : 0;
              row[e] = item < own * each ? (l * size + rank) * 16 + g : t.m, column[e] = tile * (8 * each) + 8 * j + 2 * c;
              if (column[e] >= t.n) row[e] = t.m;
#pragma unroll
              for (int h = 0; h < 2; ++h) add[e][h] = !Gated && t.add && row[e] + 8 * h < t.m ? load_pair(t, row[e] + 8 * h, column[e]) : make_float2(0, 0);
              gain[e] = !Gated && t.gain && row[e] < t.m ? *reinterpret_cast<const float2*>(t.gain + column[e]) : make_float2(0, 0);
            }
            if (first == warp) {
              wait(received, turn);
              if (!last && threadIdx.x == 0) arrive_expect(received, own * size * octets * 512);
            }
            float4 sums_of[together] = {}, up[together] = {};
#pragma unroll 2
            for (int p = 0; p < size; ++p) {
              const auto* const from = reinterpret_cast<const float4*>(cluster_memory + (sums - shared_base)) + p * octets * 32 + lane;
#pragma unroll
              for (int e = 0; e < together; ++e) {
                const float4 v = from[at[e] * 32];
                sums_of[e].x += v.x, sums_of[e].y += v.y, sums_of[e].z += v.z, sums_of[e].w += v.w;
                if constexpr (Gated) {
                  const float4 w = from[(at[e] + octets / 2) * 32];
                  up[e].x += w.x, up[e].y += w.y, up[e].z += w.z, up[e].w += w.w;
                }
              }
            }
#pragma unroll
            for (int e = 0; e < together; ++e) {
              float4 v = sums_of[e];
              if (t.scale_squares) {
                const int r = (first + e * consumer_warps) / each * 16 + g;
                const float low = row[e] < t.m ? factors[r] : 0.0f, high = row[e] + 8 < t.m ? factors[r + 8] : 0.0f;
                v = make_float4(v.x * low, v.y * low, v.z * high, v.w * high);
                if constexpr (Gated) up[e] = make_float4(up[e].x * low, up[e].y * low, up[e].z * high, up[e].w * high);
              }
              if constexpr (Gated) v = make_float4(gate(v.x, up[e].x), gate(v.y, up[e].y), gate(v.z, up[e].z), gate(v.w, up[e].w));
              v = make_float4(v.x + add[e][0].x, v.y + add[e][0].y, v.z + add[e][1].x, v.w + add[e][1].y);
              if (row[e] < t.m) store_pair(t, row[e], column[e], v.x, v.y);
              if (row[e] + 8 < t.m) store_pair(t, row[e] + 8, column[e], v.z, v.w);
              if (!Gated && t.gain) {
                if (row[e] < t.m) *reinterpret_cast<std::uint32_t*>(t.normed + row[e] * t.ld_normed + column[e]) = pair<bf16>(v.x * gain[e].x, v.y * gain[e].y);
                if (row[e] + 8 < t.m) *reinterpret_cast<std::uint32_t*>(t.normed + (row[e] + 8) * t.ld_normed + column[e]) = pair<bf16>(v.z * gain[e].x, v.w * gain[e].y);
                float low = row[e] < t.m ? v.x * v.x + v.y * v.y : 0.0f, high = row[e] + 8 < t.m ? v.z * v.z + v.w * v.w : 0.0f;
#pragma unroll
                for (int l = 1; l < 4; l <<= 1) low += __shfl_xor_sync(~0u, low, l), high += __shfl_xor_sync(~0u, high, l);
                const int item = first + e * consumer_warps, r = item / each * 16 + g;
                if (c == 0 && item < own * each) octet_squares[r * octets + item % each] = low, octet_squares[(r + 8) * octets + item % each] = high;
              }
            }
          }
        };
        if (t.gated) finish.template operator()<true>();
        else finish.template operator()<false>();
        if (t.gain) {  // a cluster has one tile
          named_wait(2, 32 * consumer_warps);
          const int r = static_cast<int>(threadIdx.x), row = (r / 16 * size + rank) * 16 + r % 16;
          if (r < own * 16 && row < t.m) {
            float all = 0;
#pragma unroll
            for (int j = 0; j < octets; ++j) all += octet_squares[r * octets + j];
            t.squares[row * t.tiles + tile] = all;
          }
        }
      }
      if (last) break;
      __syncwarp();
      if (lane < size) arrive_at(free, lane);
    }
  }
}

#else
template <int N, bool Two>
__global__ void kernel(const __grid_constant__ Launch) { __trap(); }  // see hopper::compiled
#endif

/// Rows of W that a cluster takes at a time, and its blocks.
struct Choice {
  int n = 0, size = 0;
};
inline constexpr int tile_rows[] = {64, 72, 80, 88, 96, 128, 176, 192}, sizes[] = {2, 4};

/// Clusters of `size` blocks that the current card holds at a time: its parts (GPCs) differ in how many multiprocessors they have, from card to card too.
inline int clusters_of(int size) {
  static std::array<std::atomic<short>, 64 * 5> known{};
  int card = 0;
  check(cudaGetDevice(&card), "cudaGetDevice");
  std::atomic<short> unknown{0};
  auto& k = card < 64 && size < 5 ? known[static_cast<std::size_t>(card * 5 + size)] : unknown;
  if (k == 0) {
    cudaLaunchAttribute a{};
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim.x = static_cast<unsigned>(size), a.val.clusterDim.y = a.val.clusterDim.z = 1;
    cudaLaunchConfig_t c{};
    c.gridDim = dim3(static_cast<unsigned>(size)), c.blockDim = dim3(threads), c.dynamicSmemBytes = most_shared, c.attrs = &a, c.numAttrs = 1;
    int n = 0;
    check(cudaFuncSetAttribute(kernel<64, true>, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared), "cudaFuncSetAttribute", "cluster_gemm");
    check(cudaOccupancyMaxActiveClusters(&n, kernel<64, true>, &c), "cudaOccupancyMaxActiveClusters", "cluster_gemm");
    k = static_cast<short>(std::max(n, 1));
  }
  return k;
}

/// The least bytes into a multiprocessor, those of x and of the sums, which come from near, at less than those of W.
inline Choice choose(int n, int k, bool gated) {
  Choice best;
  float least = 0;
  constexpr int x_rows = most_m;  // whatever m is: the same order of sums for all
  const int units = (k + depth - 1) / depth;
  for (const int size : sizes)
    for (const int each : tile_rows) {
      if ((gated && each % 16 != 0) || units < size) continue;
      const int rows = gated ? each / 2 : each, tiles = (n + rows - 1) / rows, clusters = clusters_of(size);
      if (stages_for(each, most_m, size, tiles <= clusters) < 4) continue;  // head of TinyLlama with 3 stages: 63 us of 100 rows, with 5: 56
      const auto rounds = static_cast<float>((tiles + clusters - 1) / clusters), columns = static_cast<float>((units + size - 1) / size * depth);
      const float cost = rounds * (2 * columns * (static_cast<float>(each) + 0.5f * static_cast<float>(x_rows)) + 2.0f * static_cast<float>(each * x_rows) * static_cast<float>(size - 1) / static_cast<float>(size) + 10000);
      if (best.n == 0 || cost < least) best = {each, size}, least = cost;
    }
  return best;
}

template <int N, bool Two>
void launch(cudaStream_t stream, const StreamTask& t, int size) {
  const int most = clusters_of(size);
  Launch l{};
  const bool gated = t.up != nullptr;
  const int each = gated ? N / 2 : N;
  const index_t ldw = packed_row_bytes(Format::bf16, t.k) / 2;
  l.n = static_cast<int>(t.n), l.m = static_cast<int>(t.m), l.x_rows = static_cast<int>(ceil_div(t.m, 8) * 8), l.size = size;
  l.units = static_cast<int>(ceil_div(t.k, depth)), l.tiles = static_cast<int>(ceil_div(t.n, each));
  l.once = l.tiles <= most;
  l.stages = std::min(stages_for(N, l.m, size, l.once), static_cast<int>(ceil_div(l.units, size) * ceil_div(l.tiles, most)));
  l.x = tensor_map(t.x, t.m, t.k, t.ldx, l.x_rows);
  l.w = tensor_map(reinterpret_cast<const bf16*>(t.w), t.n, t.k, ldw, each);
  if (gated) l.up = tensor_map(reinterpret_cast<const bf16*>(t.up), t.n, t.k, ldw, each);
  l.y = t.y, l.add = t.add, l.ldy = t.ldy, l.float_out = t.float_out, l.gated = gated;
  if (t.scales) l.scale_squares = t.scales->squares, l.scale_parts = t.scales->parts, l.scale_n = 1.0f / static_cast<float>(t.scales->n), l.scale_eps = t.scales->eps;
  if (t.norm) l.gain = t.norm->gain, l.squares = t.norm->squares, l.normed = t.norm->normed, l.ld_normed = t.norm->ld, t.norm->parts = l.tiles;
  const int ring = l.stages * stage_bytes(N, l.x_rows), received = received_bytes(N, l.m, size);
  const int memory = 1024 + (l.once ? std::max(ring, received) : ring + received) + 16 * most_stages + 16 + norm_bytes(N, l.m, size);
  check(cudaFuncSetAttribute(kernel<N, Two>, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared), "cudaFuncSetAttribute", "cluster_gemm");
  // As few clusters as need no more rounds.
  const index_t rounds = ceil_div(l.tiles, most), clusters = ceil_div(l.tiles, rounds);
  launch_dependent_clusters(kernel<N, Two>, size, dim3(static_cast<unsigned>(clusters * size)), threads, static_cast<std::size_t>(memory), stream, "cluster_gemm", l);
}

}  // namespace cluster

/// For compute capability 9.0 (hopper::compiled). False where it is not for the shape or its addresses. `as`: for measurements.
inline bool cluster_gemm(cudaStream_t stream, const StreamTask& t, cluster::Choice as = {}) {
  const auto odd = [](const void* p, index_t ld, std::size_t unit, index_t elements) { return reinterpret_cast<std::uintptr_t>(p) % unit != 0 || ld % elements != 0; };
  const std::size_t two = t.float_out ? 8 : 4;
  if (t.format != Format::bf16 || t.m < 1 || t.m > cluster::most_m || t.n % 8 != 0 || t.k % 8 != 0) return false;
  if (odd(t.w, 0, 16, 1) || odd(t.up, 0, 16, 1) || odd(t.x, t.ldx, 16, 8) || odd(t.y, t.ldy, two, 2) || odd(t.add, t.ldy, two, 2)) return false;
  if (t.up && (t.float_out || t.add)) return false;
  if (t.norm && (!t.float_out || t.up || odd(t.norm->gain, 0, 8, 1) || odd(t.norm->normed, t.norm->ld, 4, 2))) return false;
  if (as.n == 0) as = cluster::choose(static_cast<int>(t.n), static_cast<int>(t.k), t.up != nullptr);
  if (as.n == 0) return false;
  const index_t tiles = ceil_div(t.n, t.up ? as.n / 2 : as.n);
  if (t.norm && (tiles > cluster::clusters_of(as.size) || tiles > SplitNorm::most_parts)) return false;
  const auto go = [&]<int N>() {
    if (as.n != N) return false;
    if (t.m > 64) cluster::launch<N, true>(stream, t, as.size);
    else cluster::launch<N, false>(stream, t, as.size);
    return true;
  };
  return [&]<std::size_t... I>(std::index_sequence<I...>) { return (go.template operator()<cluster::tile_rows[I]>() || ...); }(std::make_index_sequence<std::size(cluster::tile_rows)>());
}

}  // namespace tinyllama::cuda
