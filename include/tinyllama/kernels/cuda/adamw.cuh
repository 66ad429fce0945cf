// AdamW on all weights in one launch (arXiv 1711.05101), with clipping and the weights' rounded copy in the same pass; and sums of squares.
//
//   p -= lr decay p;  m, v averages of g and g^2 for g = scale gradient;  p -= lr m' / (sqrt(v') + eps)
#pragma once

#include <array>
#include <span>

#include "tinyllama/kernels/cuda/reduce.cuh"
#include "tinyllama/kernels/cuda/vectors.cuh"
#include "tinyllama/kernels/training.hpp"

namespace tinyllama::cuda {

/// `ends`: where ranges end, of which every second one decays, from the first on if `first_decays`.
struct AdamwArgs {
  static constexpr int most = 2048;  // 16 KB of the 32 KB that a launch may be given: 500 layers, whose gains and matrices take turns
  float *p, *m, *v;
  const float* gradient;
  bf16* rounded;  // or null
  index_t n;
  float decay, beta1, beta2, rest1, rest2, eps;
  AdamwStep step;
  const AdamwStep* at;  // instead of it; or null
  int ranges;
  bool first_decays;
  index_t ends[most];
  MomentArray m_stored, v_stored;  // instead of m and v, where they are not f32
  std::uint32_t place;             // of their rounding
};
/// The step's numbers, and what a weight that decays is multiplied by: with the roundings of the host, which multiplies and subtracts.
struct AdamwNow : AdamwStep {
  float keep;
};
static __device__ __forceinline__ AdamwNow adamw_now(const AdamwArgs& t) {
  const AdamwStep s = t.at ? *t.at : t.step;
  return {s, __fsub_rn(1.0f, __fmul_rn(s.lr, t.decay))};
}

/// The first range that ends behind `place`.
static __device__ __forceinline__ int adamw_range(const AdamwArgs& t, index_t place) {
  int low = 0;
  for (int high = t.ranges - 1; low < high;) {
    const int middle = (low + high) / 2;
    if (t.ends[middle] > place) high = middle;
    else low = middle + 1;
  }
  return low;
}
/// One weight, and its averages in f32; `range` is that of a place before.
static __device__ __forceinline__ void adamw_one(const AdamwArgs& t, const AdamwNow& now, int& range, float& p, float& m, float& v, float gradient, index_t at) {
  while (range + 1 < t.ranges && at >= t.ends[range]) ++range;
  const bool decays = t.first_decays == (range % 2 == 0);
  const float g = gradient * now.scale;
  m = t.beta1 * m + t.rest1 * g, v = t.beta2 * v + t.rest2 * g * g;
  p = p * (decays ? now.keep : 1.0f) - now.lr * (m / now.correction1) / (sqrtf(v / now.correction2) + t.eps);
}

// A block 1024 vectors of 4: 28 bytes read and written of a weight, 30 with its copy.
static __global__ void __launch_bounds__(256) adamw_kernel(const __grid_constant__ AdamwArgs t) {
  using F = Vec<float, 4>;
  const index_t first = static_cast<index_t>(blockIdx.x) * 4096;
  const AdamwNow now = adamw_now(t);
  if (isnan(now.scale)) return;
  int range = adamw_range(t, first);
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const index_t i = first + 4 * (k * 256 + static_cast<int>(threadIdx.x));
    if (i >= t.n) return;
    const auto one = [&](float& p, float& m, float& v, float gradient, index_t at) { adamw_one(t, now, range, p, m, v, gradient, at); };
    if (i + 4 <= t.n) {
      F p = *reinterpret_cast<const F*>(t.p + i), m = *reinterpret_cast<const F*>(t.m + i), v = *reinterpret_cast<const F*>(t.v + i);
      const F g = *reinterpret_cast<const F*>(t.gradient + i);
      Vec<bf16, 4> r;
#pragma unroll
      for (int j = 0; j < 4; ++j) one(p.at[j], m.at[j], v.at[j], g.at[j], i + j), r.at[j] = from_float<bf16>(p.at[j]);
      *reinterpret_cast<F*>(t.p + i) = p, *reinterpret_cast<F*>(t.m + i) = m, *reinterpret_cast<F*>(t.v + i) = v;
      if (t.rounded) *reinterpret_cast<Vec<bf16, 4>*>(t.rounded + i) = r;
    } else {
      for (index_t j = i; j < t.n; ++j) {
        one(t.p[j], t.m[j], t.v[j], t.gradient[j], j);
        if (t.rounded) t.rounded[j] = from_float<bf16>(t.p[j]);
      }
    }
  }
}

// Moments in bf16 or codes of 8 bits (kernels/moments.hpp): a warp a block of 256 weights, of which a lane has 4 of each half. 20 and 16 bytes a weight, 22 and 18 with
// its copy.
template <Moments format>
static __global__ void __launch_bounds__(256) adamw_rounded_kernel(const __grid_constant__ AdamwArgs t) {
  static_assert(moment_block == 256);
  using Element = std::conditional_t<format == Moments::bf16, std::uint16_t, std::uint8_t>;
  using F = Vec<float, 4>;
  using E = Vec<Element, 4>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const index_t block = static_cast<index_t>(blockIdx.x) * 8 + static_cast<int>(threadIdx.x) / 32, first = block * moment_block;
  const AdamwNow now = adamw_now(t);
  if (first >= t.n || isnan(now.scale)) return;
  auto *const ms = static_cast<Element*>(t.m_stored.elements), *const vs = static_cast<Element*>(t.v_stored.elements);
  const float m_scale = format == Moments::int8 ? t.m_stored.scales[block] : 1.0f, v_scale = format == Moments::int8 ? t.v_stored.scales[block] : 1.0f;
  int range = adamw_range(t, first);
  F m[2], v[2];
  float m_most = 0, v_most = 0;
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const index_t i = first + 128 * k + 4 * lane;
    const bool whole = i + 4 <= t.n;
    F p{}, g{};
    E me{}, ve{};
    if (whole) {
      p = *reinterpret_cast<const F*>(t.p + i), g = *reinterpret_cast<const F*>(t.gradient + i);
      me = *reinterpret_cast<const E*>(ms + i), ve = *reinterpret_cast<const E*>(vs + i);
    } else {
      for (int j = 0; i + j < t.n; ++j) p.at[j] = t.p[i + j], g.at[j] = t.gradient[i + j], me.at[j] = ms[i + j], ve.at[j] = vs[i + j];
    }
    Vec<bf16, 4> r;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (format == Moments::bf16) m[k].at[j] = __uint_as_float(std::uint32_t{me.at[j]} << 16), v[k].at[j] = __uint_as_float(std::uint32_t{ve.at[j]} << 16);
      else m[k].at[j] = decode_m(me.at[j], m_scale), v[k].at[j] = decode_v(ve.at[j], v_scale);
      adamw_one(t, now, range, p.at[j], m[k].at[j], v[k].at[j], g.at[j], i + j);
      r.at[j] = from_float<bf16>(p.at[j]);
      m_most = fmaxf(m_most, fabsf(m[k].at[j])), v_most = fmaxf(v_most, v[k].at[j]);  // 0 behind the end
    }
    if (whole) {
      *reinterpret_cast<F*>(t.p + i) = p;
      if (t.rounded) *reinterpret_cast<Vec<bf16, 4>*>(t.rounded + i) = r;
    } else {
      for (int j = 0; i + j < t.n; ++j) {
        t.p[i + j] = p.at[j];
        if (t.rounded) t.rounded[i + j] = r.at[j];
      }
    }
  }
  float m_inverse = 1, v_inverse = 1;
  if constexpr (format == Moments::int8) {
#pragma unroll
    for (int other = 16; other > 0; other /= 2)
      m_most = fmaxf(m_most, __shfl_xor_sync(0xffffffffu, m_most, other)), v_most = fmaxf(v_most, __shfl_xor_sync(0xffffffffu, v_most, other));
    const float m_new = moment_scale(m_most), v_new = moment_scale(v_most);
    if (lane == 0) t.m_stored.scales[block] = m_new, t.v_stored.scales[block] = v_new;
    m_inverse = inverse_scale(m_new), v_inverse = inverse_scale(v_new);
  }
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    const index_t i = first + 128 * k + 4 * lane;
    E me, ve;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const std::uint32_t random = rounding_bits(now.key, t.place + static_cast<std::uint32_t>(i + j));
      if constexpr (format == Moments::bf16) me.at[j] = round_moment(m[k].at[j], random & 0xffffu), ve.at[j] = round_moment(v[k].at[j], random >> 16);
      else me.at[j] = encode_m(m[k].at[j], m_inverse, random & 0xffffu), ve.at[j] = encode_v(v[k].at[j], v_inverse, random >> 16);
    }
    if (i + 4 <= t.n) {
      *reinterpret_cast<E*>(ms + i) = me, *reinterpret_cast<E*>(vs + i) = ve;
    } else {
      for (int j = 0; i + j < t.n; ++j) ms[i + j] = me.at[j], vs[i + j] = ve.at[j];
    }
  }
}

/// The arrays of `t` are made up of `ranges` and start at multiples of 16 bytes, `rounded` (or null) at one of 8.
inline void adamw(cudaStream_t stream, const AdamwTask& t, std::span<const AdamwRange> ranges, bf16* rounded) {
  if (t.n == 0) return;
  for (const void* p : {static_cast<const void*>(t.p), static_cast<const void*>(t.m.elements), static_cast<const void*>(t.v.elements), static_cast<const void*>(t.gradient)})
    if (reinterpret_cast<std::uintptr_t>(p) % 16) throw Error("adamw", "arrays", "at multiples of 16 bytes", "another address");
  AdamwArgs a{t.p, t.m.floats(), t.v.floats(), t.gradient, rounded, t.n, t.decay, t.beta1, t.beta2, static_cast<float>(1.0 - static_cast<double>(t.beta1)), static_cast<float>(1.0 - static_cast<double>(t.beta2)), t.eps,
              {t.lr, t.correction1, t.correction2, t.key, t.scale}, t.at, 0, true, {}, t.m, t.v, t.place};
  index_t end = 0;
  for (const AdamwRange& r : ranges) {
    const bool last_decays = a.first_decays == (a.ranges % 2 == 1);  // of the range before
    end += r.n;
    if (a.ranges == 0) a.first_decays = r.decays;
    else if (r.decays == last_decays) --a.ranges;
    if (a.ranges == AdamwArgs::most) throw Error("adamw", "ranges", "at most " + std::to_string(AdamwArgs::most), std::to_string(ranges.size()));
    a.ends[a.ranges++] = end;
  }
  if (end != t.n) throw Error("adamw", "ranges", std::to_string(t.n) + " weights together", std::to_string(end));
  if (t.m.format == Moments::f32) adamw_kernel<<<static_cast<unsigned>(ceil_div(t.n, 4096)), 256, 0, stream>>>(a);
  else if (t.m.format == Moments::bf16) adamw_rounded_kernel<Moments::bf16><<<static_cast<unsigned>(ceil_div(t.n, 8 * moment_block)), 256, 0, stream>>>(a);
  else adamw_rounded_kernel<Moments::int8><<<static_cast<unsigned>(ceil_div(t.n, 8 * moment_block)), 256, 0, stream>>>(a);
  launched("adamw");
}

inline constexpr int square_blocks = 1024;  // fixed, as the order of a sum is

/// partial [square_blocks] = sums of x_i^2 over equal parts of x.
static __global__ void __launch_bounds__(512) sum_of_squares_kernel(double* partial, const float* x, index_t n) {
  __shared__ double sums[16];
  double sum = 0;
  const index_t vectors = n / 4, step = static_cast<index_t>(gridDim.x) * 512;
  for (index_t v = static_cast<index_t>(blockIdx.x) * 512 + threadIdx.x; v < vectors; v += step) {
    const auto a = reinterpret_cast<const Vec<float, 4>*>(x)[v];
    sum += static_cast<double>(a.at[0] * a.at[0] + a.at[1] * a.at[1] + a.at[2] * a.at[2] + a.at[3] * a.at[3]);
  }
  if (blockIdx.x == 0 && threadIdx.x == 0)
    for (index_t i = 4 * vectors; i < n; ++i) sum += static_cast<double>(x[i]) * x[i];
  sum = block_sum(sum, sums);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

inline void sum_of_squares(cudaStream_t stream, double* partial, const float* x, index_t n) {
  if (reinterpret_cast<std::uintptr_t>(x) % 16) throw Error("sum_of_squares", "x", "at a multiple of 16 bytes", "another address");
  sum_of_squares_kernel<<<square_blocks, 512, 0, stream>>>(partial, x, n);
  launched("sum_of_squares");
}

// The order of the sum is fixed: lanes, then warps.
static __global__ void __launch_bounds__(square_blocks) add_squares_kernel(StepSums* to, const double* partial) {
  __shared__ double sums[square_blocks / 32];
  const double all = block_sum(partial[threadIdx.x], sums);
  if (threadIdx.x == 0) to->squares += all;
}
/// to->squares += the sum of partial [square_blocks], of sum_of_squares.
inline void add_squares(cudaStream_t stream, StepSums* to, const double* partial) {
  add_squares_kernel<<<1, square_blocks, 0, stream>>>(to, partial);
  launched("add_squares");
}
static __global__ void clip_kernel(StepSums* to, float most) {
  const auto norm = static_cast<float>(sqrt(to->squares));
  to->norm = norm;
  to->adamw.scale = !isfinite(norm) ? nanf("") : most > 0 ? fminf(1.0f, most / (norm + 1e-6f)) : 1.0f;
}
/// Norm and scale from the squares.
inline void clip(cudaStream_t stream, StepSums* to, float most) {
  clip_kernel<<<1, 1, 0, stream>>>(to, most);
  launched("clip");
}

}  // namespace tinyllama::cuda
