// Attention of the decode kernel: up to 8 query heads that share a KV head against a run of positions, by the consumer threads of a block.
//
//   s_p = q . k_p / sqrt(head_dim),   m = max s_p,   o = sum exp(s_p - m) v_p,   l = sum exp(s_p - m)
// All is latency here: a task is 16 positions where that fills the card, in steps of 32 with three barriers. K and V are asked for before q is there and go
// to shared memory as floats; behind the stream of weights a read of memory takes thousands of cycles, so the kernel brings them into L2 a product ahead.
// Four lanes score a position for a head; then a warp has all scores of its head, one a lane, and owns 32 columns of the result: nothing is put together at the end.
#pragma once

#include "tinyllama/kernels/cuda/decode_plan.cuh"
#include "tinyllama/kernels/cuda/matvec.cuh"

namespace tinyllama::cuda::decode {

inline constexpr int group_heads = 8;

// ---- eight neighbouring values of the cache: dims 8 j ... 8 j + 7 of the position in `slot` of K or V of a page (order: kernels/cuda/cache.cuh)

struct Cached8 { uint4 a, b; };  // 16-bit formats: a;  f32: both;  8-bit: a.x, a.y, and q8_0's scale in b.x
__device__ __forceinline__ bool of_bytes(Format f) { return f == Format::q8_0 || f == Format::f8_e4m3; }

template <int HD>
__device__ __forceinline__ int cache_at(Format f, int slot, int j) {
  if (f == Format::f32) return (slot * HD + 8 * j) * 4;
  if (of_bytes(f)) return slot * HD + 8 * j;
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
  if (of_bytes(f)) {
    asm volatile("ld.relaxed.gpu.global.v2.u32 {%0, %1}, [%2];" : "=r"(r.a.x), "=r"(r.a.y) : "l"(p) : "memory");
    if (f == Format::q8_0) asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(r.b.x) : "l"(page + 64 * HD + 4 * slot) : "memory");
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
  } else if (f == Format::f8_e4m3) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 p = half_pair_to_float(e4m3_pair_to_f16(w[i / 2] >> (16 * (i % 2))));
      v[2 * i] = p.x, v[2 * i + 1] = p.y;
    }
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
  } else if (f == Format::f8_e4m3) {
#pragma unroll
    for (int i = 0; i < 2; ++i) w[i] = e4m3_pair(v[4 * i], v[4 * i + 1]) | e4m3_pair(v[4 * i + 2], v[4 * i + 3]) << 16;
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
  if (of_bytes(f)) {
    *reinterpret_cast<uint2*>(p) = make_uint2(c.a.x, c.a.y);
    if (j == 0 && f == Format::q8_0) *reinterpret_cast<std::uint32_t*>(page + 64 * HD + 4 * slot) = c.b.x;
  } else {
    *reinterpret_cast<uint4*>(p) = c.a;
    if (f == Format::f32) *reinterpret_cast<uint4*>(p + 16) = c.b;
  }
}

// ---- one task

/// Shared memory that a task uses.
template <int HD>
struct AttentionScratch {
  static constexpr int step = 32;          // positions
  alignas(16) float q[group_heads][HD + 4];  // padded: four lanes of two heads read 16 bytes each without bank conflicts
  float score[group_heads][step];
  float weight[consumer_warps][step];      // e^(score - max), for the warp that reads it
  float keys[step][HD], values[step][HD];
};

/// What is the same in all layers of a step. It lies in shared memory: registers are scarce, and what does not fit there is 300 cycles away.
struct AttentionTask {
  const Quad *q, *k, *v;       // of the group's first head; of its KV head
  std::byte* first_page;       // pages[begin / 64]
  std::int64_t offset;         // of the KV head in a page, of the first layer
  int heads;                   // 1 ... 8 of the group
  int begin, end;              // positions [begin, end), of which 64 from begin, or all, are of one page
  bool newest, writes;         // this task takes k and v of the new position; and puts them into the cache
  Quad* out;                   // results of the group's first head; or, where `partial` is not null, there for each head m, l, o[HD]
  Flagged* partial;
  int partial_stride;          // from a head's to the next one's
};
/// What is not.
struct AttentionLayer {
  std::byte* const* pages;
  Format format;
  bool halves;                 // RopeLayout::half
  int position;                // the new one
  std::int64_t offset;         // of this layer in a page
  std::int64_t half_bytes;     // from K to V
  std::uint32_t round;
};

__device__ __forceinline__ float exp2_fast(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
__device__ __forceinline__ void prefetch_l2(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

/// Brings K and V of positions [begin, end), of one page and up to 64, into L2.
template <int HD>
__device__ __forceinline__ void prefetch_cached(Format f, const std::byte* keys, std::int64_t half_bytes, int begin, int end) {
  constexpr int lanes = HD / 8;
#pragma unroll 1
  for (int i = thread_again(); i < (end - begin) * lanes && i < 64 * lanes; i += consumers) {
    const int at = cache_at<HD>(f, (begin + i / lanes) % 64, i % lanes);
    prefetch_l2(keys + at), prefetch_l2(keys + half_bytes + at);
  }
}

/// q of the group's heads (`queries`) and k and v of the new position (`newest`) from the exchange, turned: (a, b) -> (a cos - b sin, b cos + a sin). k and v go to their
/// place among the keys and values as the cache will give them back, and into the cache where this is the task that writes them.
template <int HD>
__device__ __forceinline__ void receive_turned(const AttentionTask& t, const AttentionLayer& l, AttentionScratch<HD>& s, const float* cos_sin, bool queries, bool newest, int fresh,
                                               std::byte* keys) {
  constexpr int half = HD / 2, words = HD / 4, chunks = HD / 8;  // a thread takes 8 neighbouring dims
  const int i = thread_again(), vector = i / chunks, j = i % chunks;
  if (i >= (group_heads + 2) * chunks / 32 * 32 + ((group_heads + 2) * chunks % 32 ? 32 : 0)) return;  // whole warps
  const bool head = vector < group_heads, there = head ? queries && vector < t.heads : newest && vector < group_heads + 2;
  float4 x[2] = {};
  receive(x, (head ? t.q + vector * words : vector == group_heads ? t.k : t.v) + 2 * j, 1, there ? 2 : 0, l.round);
  float v[8] = {x[0].x, x[0].y, x[0].z, x[0].w, x[1].x, x[1].y, x[1].z, x[1].w};
  const float f = head ? rsqrtf(static_cast<float>(HD)) * 1.4426950408889634f : 1.0f;  // scores in powers of two
  if (l.halves) {
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const int pair = 8 * (j % (chunks / 2)) + e;
      const float other = __shfl_xor_sync(~0u, v[e], chunks / 2), c = cos_sin[pair], n = cos_sin[half + pair];
      if (vector <= group_heads) v[e] = (v[e] * c + (j < chunks / 2 ? -other : other) * n) * f;
    }
  } else if (vector <= group_heads) {
#pragma unroll
    for (int e = 0; e < 8; e += 2) {
      const float c = cos_sin[4 * j + e / 2], n = cos_sin[half + 4 * j + e / 2], a = v[e], b = v[e + 1];
      v[e] = (a * c - b * n) * f, v[e + 1] = (b * c + a * n) * f;
    }
  }
  float max = 0;
  if (l.format == Format::q8_0) {
#pragma unroll
    for (int e = 0; e < 8; ++e) max = fmaxf(max, fabsf(v[e]));
#pragma unroll
    for (int o = chunks / 2; o; o >>= 1) max = fmaxf(max, __shfl_xor_sync(~0u, max, o));
  }
  if (head ? !queries : !there) return;
  float* to = s.q[head ? vector : 0] + 8 * j;
  if (!head) {
    const Cached8 c = to_cached(l.format, v, max);
    if (t.writes) store_cached8<HD>(l.format, keys + (vector == group_heads ? 0 : l.half_bytes), l.position % 64, j, c);
    cached_to_float(l.format, c, v);
    to = (vector == group_heads ? s.keys : s.values)[fresh] + 8 * j;
  }
  reinterpret_cast<float4*>(to)[0] = make_float4(v[0], v[1], v[2], v[3]), reinterpret_cast<float4*>(to)[1] = make_float4(v[4], v[5], v[6], v[7]);
}

/// cos_sin: [2][HD / 2] of the new position, in shared memory.
template <int HD>
__device__ __forceinline__ void attention(const AttentionTask& t, const AttentionLayer& l, AttentionScratch<HD>& s, const float* cos_sin) {
  constexpr int step = AttentionScratch<HD>::step, chunks = HD / 8;
  // K and V: a thread brings chunk j of 8 dims of position `place`. Scores: a warp takes positions warp and warp + 16, lanes 4 h ... 4 h + 3 head h, and of these
  // lane c chunks c, c + 4, ... Results: a warp has one head, a lane the dims `dim`, `dim` + 32, ...
  constexpr int rounds = step / consumer_warps, mine = chunks / 4, loads = (step * chunks + consumers - 1) / consumers, per_head = consumer_warps / group_heads, columns = HD / (32 * per_head);
  static_assert(columns > 0);
  const int thread = thread_again(), warp = thread / 32, lane = thread % 32, head = lane / 4, part = lane % 4, place = thread / chunks, j = thread % chunks, out_head = warp / per_head, dim = warp % per_head * 32 * columns + lane;
  float o[columns] = {}, m_run = -INFINITY, l_run = 0;
#pragma unroll 1
  for (int begin = t.begin; begin < t.end; begin += step) {
    std::byte* const page = begin / 64 == t.begin / 64 ? t.first_page : l.pages[begin / 64];
    std::byte* const keys = page + t.offset + l.offset;
    const int n = min(step, t.end - begin), fresh = t.newest ? l.position - begin : step;  // the new position's place, if it is in this step
    Cached8 k[loads], v[loads];
#pragma unroll
    for (int u = 0; u < loads; ++u) {
      const int at = place + u * (consumers / chunks);
      const bool there = at < n && at != fresh;
      k[u] = there ? load_cached8<HD>(l.format, keys, (begin + at) % 64, j) : Cached8{};  // zeros where there is no position
      v[u] = there ? load_cached8<HD>(l.format, keys + l.half_bytes, (begin + at) % 64, j) : Cached8{};
    }
    consumer_sync();  // the scratch is free: it is the products' vector, and that of the step before
    const auto stage = [&](float* to, const Cached8& c) {
      float f[8];
      cached_to_float(l.format, c, f);
      reinterpret_cast<float4*>(to)[0] = make_float4(f[0], f[1], f[2], f[3]), reinterpret_cast<float4*>(to)[1] = make_float4(f[4], f[5], f[6], f[7]);
    };
#pragma unroll
    for (int u = 0; u < loads; ++u) {
      const int at = place + u * (consumers / chunks);
      if (at < step && at != fresh) stage(&s.keys[at][8 * j], k[u]), stage(&s.values[at][8 * j], v[u]);
    }
    const bool first = begin == t.begin, newest = fresh < step;  // the same for all threads
    if (first || newest) receive_turned<HD>(t, l, s, cos_sin, first, newest, fresh, keys);
    consumer_sync();
    float4 q[mine][2];
#pragma unroll
    for (int i = 0; i < mine; ++i) {
      const float4* const from = reinterpret_cast<const float4*>(&s.q[head][8 * (part + 4 * i)]);
      q[i][0] = from[0], q[i][1] = from[1];
    }
#pragma unroll
    for (int u = 0; u < rounds; ++u) {
      const int at = warp + consumer_warps * u;
      if (at >= n) break;
      float score = 0;
#pragma unroll
      for (int i = 0; i < mine; ++i) {
        const float4 a = *reinterpret_cast<const float4*>(&s.keys[at][8 * (part + 4 * i)]), b = *reinterpret_cast<const float4*>(&s.keys[at][8 * (part + 4 * i) + 4]);
        score += ((a.x * q[i][0].x + a.y * q[i][0].y) + (a.z * q[i][0].z + a.w * q[i][0].w)) + ((b.x * q[i][1].x + b.y * q[i][1].y) + (b.z * q[i][1].z + b.w * q[i][1].w));
      }
      score += __shfl_xor_sync(~0u, score, 1), score += __shfl_xor_sync(~0u, score, 2);
      if (part == 0) s.score[head][at] = score;
    }
    consumer_sync();
    // A lane has a position's score; then the warp's lanes have all weights, and a column of the values each.
    if (out_head >= t.heads) continue;  // a warp's
    const float score = lane < n ? s.score[out_head][lane] : -INFINITY;
    float max = fmaxf(m_run, score);
#pragma unroll
    for (int i = 16; i; i >>= 1) max = fmaxf(max, __shfl_xor_sync(~0u, max, i));
    const float weight = exp2_fast(score - max), rescale = exp2_fast(m_run - max);
    float* const weights = s.weight[warp];
    weights[lane] = weight;
    __syncwarp();
#pragma unroll
    for (int c = 0; c < columns; ++c) o[c] *= rescale;
#pragma unroll 1
    for (int i = 0; i < n; i += 8) {
      const float4 a = *reinterpret_cast<const float4*>(weights + i), b = *reinterpret_cast<const float4*>(weights + i + 4);
      const float w[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
      for (int e = 0; e < 8; ++e) {
#pragma unroll
        for (int c = 0; c < columns; ++c) o[c] += w[e] * s.values[i + e][dim + 32 * c];
      }
    }
    m_run = max, l_run = l_run * rescale + warp_sum(weight);
  }
  Flagged* const partial = t.partial ? t.partial + out_head * t.partial_stride : nullptr;
#pragma unroll
  for (int c = 0; c < columns; ++c) {
    if (partial == nullptr) send(t.out + (out_head * HD + 32 * c + dim) / 4, __fdividef(o[c], l_run), l.round, out_head < t.heads);
    else if (out_head < t.heads) send(partial + 2 + 32 * c + dim, o[c], l.round);
  }
  if (partial && out_head < t.heads && dim == 0) send(partial, m_run, l.round), send(partial + 1, l_run, l.round);
}

/// The results of one head's splits put together by a warp: values 4 word ... 4 word + 3 of the head, one a lane, the same in all groups of four lanes.
/// `from`: [splits][2 + HD].
template <int HD>
__device__ __forceinline__ float merge_splits(const Flagged* from, int splits, int word, std::uint32_t round) {
  const int lane = thread_again() % 32;
  float2 v[3] = {{-INFINITY, 0}, {0, 0}, {0, 0}};
  if (lane < splits) {
    const Flagged* const at = from + lane * (HD + 2);
    const Flagged* const places[3] = {at, at + 2 + 4 * word, at + 4 + 4 * word};
    receive(v, places, round);
  }
  float max = v[0].x;
#pragma unroll
  for (int i = 16; i; i >>= 1) max = fmaxf(max, __shfl_xor_sync(~0u, max, i));
  const float e = exp2_fast(v[0].x - max);
  float l = e * v[0].y, a = e * v[1].x, b = e * v[1].y, c = e * v[2].x, d = e * v[2].y;
#pragma unroll
  for (int i = 16; i; i >>= 1) {
    l += __shfl_xor_sync(~0u, l, i), a += __shfl_xor_sync(~0u, a, i), b += __shfl_xor_sync(~0u, b, i);
    c += __shfl_xor_sync(~0u, c, i), d += __shfl_xor_sync(~0u, d, i);
  }
  return (lane % 4 == 0 ? a : lane % 4 == 1 ? b : lane % 4 == 2 ? c : d) / l;
}

}  // namespace tinyllama::cuda::decode
