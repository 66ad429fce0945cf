// Attention of the decode kernel: up to 8 query heads that share a KV head against a run of positions, by the 512 consumer threads of a block.
//
//   s_p = q . k_p / sqrt(head_dim),   m = max s_p,   o = sum exp(s_p - m) v_p,   l = sum exp(s_p - m)
// A warp takes 256 / head_dim positions a step, with no barrier: a lane holds 8 values of K of one position and multiplies them with 8 heads; the lanes of
// a position scatter the sums so that each keeps the score of one head; for the product with V, which goes through the warp's shared memory, a lane owns
// some columns of all heads. At the end the warps' results are brought to one maximum and added up.
#pragma once

#include "tinyllama/kernels/cuda/matvec.cuh"
#include "tinyllama/kernels/cuda/ring.cuh"

namespace tinyllama::cuda::decode {

inline constexpr int consumers = 512, consumer_warps = consumers / 32, group_heads = 8;

/// All consumer threads of a block.
__device__ __forceinline__ void consumer_sync() { asm volatile("bar.sync 1, %0;" ::"n"(consumers) : "memory"); }

// ---- eight neighbouring values of the cache: dims 8 j ... 8 j + 7 of the position in `slot` of K or V of a page (order: kernels/cuda/cache.cuh)

struct Cached8 { uint4 a, b; };  // 16-bit formats: a;  f32: both;  q8_0: codes in a.x, a.y, the scale in b.x

template <int HD>
__device__ __forceinline__ int cache_at(Format f, int slot, int j) {
  if (f == Format::f32) return (slot * HD + 8 * j) * 4;
  if (f == Format::q8_0) return slot * HD + 8 * j;
  return (j / 8 * 64 + slot) * 128 + ((j % 8) ^ (slot & 7)) * 16;
}
__device__ __forceinline__ uint4 load16(const std::byte* p) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
  return v;
}
template <int HD>
__device__ __forceinline__ Cached8 load_cached8(Format f, const std::byte* page, int slot, int j) {
  const std::byte* const p = page + cache_at<HD>(f, slot, j);
  Cached8 r{};
  if (f == Format::q8_0) {
    asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(r.a.x), "=r"(r.a.y) : "l"(p) : "memory");
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(r.b.x) : "l"(page + 64 * HD + 4 * slot) : "memory");
  } else {
    r.a = load16(p);
    if (f == Format::f32) r.b = load16(p + 16);
  }
  return r;
}
__device__ __forceinline__ void cached_to_float(Format f, const Cached8& c, float (&v)[8]) {
  const std::uint32_t w[8] = {c.a.x, c.a.y, c.a.z, c.a.w, c.b.x, c.b.y, c.b.z, c.b.w};
  if (f == Format::f32) {
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = __uint_as_float(w[i]);
  } else if (f == Format::q8_0) {
    const float scale = __uint_as_float(w[4]);
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = scale * static_cast<float>(static_cast<signed char>(w[i / 4] >> (8 * (i % 4))));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 p = f == Format::bf16 ? bf16_pair_to_float(w[i]) : half_pair_to_float(w[i]);
      v[2 * i] = p.x, v[2 * i + 1] = p.y;
    }
  }
}
/// Values into the cache's format; max is the largest magnitude of the position's values (q8_0).
__device__ __forceinline__ Cached8 to_cached(Format f, const float (&v)[8], float max) {
  std::uint32_t w[8] = {};
  if (f == Format::f32) {
#pragma unroll
    for (int i = 0; i < 8; ++i) w[i] = __float_as_uint(v[i]);
  } else if (f == Format::q8_0) {
    const float inverse = max > 4e-37f ? 127.0f / max : 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) w[i / 4] |= static_cast<std::uint32_t>(__float2int_rn(v[i] * inverse) & 0xff) << (8 * (i % 4));
    w[4] = __float_as_uint(max / 127.0f);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (f == Format::bf16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(w[i]) : "f"(v[2 * i + 1]), "f"(v[2 * i]));
      else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(w[i]) : "f"(v[2 * i + 1]), "f"(v[2 * i]));
    }
  }
  return {{w[0], w[1], w[2], w[3]}, {w[4], w[5], w[6], w[7]}};
}
template <int HD>
__device__ __forceinline__ void store_cached8(Format f, std::byte* page, int slot, int j, const Cached8& c) {
  std::byte* const p = page + cache_at<HD>(f, slot, j);
  if (f == Format::q8_0) {
    *reinterpret_cast<uint2*>(p) = make_uint2(c.a.x, c.a.y);
    if (j == 0) *reinterpret_cast<std::uint32_t*>(page + 64 * HD + 4 * slot) = c.b.x;
  } else {
    *reinterpret_cast<uint4*>(p) = c.a;
    if (f == Format::f32) *reinterpret_cast<uint4*>(p + 16) = c.b;
  }
}

// ---- one task

/// Shared memory that a task uses.
template <int HD>
struct AttentionScratch {
  static constexpr int positions = 256 / HD;          // of a warp's step: a lane holds 8 values of one of them
  static constexpr int slabs = 16384 / (group_heads * HD * 4);
  float q[group_heads][HD];
  float k[HD], v[HD];                                 // of the new position
  float max[consumer_warps][group_heads], sum[consumer_warps][group_heads], m[group_heads], l[group_heads];
  float p[consumer_warps][positions][group_heads];
  union {
    float values[consumer_warps][positions][HD];      // V of each warp's step
    float sums[slabs][group_heads][HD];               // results of warps
  };
};

struct AttentionTask {
  const Flagged *q, *k, *v;    // of the group's first head; of its KV head
  int heads;                   // 1 ... 8 of the group
  std::byte* const* pages;
  std::int64_t k_offset, v_offset;
  int begin, end;              // positions [begin, end); begin is a page's first
  int position;                // the new one; in [begin, end) where `newest`
  bool newest, writes;         // this task takes k and v of the new position; and puts them into the cache
  Format format;
  bool halves;                 // RopeLayout::half
  std::uint32_t round;
  unsigned wait_ns;
  Flagged* out;                // the vector of results, this task's from value `first_out`; or, where `partial`, for each head m, l, o[HD]
  bool partial;
  int first_out, out_stride;   // partial results of heads are `out_stride` apart
};

__device__ __forceinline__ float exp2_fast(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

/// cos_sin: [2][HD / 2] of the new position, in shared memory.
template <int HD>
__device__ __forceinline__ void attention(const AttentionTask& t, AttentionScratch<HD>& s, const float* cos_sin) {
  using Scratch = AttentionScratch<HD>;
  constexpr int lanes = HD / 8, half = HD / 2, per_lane = HD / 32, positions = Scratch::positions, slabs = Scratch::slabs;
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32, j = lane % lanes, place = lane / lanes, head = lane & 7;
  float acc[group_heads][per_lane] = {};
  float m_run = -INFINITY, l_run = 0;
#pragma unroll 1
  for (int begin = t.begin; begin < t.end; begin += consumer_warps * positions) {
    const int first = begin + warp * positions, p = first + place;
    Cached8 k{}, v{};
    if (p < t.end && !(t.newest && p == t.position)) {  // on its way while q is waited for
      const std::byte* const page = t.pages[p / 64];
      k = load_cached8<HD>(t.format, page + t.k_offset, p % 64, j);
      v = load_cached8<HD>(t.format, page + t.v_offset, p % 64, j);
    }
    if (begin == t.begin) {
      // q and k arrive as products, and are turned here. (a, b) -> (a cos - b sin, b cos + a sin)
      const float scale = rsqrtf(static_cast<float>(HD)) * 1.4426950408889634f;  // scores in powers of two
      consumer_sync();  // the scratch is the products' vector: all warps are done with it
#pragma unroll 1
      for (int i = thread; i < (t.newest ? 10 : 8) * half; i += consumers) {
        const int vector = i / half, pair = i % half;
        const bool halves = t.halves && vector < 9;
        const int x = halves ? pair : 2 * pair, y = halves ? pair + half : 2 * pair + 1;
        float* const to = vector < 8 ? s.q[vector] : vector == 8 ? s.k : s.v;
        float2 ab{};
        if (vector >= 8 || vector < t.heads) {
          const Flagged* const from = vector < 8 ? t.q + vector * HD : vector == 8 ? t.k : t.v;
          ab = receive_two(from + x, from + y, t.round, t.wait_ns);
        }
        if (vector < 9) {
          const float f = vector < 8 ? scale : 1.0f, c = cos_sin[pair] * f, n = cos_sin[half + pair] * f;
          ab = make_float2(ab.x * c - ab.y * n, ab.y * c + ab.x * n);
        }
        to[x] = ab.x, to[y] = ab.y;
      }
      consumer_sync();
    }
    if (first >= t.end) break;  // nothing left for this warp
    if (t.newest && first <= t.position && t.position < first + positions) {  // the same for all lanes
      float kn[8], vn[8], k_max = 0, v_max = 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) kn[i] = s.k[8 * j + i], vn[i] = s.v[8 * j + i], k_max = fmaxf(k_max, fabsf(kn[i])), v_max = fmaxf(v_max, fabsf(vn[i]));
#pragma unroll
      for (int o = lanes / 2; o; o >>= 1) k_max = fmaxf(k_max, __shfl_xor_sync(~0u, k_max, o)), v_max = fmaxf(v_max, __shfl_xor_sync(~0u, v_max, o));
      if (p == t.position) {
        k = to_cached(t.format, kn, k_max), v = to_cached(t.format, vn, v_max);
        if (t.writes) {
          store_cached8<HD>(t.format, t.pages[p / 64] + t.k_offset, p % 64, j, k);
          store_cached8<HD>(t.format, t.pages[p / 64] + t.v_offset, p % 64, j, v);
        }
      }
    }
    float f[8], score[8];
    cached_to_float(t.format, k, f);
#pragma unroll
    for (int h = 0; h < 8; ++h)
      score[h] = dot8(f, *reinterpret_cast<const float4*>(&s.q[h][8 * j]), *reinterpret_cast<const float4*>(&s.q[h][8 * j + 4]));
    const bool valid = p < t.end;
    cached_to_float(t.format, v, f);
    float4* const to = reinterpret_cast<float4*>(&s.values[warp][place][8 * j]);
    to[0] = valid ? make_float4(f[0], f[1], f[2], f[3]) : float4{}, to[1] = valid ? make_float4(f[4], f[5], f[6], f[7]) : float4{};
    // Lanes of a position: each ends with the sum of head lane % 8.
    if constexpr (lanes == 16) {
#pragma unroll
      for (int h = 0; h < 8; ++h) score[h] += __shfl_xor_sync(~0u, score[h], 8);
    }
#pragma unroll
    for (int o = 4; o; o >>= 1) {
      const bool upper = lane & o;
#pragma unroll
      for (int h = 0; h < o; ++h) {
        const float give = upper ? score[h] : score[h + o], keep = upper ? score[h + o] : score[h];
        score[h] = keep + __shfl_xor_sync(~0u, give, o);
      }
    }
    const float x = valid ? score[0] : -INFINITY;
    float max = x;
#pragma unroll
    for (int o = 16; o >= lanes; o >>= 1) max = fmaxf(max, __shfl_xor_sync(~0u, max, o));
    max = fmaxf(max, m_run);  // finite: position `first` is valid
    const float rescale = exp2_fast(m_run - max), e = exp2_fast(x - max);
    float sum = e;
#pragma unroll
    for (int o = 16; o >= lanes; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
    m_run = max, l_run = l_run * rescale + sum;
    s.p[warp][place][head] = e;
    if (begin != t.begin) {
#pragma unroll
      for (int h = 0; h < 8; ++h) {
        const float r = __shfl_sync(~0u, rescale, h);
#pragma unroll
        for (int d = 0; d < per_lane; ++d) acc[h][d] *= r;
      }
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < positions; ++i) {
      const float4 a = *reinterpret_cast<const float4*>(&s.p[warp][i][0]), b = *reinterpret_cast<const float4*>(&s.p[warp][i][4]);
      const float w[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
      float value[per_lane];
#pragma unroll
      for (int d = 0; d < per_lane; d += 2) {
        const float2 two = *reinterpret_cast<const float2*>(&s.values[warp][i][per_lane * lane + d]);
        value[d] = two.x, value[d + 1] = two.y;
      }
#pragma unroll
      for (int h = 0; h < 8; ++h)
#pragma unroll
        for (int d = 0; d < per_lane; ++d) acc[h][d] += w[h] * value[d];
    }
    __syncwarp();
  }
  // The warps' results to one scale, then added up: those of `slabs` warps at a time onto the next lower ones, in this fixed order.
  if (lane < 8) s.max[warp][head] = m_run, s.sum[warp][head] = l_run;
  consumer_sync();
  float max = -INFINITY, l = 0;
#pragma unroll
  for (int w = 0; w < consumer_warps; ++w) max = fmaxf(max, s.max[w][head]);
  const float factor = exp2_fast(m_run - max);
  if (warp == 0) {
#pragma unroll 1
    for (int w = 0; w < consumer_warps; ++w) l += s.sum[w][head] * exp2_fast(s.max[w][head] - max);
    if (lane < 8) s.m[head] = max, s.l[head] = l;
  }
#pragma unroll
  for (int h = 0; h < 8; ++h) {
    const float r = __shfl_sync(~0u, factor, h);
#pragma unroll
    for (int d = 0; d < per_lane; ++d) acc[h][d] *= r;
  }
#pragma unroll 1
  for (int top = consumer_warps; top > 0; top -= slabs) {
    if (warp < top && warp >= top - slabs) {
#pragma unroll
      for (int h = 0; h < 8; ++h)
#pragma unroll
        for (int d = 0; d < per_lane; d += 2) *reinterpret_cast<float2*>(&s.sums[warp % slabs][h][per_lane * lane + d]) = make_float2(acc[h][d], acc[h][d + 1]);
    }
    consumer_sync();
    if (warp < top - slabs && warp >= top - 2 * slabs) {
#pragma unroll
      for (int h = 0; h < 8; ++h)
#pragma unroll
        for (int d = 0; d < per_lane; d += 2) {
          const float2 two = *reinterpret_cast<const float2*>(&s.sums[warp % slabs][h][per_lane * lane + d]);
          acc[h][d] += two.x, acc[h][d + 1] += two.y;
        }
    }
  }
#pragma unroll 1
  for (int i = thread; i < t.heads * HD; i += consumers) {
    const int h = i / HD, d = i % HD;
    float o = 0;
#pragma unroll
    for (int w = 0; w < slabs; ++w) o += s.sums[w][h][d];
    if (t.partial) send(t.out + h * t.out_stride + 2 + d, o, t.round);
    else send(t.out + exchange_place(t.first_out + i), o / s.l[h], t.round);
  }
  if (t.partial && thread < t.heads) send(t.out + thread * t.out_stride, s.m[thread], t.round), send(t.out + thread * t.out_stride + 1, s.l[thread], t.round);
}

/// The results of one head's splits put together: value d of the head, by a warp. `from`: [splits][2 + HD].
template <int HD>
__device__ __forceinline__ float merge_splits(const Flagged* from, int splits, int d, std::uint32_t round, unsigned wait_ns) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  float2 ml{-INFINITY, 0};
  float o = 0;
  if (lane < splits) {
    ml = receive2(from + lane * (HD + 2), round, wait_ns);
    o = receive(from + lane * (HD + 2) + 2 + d, round, wait_ns);
  }
  float max = ml.x;
#pragma unroll
  for (int i = 16; i; i >>= 1) max = fmaxf(max, __shfl_xor_sync(~0u, max, i));
  const float e = exp2_fast(ml.x - max);
  return warp_sum(e * o) / warp_sum(e * ml.y);
}

}  // namespace tinyllama::cuda::decode
