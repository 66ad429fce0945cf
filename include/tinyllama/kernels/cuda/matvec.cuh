// y [T, N] = x [T, K] W^T for few rows of x (up to 8), straight from packed weights: the dot products of tiles, and kernels with one warp a row of W.
//
// Float weights are multiplied with x in f32. Block formats are multiplied as on the CPU: x as int8 codes with a scale for each 32 columns, four
// products an instruction (dp4a), scaled in f32:   y = sum over blocks of  d_x (s_w sum q_w q_x) - m_w (d_x sum q_x).
// Loads and arithmetic come to some 45 instructions for 32 weights of 4 bits, a quarter of what an SM issues while they arrive at 2.9 TB/s.
#pragma once

#include "tinyllama/kernels/cuda/packed_values.cuh"

namespace tinyllama::cuda {

// ---- activations

/// A vector of x as the dot products of block formats read it, nb = K / 32 blocks: codes of columns 0-15 of each block, then of columns 16-31, then
/// the scale and scale * (sum of codes). 16-byte reads of neighbouring blocks by neighbouring lanes are free of bank conflicts.
struct QuantisedVector {
  const uint4 *low, *high;
  const float2* scale_sum;
  __device__ __forceinline__ QuantisedVector(const std::byte* at, int nb)
      : low(reinterpret_cast<const uint4*>(at)), high(low + nb), scale_sum(reinterpret_cast<const float2*>(high + nb)) {}
};
__host__ __device__ constexpr index_t quantised_vector_bytes(index_t columns) { return (columns / 32 * 40 + 15) / 16 * 16; }

/// Four neighbouring columns (4 i ... 4 i + 3) into that form; the 8 lanes of a block of 32 call it together, and all lanes of a warp do.
/// Without `with_sums` for formats that have no min: they do not read the sum.
template <bool with_sums = true>
__device__ __forceinline__ void quantise4(std::byte* to, int nb, int i, float4 v, bool valid = true) {
  const auto larger = [](float a, float b) {  // a NaN stays: its block shall become one
    float r;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
  };
  float max = larger(larger(fabsf(v.x), fabsf(v.y)), larger(fabsf(v.z), fabsf(v.w)));
#pragma unroll
  for (int o = 4; o; o >>= 1) max = larger(max, __shfl_xor_sync(~0u, max, o));
  const float inverse = max > 4e-37f ? __fdividef(127.0f, max) : 0.0f, d = max * (1.0f / 127.0f);
  const int a = __float2int_rn(v.x * inverse), b = __float2int_rn(v.y * inverse), c = __float2int_rn(v.z * inverse), e = __float2int_rn(v.w * inverse);
  const int code = static_cast<int>(__byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, e, 0x0040), 0x5410));
  int sum = 0;
  if constexpr (with_sums) {
    sum = __dp4a(code, 0x01010101, 0);
#pragma unroll
    for (int o = 4; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
  }
  if (!valid) return;
  const int block = i >> 3, word = i & 7;
  reinterpret_cast<int*>(to + (word >> 2) * 16 * nb + 16 * block)[word & 3] = code;
  if (word == 0) reinterpret_cast<float2*>(to + 32 * nb)[block] = make_float2(d, d * static_cast<float>(sum));
}

/// A vector of x in f32 as the dot products of float formats read it: piece p of 8 columns in two planes of 16 bytes, n8 pieces each.
struct FloatVector {
  const float4 *low, *high;
  __device__ __forceinline__ FloatVector(const std::byte* at, int n8) : low(reinterpret_cast<const float4*>(at)), high(low + n8) {}
};
__host__ __device__ constexpr index_t float_vector_bytes(index_t columns) { return (columns + 7) / 8 * 32; }

// ---- dot products of a tile with T vectors: lane's share of the sum

template <Format F>
__device__ __forceinline__ float dot_block(const Block32<F>& w, uint4 low, uint4 high, float2 s) {
  int a = 0, b = 0;
  a = __dp4a(w.q[0], static_cast<int>(low.x), a), b = __dp4a(w.q[4], static_cast<int>(high.x), b);
  a = __dp4a(w.q[1], static_cast<int>(low.y), a), b = __dp4a(w.q[5], static_cast<int>(high.y), b);
  a = __dp4a(w.q[2], static_cast<int>(low.z), a), b = __dp4a(w.q[6], static_cast<int>(high.z), b);
  a = __dp4a(w.q[3], static_cast<int>(low.w), a), b = __dp4a(w.q[7], static_cast<int>(high.w), b);
  float y;
  if constexpr (F == Format::q6_K) y = w.scale * static_cast<float>(a) + w.scale_high * static_cast<float>(b);
  else y = w.scale * static_cast<float>(a + b);
  y *= s.x;
  if constexpr (Block32<F>::affine) y -= w.min * s.y;
  return y;
}

__device__ __forceinline__ float dot8(const float (&w)[8], float4 a, float4 b) {
  return ((w[0] * a.x + w[1] * a.y) + (w[2] * a.z + w[3] * a.w)) + ((w[4] * b.x + w[5] * b.y) + (w[6] * b.z + w[7] * b.w));
}

/// Block formats: acc[r] += blocks lane, lane + 32, ... of the nb blocks of R tiles; x begins `first` blocks into its vector.
template <Format F, int R>
__device__ __forceinline__ void dot_tiles_int8(float (&acc)[R], const std::byte* const (&tile)[R], int nb, const QuantisedVector& x, int first, int lane) {
  const auto block = [&](int n, int b) {
    const uint4 low = x.low[first + b], high = x.high[first + b];
    const float2 s = x.scale_sum[first + b];
#pragma unroll
    for (int r = 0; r < R; ++r) acc[r] += dot_block(Block32<F>(tile[r], n, b), low, high, s);
  };
  constexpr int full = tile_columns(F) / 32;
  if (nb == full) {
#pragma unroll
    for (int u = 0; u < full / 32; ++u) block(full, lane + 32 * u);
  } else {
#pragma unroll 1
    for (int b = lane; b < nb; b += 32) block(nb, b);
  }
}

/// Float formats: pieces lane, lane + 32, ... of the n8 pieces of R tiles.
template <Format F, int R>
__device__ __forceinline__ void dot_tiles_float(float (&acc)[R], const std::byte* const (&tile)[R], int n8, const FloatVector& x, int first, int lane) {
  constexpr int unroll = 4 / R;
  float a[R] = {}, b[R] = {};
  const auto piece = [&](int p) {
    const float4 l = x.low[first + p], h = x.high[first + p];
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const Values8<F> w(tile[r], p);
      a[r] += w.v[0] * l.x, b[r] += w.v[1] * l.y, a[r] += w.v[2] * l.z, b[r] += w.v[3] * l.w;
      a[r] += w.v[4] * h.x, b[r] += w.v[5] * h.y, a[r] += w.v[6] * h.z, b[r] += w.v[7] * h.w;
    }
  };
  int p = lane;
#pragma unroll 1
  for (; p + 32 * (unroll - 1) < n8; p += 32 * unroll) {
#pragma unroll
    for (int u = 0; u < unroll; ++u) piece(p + 32 * u);
  }
#pragma unroll 1
  for (; p < n8; p += 32) piece(p);
#pragma unroll
  for (int r = 0; r < R; ++r) acc[r] += a[r] + b[r];
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int o = 16; o; o >>= 1) x += __shfl_xor_sync(~0u, x, o);
  return x;
}

// ---- kernels

inline constexpr int matvec_rows = 8;  // rows of x at most

/// One product. x in the form that the kernel takes; y of type Y, rows ldy apart.
template <class X, class Y>
struct MatvecTask {
  const std::byte* w;   // packed rows of W [n, k], in device memory
  Format format;
  int t, n, k;          // t <= matvec_rows
  const X* x;           // matvec_float: [t, k], rows ldx apart. matvec_int8: t quantised vectors one after the other
  index_t ldx;
  Y* y;
  index_t ldy;
};

namespace detail {
template <class T>
__device__ __forceinline__ float to_float(T x) {
  if constexpr (std::is_same_v<T, f16>) return half_bits_to_float(x.bits);
  else if constexpr (std::is_same_v<T, bf16>) return __uint_as_float(static_cast<std::uint32_t>(x.bits) << 16);
  else return x;
}
}  // namespace detail

/// x [t, k] of any element type to t quantised vectors; k is a multiple of 32.
template <class X>
__global__ void quantise_vectors_kernel(const X* x, index_t ldx, int k, std::byte* out) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x), nb = k / 32;
  const bool valid = 4 * i < k;
  float v[4] = {};
  if (valid)
    for (int j = 0; j < 4; ++j) v[j] = detail::to_float(x[blockIdx.y * ldx + 4 * i + j]);
  quantise4(out + blockIdx.y * quantised_vector_bytes(k), nb, i, make_float4(v[0], v[1], v[2], v[3]), valid);
}
template <class X>
void quantise_vectors(cudaStream_t stream, const X* x, index_t ldx, int t, int k, std::byte* out) {
  if (t > 0) quantise_vectors_kernel<<<dim3(static_cast<unsigned>((k / 4 + 127) / 128), static_cast<unsigned>(t)), 128, 0, stream>>>(x, ldx, k, out);
}

/// A warp a row of W, T rows of x.
template <Format F, int T, class Y>
__global__ void matvec_int8_kernel(MatvecTask<std::byte, Y> task) {
  const int row = static_cast<int>(blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  if (row >= task.n) return;
  const std::byte* const w = task.w + row * packed_row_bytes(F, task.k);
  const int nb_row = task.k / 32;
  constexpr int tile = tile_columns(F) / 32;
  float acc[T] = {};
  for (int b = lane; b < nb_row; b += 32) {
    const int t0 = b / tile, nb = min(tile, nb_row - t0 * tile);
    const Block32<F> block(w + t0 * tile_bytes(F, tile_columns(F)), nb, b % tile);
#pragma unroll
    for (int t = 0; t < T; ++t) {
      const QuantisedVector x(task.x + t * quantised_vector_bytes(task.k), nb_row);
      acc[t] += dot_block(block, x.low[b], x.high[b], x.scale_sum[b]);
    }
  }
#pragma unroll
  for (int t = 0; t < T; ++t) {
    const float y = warp_sum(acc[t]);
    if (lane == 0) task.y[t * task.ldy + row] = from_float<Y>(y);
  }
}

/// The same in f32 with x as it is: for float weights, and for block formats where activations shall not be rounded.
template <Format F, int T, class X, class Y>
__global__ void matvec_float_kernel(MatvecTask<X, Y> task) {
  const int row = static_cast<int>(blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32), lane = static_cast<int>(threadIdx.x % 32);
  if (row >= task.n) return;
  const std::byte* const w = task.w + row * packed_row_bytes(F, task.k);
  float acc[T] = {};
  for (int p = lane; 8 * p < task.k; p += 32) {
    float v[8];
    load8_unscaled<F>(w, task.k, p, v);
#pragma unroll
    for (int t = 0; t < T; ++t) {
      const X* const x = task.x + t * task.ldx + 8 * p;
#pragma unroll
      for (int j = 0; j < 8; ++j)
        if (8 * p + j < task.k) acc[t] += v[j] * detail::to_float(x[j]);
    }
  }
#pragma unroll
  for (int t = 0; t < T; ++t) {
    const float y = warp_sum(acc[t]) * row_scale<F>(w, task.k);
    if (lane == 0) task.y[t * task.ldy + row] = from_float<Y>(y);
  }
}

namespace detail {
/// Calls f.operator()<T>() for the number of rows t, 1 to matvec_rows.
template <class Fn>
void visit_rows(int t, Fn&& f) {
  switch (t) {
    case 1: return f.template operator()<1>();
    case 2: return f.template operator()<2>();
    case 3: return f.template operator()<3>();
    case 4: return f.template operator()<4>();
    case 5: return f.template operator()<5>();
    case 6: return f.template operator()<6>();
    case 7: return f.template operator()<7>();
    case 8: return f.template operator()<8>();
  }
  throw Error("matvec", "rows of x", "1.." + std::to_string(matvec_rows), std::to_string(t));
}
inline constexpr int matvec_warps = 4;
inline unsigned matvec_blocks(int n) { return static_cast<unsigned>((n + matvec_warps - 1) / matvec_warps); }
}  // namespace detail

/// Block formats; task.x are quantised vectors.
template <class Y>
void matvec_int8(cudaStream_t stream, const MatvecTask<std::byte, Y>& task) {
  if (task.n == 0) return;
  visit(task.format, [&]<Format F>() {
    if constexpr (is_quantised(F))
      detail::visit_rows(task.t, [&]<int T>() {
        matvec_int8_kernel<F, T><<<detail::matvec_blocks(task.n), 32 * detail::matvec_warps, 0, stream>>>(task);
      });
    else throw Error("matvec_int8", "format of the weights", "a block format", name(F));
  });
}

/// Any format; products and sums in f32.
template <class X, class Y>
void matvec_float(cudaStream_t stream, const MatvecTask<X, Y>& task) {
  if (task.n == 0) return;
  visit(task.format, [&]<Format F>() {
    detail::visit_rows(task.t, [&]<int T>() {
      matvec_float_kernel<F, T><<<detail::matvec_blocks(task.n), 32 * detail::matvec_warps, 0, stream>>>(task);
    });
  });
}

}  // namespace tinyllama::cuda
