// 8-bit floats for products (arXiv 2209.05433): a matrix of bf16 quantised with one scale, in its rows, in the rows of its transpose, or both in one pass over
// it, and the largest magnitude seen on the way, which sets the scale of the next time.
#pragma once

#include <cuda_fp8.h>

#include "tinyllama/kernels/cuda/reduce.cuh"
#include "tinyllama/kernels/cuda/vectors.cuh"

namespace tinyllama::cuda {

/// e4m3: weights and activations, up to 448; e5m2: gradients, up to 57344.
enum class Fp8 : std::uint8_t { e4m3, e5m2 };
template <Fp8 F>
inline constexpr float fp8_most = F == Fp8::e4m3 ? 448.0f : 57344.0f;

/// What one quantised matrix needs to know of itself, on the card. `most`: the largest magnitude that the scale is made for; `seen`: of the passes since.
struct alignas(16) Fp8Scale {
  float inverse;  // x = q inverse; cuBLASLt wants it at a multiple of 16 bytes
  float scale;    // q = x scale
  float most, seen;
};

struct QuantiseTask {
  const bf16* x;            // [rows, columns], multiples of 16
  index_t ld;
  std::uint8_t* q;          // [rows, columns]; or null
  std::uint8_t* transposed; // [columns, rows]; or null
  Fp8Scale* scale;
  int rows, columns;
};

template <Fp8 F>
__device__ inline std::uint32_t fp8_pair(float low, float high) {
  if constexpr (F == Fp8::e4m3) return e4m3_pair(low, high);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 890
  return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E5M2);  // no such instruction, and no product of them
#else
  std::uint16_t r;
  asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
  return r;
#endif
}

// A block a tile of 128 x 128. On its way through shared memory, 128 bytes a row, word w of row r lies at w ^ 4 (r / 16): then a warp reads 4 words of 16-row
// groups and writes rows of tile columns without bank conflicts. A thread turns 16 rows of 4 columns around.
template <Fp8 F>
__global__ void __launch_bounds__(256) quantise_kernel(QuantiseTask t) {
  __shared__ std::uint32_t tile[128 * 32];
  __shared__ float shared[32];
  const int me = static_cast<int>(threadIdx.x), first_row = static_cast<int>(blockIdx.y) * 128, first_column = static_cast<int>(blockIdx.x) * 128, column = first_column + me % 16 * 8;
  const float scale = t.scale->scale;
  float most = 0;
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    const int r = me / 16 + 16 * k, row = first_row + r;
    Vec<bf16, 8> x = {};
    if (row < t.rows && column < t.columns) x = *reinterpret_cast<const Vec<bf16, 8>*>(t.x + row * t.ld + column);
    float v[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = to_float(x.at[j]), most = fmaxf(most, fabsf(v[j])), v[j] *= scale;
    uint2 words;
    words.x = fp8_pair<F>(v[0], v[1]) | fp8_pair<F>(v[2], v[3]) << 16, words.y = fp8_pair<F>(v[4], v[5]) | fp8_pair<F>(v[6], v[7]) << 16;
    if (t.q && row < t.rows && column < t.columns) *reinterpret_cast<uint2*>(t.q + static_cast<index_t>(row) * t.columns + column) = words;
    if (t.transposed) *reinterpret_cast<uint2*>(tile + r * 32 + ((me % 16 * 2) ^ (4 * k))) = words;
  }
  most = block_reduce<Max>(most, shared);
  if (me == 0) atomicMax(reinterpret_cast<int*>(&t.scale->seen), __float_as_int(most));  // of numbers from 0 on, the order of their bits
  if (!t.transposed) return;
  __syncthreads();
  const int j = me % 8, w = me / 8, row = first_row + 16 * j;
  std::uint32_t in[16];
#pragma unroll
  for (int i = 0; i < 16; ++i) in[i] = tile[(16 * j + i) * 32 + (w ^ (4 * j))];
  if (row >= t.rows) return;
#pragma unroll
  for (int b = 0; b < 4; ++b) {
    if (first_column + 4 * w + b >= t.columns) return;
    uint4 out;
    std::uint32_t* const words = &out.x;
#pragma unroll
    for (int g = 0; g < 4; ++g) {
      const std::uint32_t low = __byte_perm(in[4 * g], in[4 * g + 1], b | (4 + b) << 4), high = __byte_perm(in[4 * g + 2], in[4 * g + 3], b | (4 + b) << 4);
      words[g] = (low & 0xffffu) | high << 16;
    }
    *reinterpret_cast<uint4*>(t.transposed + static_cast<index_t>(first_column + 4 * w + b) * t.rows + row) = out;
  }
}

/// Throws Error for sizes that are no multiples of 16.
inline void quantise(cudaStream_t stream, Fp8 format, const QuantiseTask& t) {
  if (t.rows % 16 || t.columns % 16 || !in_vectors<8>(t.x, t.ld, t.columns)) throw Error("fp8", "a matrix", "rows and columns in multiples of 16", std::to_string(t.rows) + " by " + std::to_string(t.columns));
  const dim3 grid(static_cast<unsigned>(ceil_div(t.columns, 128)), static_cast<unsigned>(ceil_div(t.rows, 128)));
  if (format == Fp8::e4m3) quantise_kernel<Fp8::e4m3><<<grid, 256, 0, stream>>>(t);
  else quantise_kernel<Fp8::e5m2><<<grid, 256, 0, stream>>>(t);
  launched("quantise");
}

/// seen = the largest magnitude of x [rows, columns].
static __global__ void __launch_bounds__(256) magnitude_kernel(QuantiseTask t) {
  __shared__ float shared[32];
  float most = 0;
  const index_t per_row = t.columns / 8, all = t.rows * per_row;
  for (index_t i = static_cast<index_t>(blockIdx.x) * 256 + threadIdx.x; i < all; i += static_cast<index_t>(gridDim.x) * 256) {
    const auto x = *reinterpret_cast<const Vec<bf16, 8>*>(t.x + i / per_row * t.ld + i % per_row * 8);
#pragma unroll
    for (int j = 0; j < 8; ++j) most = fmaxf(most, fabsf(to_float(x.at[j])));
  }
  most = block_reduce<Max>(most, shared);
  if (threadIdx.x == 0) atomicMax(reinterpret_cast<int*>(&t.scale->seen), __float_as_int(most));
}
inline void magnitude(cudaStream_t stream, const QuantiseTask& t) {
  magnitude_kernel<<<1024, 256, 0, stream>>>(t);
  launched("magnitude");
}

// The scale for what was seen, a power of two with room for twice as much: rounding then does not depend on it.
static __global__ void rescale_kernel(Fp8Scale* scales, int n, float most_e4m3, float most_e5m2, const std::uint8_t* formats, int only) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n || (only >= 0 && i != only)) return;
  Fp8Scale s = scales[i];
  if (s.seen > 0 && isfinite(s.seen)) s.most = s.seen;
  const float limit = formats[i] == static_cast<std::uint8_t>(Fp8::e4m3) ? most_e4m3 : most_e5m2;
  int exponent = 0;
  if (s.most > 0) frexpf(limit / (2 * s.most), &exponent), --exponent;
  s.scale = ldexpf(1.0f, exponent), s.inverse = ldexpf(1.0f, -exponent);
  if (only < 0) s.seen = 0;
  scales[i] = s;
}
/// All of n scales, at the end of a step, or one alone within the first, which goes on to collect what it sees. `formats`: of each, on the card.
inline void rescale(cudaStream_t stream, Fp8Scale* scales, int n, const std::uint8_t* formats, int only = -1) {
  rescale_kernel<<<static_cast<unsigned>(ceil_div(n, 128)), 128, 0, stream>>>(scales, n, fp8_most<Fp8::e4m3>, fp8_most<Fp8::e5m2>, formats, only);
  launched("rescale");
}

}  // namespace tinyllama::cuda
