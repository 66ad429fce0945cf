// Attention of prefill on Hopper: causal, over the paged cache, with products by wgmma and pages copied to shared memory as they lie.
//
// Warp-specialised as FlashAttention-3 (arXiv 2407.08608). A block takes tiles of 64 rows for each of its consumer warpgroups, rows being (token, head of group) pairs of one KV
// head, and steps of two pages (128 positions). A producer warp keeps a ring of K and V full with bulk copies, another fetches the queries of the next tile. A consumer:
//   S = Q K^T (Q in registers), next step's, on the tensor cores, then O += P V of this step behind it;
//   meanwhile the softmax of the other warpgroups; when S is there, its own, while P V runs.
//
// Limits of a step of 64 rows at head_dim 64: 2 x 256 cycles of tensor cores (2048 bf16 multiply-adds a cycle and SM), 512 of exponentials (16 a cycle and SM): both 1/16 cycle a score.
#pragma once

#include "tinyllama/kernels/cuda/attention_parts.cuh"
#include "tinyllama/kernels/cuda/cache.cuh"
#include "tinyllama/kernels/cuda/wgmma.cuh"

namespace tinyllama::cuda {

/// What a block of the kernel is made of: consumer warpgroups of 64 rows, steps of 1 or 2 pages.
template <int HeadDim, int Warpgroups, int Pages>
struct FlashShape {
  static_assert(HeadDim == 64 || HeadDim == 128);
  static_assert(Pages == 1 || Pages == 2);
  static constexpr int tile_rows = 64 * Warpgroups, step = Pages * page_positions;  // query rows, positions
  static constexpr int threads = 128 * (Warpgroups + 1);
  static constexpr int page_bytes = page_positions * HeadDim * 2, kv_bytes = Pages * page_bytes;
  static constexpr int q_pitch = HeadDim * 2 + 16, q_bytes = (tile_rows * q_pitch + 1023) / 1024 * 1024;  // a pitch without bank conflicts for ldmatrix
  static constexpr int stages = 4 * 64 / HeadDim * 2 / Pages;  // 128 KiB
  static constexpr int barriers_bytes = 1024;
  static constexpr int shared_bytes = stages * 2 * kv_bytes + q_bytes + barriers_bytes;
  // The register file holds 512 for each thread of a warpgroup; what the producers do not need the consumers get.
  static constexpr int producer_registers = Warpgroups == 3 ? 32 : 40, consumer_registers = Warpgroups == 3 ? 160 : 232;
};

namespace detail {

/// 2^x without the special function unit, for x <= 127: x = n + f, |f| <= 1/2, 2^f by a cubic (relative error 1e-4: P has 8 bits), n into the exponent
/// (FlashAttention-4's way to relieve the exponentials). `rounded` = x + 1.5 2^23.
__device__ __forceinline__ float exp2_polynomial(float x) {
  x = fmaxf(x, -126.0f);
  const float rounded = x + 12582912.0f, f = x - (rounded - 12582912.0f);
  const float p = fmaf(fmaf(fmaf(0.05550411f, f, 0.24022651f), f, 0.69314718f), f, 1.0f);
  return __int_as_float(__float_as_int(p) + (__float_as_int(rounded) << 23));
}
__device__ __forceinline__ float exp2_unit(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

}  // namespace detail

/// `Emulated` of every 16 exponentials go to the FMA units. `Turns`: a warpgroup issues its products when the one before has issued its own (1), or has its scores (2), so that one's softmax
/// runs beside another's products. With 1 the tensor cores take both warpgroups' products in turns, both have their scores at the same time, and then both do their softmax.
template <int HeadDim, int Warpgroups, int Pages, class T, class O, int Emulated, int Turns>
__global__ __launch_bounds__(128 * (Warpgroups + 1), 1) void flash_kernel(const AttentionArgs<bf16, O> a) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  using Shape = FlashShape<HeadDim, Warpgroups, Pages>;
  constexpr int stages = Shape::stages, page_bytes = Shape::page_bytes, step = Shape::step;
  extern __shared__ __align__(1024) unsigned char flash_shared[];
  const std::uint32_t base = static_cast<std::uint32_t>(__cvta_generic_to_shared(flash_shared));
  const std::uint32_t k_ring = base, v_ring = base + stages * Shape::kv_bytes, q_at = v_ring + stages * Shape::kv_bytes, barriers = q_at + Shape::q_bytes;
  const auto k_full = [&](int s) { return barriers + s * 8; };
  const auto v_full = [&](int s) { return barriers + 64 + s * 8; };
  const auto k_empty = [&](int s) { return barriers + 128 + s * 8; };
  const auto v_empty = [&](int s) { return barriers + 192 + s * 8; };
  const std::uint32_t q_full = barriers + 256, q_empty = barriers + 264;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  let_next_begin();
  if (threadIdx.x == 0) {
    for (int s = 0; s < stages; ++s) {
      hopper::init_barrier(k_full(s), 1), hopper::init_barrier(v_full(s), 1);
      hopper::init_barrier(k_empty(s), 4 * Warpgroups), hopper::init_barrier(v_empty(s), 4 * Warpgroups);
    }
    hopper::init_barrier(q_full, 96), hopper::init_barrier(q_empty, 4 * Warpgroups);
    hopper::fence_barrier_init();
  }
  __syncthreads();
  if (warp < 4) {  // producers
    hopper::give_registers<Shape::producer_registers>();
    wait_for_previous();  // consumers write where it read only behind what producers bring
    if (warp == 0) {  // K and V
      int stage = 0, parity = 1;  // a fresh barrier lets a wait for parity 1 pass
      for (int index = static_cast<int>(blockIdx.x), following; index >= 0; index = following) {
        const AttentionItem item = load_item(a.items + index);
        following = item.next;
        if (item.rows == 0) break;
        const int pages = (item.length + page_positions - 1) / page_positions;  // that exist
        const std::byte* next = nullptr;  // of page `lane` of 32
        for (int page = 0; page < item.page_end; page += Pages) {
          if (page % 32 == 0) next = page + lane < pages ? a.pages[item.pages + page + lane] + item.kv_head * a.head_bytes : nullptr;
          const std::byte* at[Pages];
#pragma unroll
          for (int i = 0; i < Pages; ++i) at[i] = reinterpret_cast<const std::byte*>(__shfl_sync(~0u, reinterpret_cast<unsigned long long>(next), page % 32 + i));
          const std::uint32_t k = k_ring + stage * Shape::kv_bytes, v = v_ring + stage * Shape::kv_bytes;
          hopper::wait(k_empty(stage), parity);
          if (lane == 0) {
            // A row of positions that do not exist gives scores that are masked, so that K may hold anything there.
            hopper::arrive_expect(k_full(stage), min(Pages, pages - page) * page_bytes);
#pragma unroll
            for (int block = 0; block < HeadDim / 64; ++block)  // both pages' rows of a 128-byte column behind each other: one operand of 128 rows
#pragma unroll
              for (int i = 0; i < Pages; ++i)
                if (page + i < pages) hopper::copy_bulk(k + block * step * 128 + i * 8192, at[i] + a.k_offset + block * 8192, 8192, k_full(stage));
          }
          hopper::wait(v_empty(stage), parity);
          const int valid = item.length - page * page_positions;  // rows of V beyond are zeros: P is 0 there, but 0 times a NaN is none
          if (valid >= step) {
            if (lane == 0) {
              hopper::arrive_expect(v_full(stage), Pages * page_bytes);
#pragma unroll
              for (int i = 0; i < Pages; ++i) hopper::copy_bulk(v + i * page_bytes, at[i] + a.v_offset, page_bytes, v_full(stage));
            }
          } else {
            for (int block = 0; block < HeadDim / 64; ++block)
              for (int c = valid * 8 + lane; c < step * 8; c += 32) {  // chunks of 16 bytes
                const std::uint32_t to = v + c / 512 * page_bytes + block * 8192 + c % 512 * 16;
                asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(0) : "memory");
              }
            hopper::fence_async_proxy();
            __syncwarp();
            if (lane == 0) {
              hopper::arrive_expect(v_full(stage), valid * HeadDim * 2);
              for (int i = 0; i < Pages; ++i)
                if (const int rows = min(page_positions, valid - i * page_positions); rows > 0)
                  for (int block = 0; block < HeadDim / 64; ++block) hopper::copy_bulk(v + i * page_bytes + block * 8192, at[i] + a.v_offset + block * 8192, rows * 128, v_full(stage));
            }
          }
          __syncwarp();
          if (++stage == stages) stage = 0, parity ^= 1;
        }
      }
    } else {  // queries of the next tile: one buffer, empty as soon as the consumers have theirs in registers. (A bulk copy a row took 1.7 us: the engine's requests of a warp queue up.)
      const int me = static_cast<int>(threadIdx.x) - 32;
      int parity = 1;
      for (int index = static_cast<int>(blockIdx.x), following; index >= 0; index = following, parity ^= 1) {
        const AttentionItem item = load_item(a.items + index);
        following = item.next;
        if (item.rows == 0) break;
        hopper::wait_asleep(q_empty, parity);
        constexpr int chunks = HeadDim / 8;
        for (int i = me; i < item.rows * chunks; i += 96) {
          const int row = i / chunks, r = item.row + row, token = r / a.group, head = item.kv_head * a.group + r % a.group;
          const bf16* from = a.q + (item.first_row + token) * a.ldq + static_cast<std::int64_t>(head) * HeadDim + i % chunks * 8;
          asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(q_at + row * Shape::q_pitch + i % chunks * 16), "l"(from) : "memory");
        }
        asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(q_full) : "memory");  // when this thread's copies are there
      }
    }
  } else {  // consumers
    hopper::take_registers<Shape::consumer_registers>();
    const int group = warp / 4 - 1, g = lane / 4, c = lane % 4;
    const int my_turn = 1 + group, next_turn = 1 + (group + 1) % Warpgroups;
    const float scale = a.scale * 1.4426950408889634f;
    const int row0 = group * 64 + warp % 4 * 16 + g;  // this thread's rows in a tile: row0 and row0 + 8
    int k_stage = 0, k_parity = 0, v_stage = 0, v_parity = 0, q_parity = 0;
    constexpr int scores_each = 32 * Pages;  // of a thread
    std::uint32_t q[HeadDim / 16][4], p[scores_each / 8][4];
    float s[scores_each], o[HeadDim / 2], max[2], sum[2], factor[2];
    int seen[2], all_see;  // positions that the thread's rows see, and that the warpgroup's first row, hence all of its rows see
    AttentionItem item = load_item(a.items + blockIdx.x);
    if (item.rows == 0) return;

    const auto begin_tile = [&] {
      hopper::wait(q_full, q_parity), q_parity ^= 1;
#pragma unroll
      for (int i = 0; i < HeadDim / 16; ++i) {
        const std::uint32_t at = q_at + (group * 64 + warp % 4 * 16 + lane % 16) * Shape::q_pitch + (i * 2 + lane / 16) * 16;
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(q[i][0]), "=r"(q[i][1]), "=r"(q[i][2]), "=r"(q[i][3]) : "r"(at) : "memory");
#pragma unroll
        for (int e = 0; e < 4; ++e) q[i][e] = convert_pair<T>(q[i][e]);
      }
      __syncwarp();
      if (lane == 0) hopper::arrive(q_empty);
#pragma unroll
      for (int e = 0; e < 2; ++e) seen[e] = item.position + (item.row + min(row0 + e * 8, item.rows - 1)) / a.group + 1;
      all_see = item.position + (item.row + min(group * 64, item.rows - 1)) / a.group + 1;
    };
    const auto scores = [&] {
      hopper::wait(k_full(k_stage), k_parity);
      const std::uint64_t k = hopper::operand(k_ring + k_stage * Shape::kv_bytes, 1024, 16);
      hopper::pin(s);
      hopper::wgmma_fence();
#pragma unroll
      for (int i = 0; i < HeadDim / 16; ++i) {
        const std::uint64_t at = k + (i / 4 * step * 128 + i % 4 * 32) / 16;
        if (i == 0) hopper::wgmma<T, false, false>(s, q[i], at);
        else hopper::wgmma<T, false, true>(s, q[i], at);
      }
      hopper::wgmma_commit();
    };
    const auto values = [&] {
      hopper::wait(v_full(v_stage), v_parity);
      const std::uint64_t v = hopper::operand(v_ring + v_stage * Shape::kv_bytes, 1024, 8192);
      hopper::pin(o);
      hopper::wgmma_fence();
#pragma unroll
      for (int i = 0; i < scores_each / 8; ++i) hopper::wgmma<T, true, true>(o, p[i], v + (i / 4 * page_bytes + i % 4 * 2048) / 16);
      hopper::wgmma_commit();
    };
    const auto scores_done = [&] {
      hopper::pin(s);
      if (lane == 0) hopper::arrive(k_empty(k_stage));
      if (++k_stage == stages) k_stage = 0, k_parity ^= 1;
    };
    const auto values_done = [&] {
      hopper::pin(o);
#pragma unroll
      for (int i = 0; i < scores_each / 8; ++i) hopper::pin(p[i]);
      if (lane == 0) hopper::arrive(v_empty(v_stage));
      if (++v_stage == stages) v_stage = 0, v_parity ^= 1;
    };
    // s becomes 2^(scale s - max), and factor what o is to be multiplied with. Both rows in one stretch of code without branches: their chains overlap.
    const auto softmax = [&](int begin) {
      if (begin + step > all_see) {
#pragma unroll
        for (int i = 0; i < scores_each; ++i)
          if (i / 4 * 8 + i % 2 >= seen[i % 4 / 2] - begin - 2 * c) s[i] = -INFINITY;
      }
      float most[2][2];
#pragma unroll
      for (int e = 0; e < 4; ++e) most[e / 2][e % 2] = fmaxf(s[e], s[4 + e]);
#pragma unroll
      for (int i = 8; i < scores_each; ++i) most[i % 4 / 2][i % 2] = fmaxf(most[i % 4 / 2][i % 2], s[i]);
#pragma unroll
      for (int e = 0; e < 2; ++e) most[e][0] = fmaxf(most[e][0], most[e][1]);
#pragma unroll
      for (int e = 0; e < 2; ++e) most[e][0] = fmaxf(most[e][0], __shfl_xor_sync(~0u, most[e][0], 1));
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        most[e][0] = fmaxf(most[e][0], __shfl_xor_sync(~0u, most[e][0], 2)) * scale;
        // A maximum that is too small by up to 2^8 does no harm in floating point, so it follows only where it must, and o is rarely touched (FlashAttention-4).
        const float now = most[e][0] > max[e] + 8.0f ? most[e][0] : max[e];
        factor[e] = detail::exp2_unit(max[e] - now), max[e] = now;
      }
#pragma unroll
      for (int i = 0; i < scores_each; ++i) {
        const int e = i % 4 / 2;
        const float x = fmaf(s[i], scale, -max[e]);
        s[i] = Emulated && i % 16 / 2 * 2 >= 16 - Emulated ? detail::exp2_polynomial(x) : detail::exp2_unit(x);
      }
    };
    // The sums wait until all exponentials are on their way: an addition right behind its exponential stalls the warp for the unit's latency.
    const auto round = [&] {
      float total[2][2] = {};
#pragma unroll
      for (int i = 0; i < scores_each; ++i) total[i % 4 / 2][i % 2] += s[i];
#pragma unroll
      for (int e = 0; e < 2; ++e) sum[e] = sum[e] * factor[e] + (total[e][0] + total[e][1]);
#pragma unroll
      for (int i = 0; i < scores_each / 2; ++i) p[i / 4][i % 4] = pair<T>(s[2 * i], s[2 * i + 1]);
    };
    // o / sum of the rows that exist
    const auto store = [&](const AttentionItem& of, const float (&total)[2]) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float whole = total[e] + __shfl_xor_sync(~0u, total[e], 1);
        whole += __shfl_xor_sync(~0u, whole, 2);
        const int row = row0 + e * 8, r = of.row + row;
        if (row >= of.rows) continue;
        const float inverse = 1.0f / whole;
        O* to = a.out + (of.first_row + r / a.group) * a.ldo + static_cast<std::int64_t>(of.kv_head * a.group + r % a.group) * HeadDim + 2 * c;
#pragma unroll
        for (int i = 0; i < HeadDim / 8; ++i) {
          const float x = o[i * 4 + 2 * e] * inverse, y = o[i * 4 + 2 * e + 1] * inverse;
          if constexpr (std::is_same_v<O, bf16>) *reinterpret_cast<std::uint32_t*>(to + i * 8) = pair<bf16>(x, y);
          else *reinterpret_cast<float2*>(to + i * 8) = make_float2(x, y);
        }
      }
    };
    const auto clear = [&] {
      max[0] = max[1] = -INFINITY, sum[0] = sum[1] = 0;
    };

    if constexpr (Turns != 0)
      if (group == Warpgroups - 1) hopper::named_arrive(1, 256);  // the first turn is warpgroup 0's
    begin_tile();
    clear();
#pragma unroll
    for (int i = 0; i < HeadDim / 2; ++i) o[i] = 0;
    scores();
    hopper::wgmma_wait<0>();
    scores_done();
    softmax(0);
    round();
    // At the head of the loop p belongs to the step at `begin` of the item. Tiles follow each other without a gap: the first scores of one stand in line before
    // the last values of the other.
    int begin = 0;
    while (true) {
      const bool last = begin + step >= item.page_end * page_positions;
      const AttentionItem done = item;
      if (last) {
        if (item.next < 0) break;
        item = load_item(a.items + item.next);
        begin_tile();
        begin = 0;
      } else {
        begin += step;
      }
      if constexpr (Turns != 0) hopper::named_wait(my_turn, 256);
      scores();
      values();
      if constexpr (Turns == 1) hopper::named_arrive(next_turn, 256);
      hopper::wgmma_wait<1>();
      if constexpr (Turns == 2) hopper::named_arrive(next_turn, 256);
      scores_done();
      const float done_sum[2] = {sum[0], sum[1]};
      if (last) clear();
      softmax(begin);
      // The assembler moves the wait for P V before the softmax, so that nothing would run beside it, unless something that may not cross the wait needs the softmax.
      // Exponentials are never negative: nothing is stored.
      if (s[scores_each - 1] < 0) asm volatile("st.shared.f32 [%0], %1;" ::"r"(barriers + 512), "f"(s[scores_each - 1]) : "memory");
      hopper::wgmma_wait<0>();
      values_done();
      if (last) {
        store(done, done_sum);
#pragma unroll
        for (int i = 0; i < HeadDim / 2; ++i) o[i] = 0;
      } else if (__any_sync(~0u, factor[0] != 1 || factor[1] != 1)) {
#pragma unroll
        for (int i = 0; i < HeadDim / 2; ++i) o[i] *= factor[i % 4 / 2];
      }
      round();
    }
    values();
    hopper::wgmma_wait<0>();
    values_done();
    store(item, sum);
    if constexpr (Turns != 0)
      if (group == 0) hopper::named_wait(1, 256);  // the last turn, which nobody takes
  }
#else
  __trap();  // compiled for another architecture; attention_flash is for compute capability 9.0
#endif
}

}  // namespace tinyllama::cuda
