// Attention of the decode kernel: up to 8 query heads that share a KV head against a run of positions, by the 512 consumer threads of a block.
//
//   s_p = q . k_p / sqrt(head_dim),   m = max s_p,   o = sum exp(s_p - m) v_p,   l = sum exp(s_p - m)
// A pass takes 4096 / head_dim positions: a thread holds 8 values of one position's K and V. It multiplies them with 8 heads, the lanes of a position
// scatter the sums so that each keeps the score of one head, and the products with V divide the positions over 8 groups of warps.
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
  float q[group_heads][HD];
  float k[HD], v[HD];                    // of the new position
  float p[4096 / HD][group_heads];
  union {
    float values[4096 / HD][HD];         // V of a pass
    float sums[4][group_heads][HD];      // partial results of groups of warps
  };
};
struct AttentionSums {
  float max[consumer_warps][group_heads], sum[consumer_warps][group_heads], rescale[group_heads], m[group_heads], l[group_heads];
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
  Flagged* out;                // [heads][HD] results, or, where `partial`, for each head m, l, o[HD]; heads `out_stride` apart
  bool partial;
  int out_stride;
};

/// cos_sin: [2][HD / 2] of the new position, in shared memory.
template <int HD>
__device__ void attention(const AttentionTask& t, AttentionScratch<HD>& s, AttentionSums& r, const float* cos_sin) {
  constexpr int lanes = HD / 8, positions = consumers / lanes, half = HD / 2, per_lane = HD / 32;  // `positions` a pass
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32, j = thread % lanes, slot = thread / lanes;
  const auto k_page = [&](int p) { return t.pages[p / 64] + t.k_offset; };
  Cached8 k{}, v{};
  const auto fetch = [&](int p) {
    if (p < t.end && !(t.newest && p == t.position)) {
      const std::byte* const page = t.pages[p / 64];
      k = load_cached8<HD>(t.format, page + t.k_offset, p % 64, j);
      v = load_cached8<HD>(t.format, page + t.v_offset, p % 64, j);
    } else {
      k = {}, v = {};
    }
  };
  fetch(t.begin + slot);  // on its way while q is waited for
  consumer_sync();        // the scratch is the products' vector: all warps are done with it

  // q and k arrive as products, and are turned here. (a, b) -> (a cos - b sin, b cos + a sin)
  const float scale = rsqrtf(static_cast<float>(HD)) * 1.4426950408889634f;  // scores in powers of two
  const int vectors = t.newest ? 10 : 8;
  for (int i = thread; i < vectors * half; i += consumers) {
    const int vector = i / half, pair = i % half;
    const int first = t.halves && vector < 9 ? pair : 2 * pair, second = t.halves && vector < 9 ? pair + half : 2 * pair + 1;
    float* const to = vector < 8 ? s.q[vector] : vector == 8 ? s.k : s.v;
    float a = 0, b = 0;
    if (vector >= 8 || vector < t.heads) {
      const Flagged* const from = vector < 8 ? t.q + vector * HD : vector == 8 ? t.k : t.v;
      a = receive(from + first, t.round, t.wait_ns), b = receive(from + second, t.round, t.wait_ns);
    }
    if (vector < 9) {
      const float c = cos_sin[pair], n = cos_sin[half + pair], u = a;
      a = u * c - b * n, b = b * c + u * n;
      if (vector < 8) a *= scale, b *= scale;
    }
    to[first] = a, to[second] = b;
  }
  consumer_sync();

  float acc[4][per_lane] = {};
  float m_run = -INFINITY, l_run = 0;
  const int quad = warp & 1, group = warp >> 1;
  for (int begin = t.begin; begin < t.end; begin += positions) {
    const int p = begin + slot;
    if (t.newest && begin <= t.position && t.position < begin + positions) {  // the same for all threads
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
    float kf[8], vf[8], score[8];
    cached_to_float(t.format, k, kf), cached_to_float(t.format, v, vf);
    fetch(p + positions);
#pragma unroll
    for (int h = 0; h < 8; ++h) {
      const float4 a = *reinterpret_cast<const float4*>(&s.q[h][8 * j]), b = *reinterpret_cast<const float4*>(&s.q[h][8 * j + 4]);
      score[h] = dot8(kf, a, b);
    }
    // Lanes of a position: each ends with the sum of head `lane % 8`.
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
    const bool valid = p < t.end;
    const int head = lane & 7;
    const float x = valid ? score[0] : -INFINITY;
    float max = x;
#pragma unroll
    for (int o = 16; o >= lanes; o >>= 1) max = fmaxf(max, __shfl_xor_sync(~0u, max, o));
    if (lane < 8) r.max[warp][head] = max;
    consumer_sync();
    max = m_run;
#pragma unroll
    for (int w = 0; w < consumer_warps; ++w) max = fmaxf(max, r.max[w][head]);
    const float rescale = exp2f(m_run - max), e = valid ? exp2f(x - max) : 0.0f;
    m_run = max;
    if (lanes == 8 || (lane & 8) == 0) s.p[slot][head] = e;
    float sum = e;
#pragma unroll
    for (int o = 16; o >= lanes; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
    if (lane < 8) r.sum[warp][head] = sum;
    if (thread < 8) r.rescale[thread] = rescale;
#pragma unroll
    for (int i = 0; i < 8; ++i) vf[i] = valid ? vf[i] : 0.0f;
    float4* const to = reinterpret_cast<float4*>(&s.values[slot][8 * j]);
    to[0] = make_float4(vf[0], vf[1], vf[2], vf[3]), to[1] = make_float4(vf[4], vf[5], vf[6], vf[7]);
    consumer_sync();
    if (thread < 8) {
      l_run *= rescale;
#pragma unroll
      for (int w = 0; w < consumer_warps; ++w) l_run += r.sum[w][head];
    }
#pragma unroll
    for (int h = 0; h < 4; ++h)
#pragma unroll
      for (int d = 0; d < per_lane; ++d) acc[h][d] *= r.rescale[4 * quad + h];
#pragma unroll
    for (int i = 0; i < positions / 8; ++i) {
      const int at = group * (positions / 8) + i;
      const float4 w = *reinterpret_cast<const float4*>(&s.p[at][4 * quad]);
      float value[per_lane];
#pragma unroll
      for (int d = 0; d < per_lane; d += 2) {
        const float2 two = *reinterpret_cast<const float2*>(&s.values[at][per_lane * lane + d]);
        value[d] = two.x, value[d + 1] = two.y;
      }
#pragma unroll
      for (int d = 0; d < per_lane; ++d) acc[0][d] += w.x * value[d], acc[1][d] += w.y * value[d], acc[2][d] += w.z * value[d], acc[3][d] += w.w * value[d];
    }
    consumer_sync();
  }
  if (thread < 8) r.m[thread] = m_run, r.l[thread] = l_run;
  // Eight groups of warps to four, then to one.
  if (group >= 4) {
#pragma unroll
    for (int h = 0; h < 4; ++h)
#pragma unroll
      for (int d = 0; d < per_lane; ++d) s.sums[group - 4][4 * quad + h][per_lane * lane + d] = acc[h][d];
  }
  consumer_sync();
  if (group < 4) {
#pragma unroll
    for (int h = 0; h < 4; ++h)
#pragma unroll
      for (int d = 0; d < per_lane; ++d) s.sums[group][4 * quad + h][per_lane * lane + d] += acc[h][d];
  }
  consumer_sync();
  for (int i = thread; i < t.heads * HD; i += consumers) {
    const int h = i / HD, d = i % HD;
    const float o = (s.sums[0][h][d] + s.sums[1][h][d]) + (s.sums[2][h][d] + s.sums[3][h][d]);
    Flagged* const to = t.out + h * t.out_stride;
    if (t.partial) send(to + 2 + d, o, t.round);
    else send(to + d, o / r.l[h], t.round);
  }
  if (t.partial && thread < t.heads) send(t.out + thread * t.out_stride, r.m[thread], t.round), send(t.out + thread * t.out_stride + 1, r.l[thread], t.round);
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
  const float e = exp2f(ml.x - max);
  return warp_sum(e * o) / warp_sum(e * ml.y);
}

}  // namespace tinyllama::cuda::decode
