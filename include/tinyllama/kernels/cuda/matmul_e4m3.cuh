// y [m, n] = x [m, k] w [n, k]^T (+ add) for weights of f8_e4m3 on tensor cores of 8-bit floats: rows of x are quantised too, each with a scale of its own.
//
//   q_x = x / s_x,  s_x = max |x| / 448 of the row;   y_ij = s_x,i s_w,j sum_k q_x,ik q_w,jk
// What a calibrated checkpoint expects ("dynamic per token"). cuBLASLt multiplies by both vectors of scales on its way.
#pragma once

#include "tinyllama/kernels/cuda/blas.cuh"
#include "tinyllama/kernels/cuda/pack.cuh"
#include "tinyllama/kernels/cuda/reduce.cuh"
#include "tinyllama/kernels/cuda/vectors.cuh"

namespace tinyllama::cuda {

/// Rows of x to e4m3, and the scales of rows of W, which stand in its packed rows, to one array: one launch.
struct QuantiseRowsTask {
  const bf16* x;          // [rows, columns], in pieces of 16 bytes; columns a multiple of 16
  index_t ldx;
  std::uint8_t* codes;    // [rows, columns]; null: only W's
  float* scale;           // [rows]
  int rows, columns;
  const std::byte* w;     // packed rows
  index_t w_stride;
  float* w_scale;         // [w_rows]
  int w_rows;
};

inline constexpr int quantise_rows_threads = 256;

// A block a row of x; the blocks behind those gather, a thread a row of W.
static __global__ void __launch_bounds__(quantise_rows_threads) quantise_rows_kernel(const QuantiseRowsTask t) {
  __shared__ float shared[32];
  const int thread = static_cast<int>(threadIdx.x), rows = t.codes ? t.rows : 0;
  if (static_cast<int>(blockIdx.x) >= rows) {
    const int row = (static_cast<int>(blockIdx.x) - rows) * quantise_rows_threads + thread;
    if (row < t.w_rows) t.w_scale[row] = *reinterpret_cast<const float*>(t.w + (row + 1) * t.w_stride - row_end_bytes(Format::f8_e4m3));
    return;
  }
  const bf16* const x = t.x + static_cast<index_t>(blockIdx.x) * t.ldx;
  constexpr int kept = 3;  // pieces of a thread that stay in registers: 6144 columns
  Vec<bf16, 8> pieces[kept];
  const int count = t.columns / 8;
  float most = 0;
  const auto look = [&](const Vec<bf16, 8>& v) {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float a = fabsf(to_float(v.at[j]));
      asm("max.NaN.f32 %0, %0, %1;" : "+f"(most) : "f"(a));  // a NaN stays, and makes its row one
    }
  };
#pragma unroll
  for (int i = 0; i < kept; ++i) {
    const int p = thread + i * quantise_rows_threads;
    if (p < count) pieces[i] = reinterpret_cast<const Vec<bf16, 8>*>(x)[p], look(pieces[i]);
  }
  for (int p = thread + kept * quantise_rows_threads; p < count; p += quantise_rows_threads) look(reinterpret_cast<const Vec<bf16, 8>*>(x)[p]);
  for (int o = 16; o; o >>= 1) {
    const float other = __shfl_xor_sync(~0u, most, o);
    asm("max.NaN.f32 %0, %0, %1;" : "+f"(most) : "f"(other));
  }
  if (thread % 32 == 0) shared[thread / 32] = most;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < quantise_rows_threads / 32; ++i) asm("max.NaN.f32 %0, %0, %1;" : "+f"(most) : "f"(shared[i]));
  const float inverse = most > 1e-30f ? e4m3::most / most : 0.0f;
  if (thread == 0) t.scale[blockIdx.x] = most * (1.0f / e4m3::most);
  uint2* const to = reinterpret_cast<uint2*>(t.codes + static_cast<index_t>(blockIdx.x) * t.columns);
  const auto put = [&](int p, const Vec<bf16, 8>& v) {
    const auto four = [&](int j) {
      return e4m3_pair(to_float(v.at[j]) * inverse, to_float(v.at[j + 1]) * inverse) | e4m3_pair(to_float(v.at[j + 2]) * inverse, to_float(v.at[j + 3]) * inverse) << 16;
    };
    to[p] = make_uint2(four(0), four(4));
  };
#pragma unroll
  for (int i = 0; i < kept; ++i)
    if (const int p = thread + i * quantise_rows_threads; p < count) put(p, pieces[i]);
  for (int p = thread + kept * quantise_rows_threads; p < count; p += quantise_rows_threads) put(p, reinterpret_cast<const Vec<bf16, 8>*>(x)[p]);
}

inline void quantise_rows(cudaStream_t stream, const QuantiseRowsTask& t) {
  const auto blocks = static_cast<unsigned>((t.codes ? t.rows : 0) + ceil_div(t.w_rows, quantise_rows_threads));
  if (blocks) quantise_rows_kernel<<<blocks, quantise_rows_threads, 0, stream>>>(t);
  launched("quantise_rows");
}

/// Scratch for all parts of one product: codes and scales of x, scales of W.
struct E4m3Operands {
  std::uint8_t* codes;
  float *scale, *w_scale;
  static std::size_t bytes(index_t rows, index_t columns, index_t w_rows) { return static_cast<std::size_t>((rows * columns + 255) / 256 * 256 + (rows + 3) / 4 * 16 + w_rows * 4); }
  E4m3Operands(std::byte* at, index_t rows, index_t columns)
      : codes(reinterpret_cast<std::uint8_t*>(at)), scale(reinterpret_cast<float*>(at + (rows * columns + 255) / 256 * 256)), w_scale(scale + (rows + 3) / 4 * 4) {}
};

/// Whether rows of x can be quantised here: the rest decides the library.
inline bool takes_e4m3(const bf16* x, index_t ldx, index_t k) { return k % 16 == 0 && in_vectors<8>(x, ldx, k); }

/// False where the library has no such product: nothing but the operands is then written. `quantised`: x's codes are there from the part before.
template <class Y>
bool matmul_e4m3(cudaStream_t stream, BlasPlans& blas, const std::byte* w, index_t n, index_t k, const bf16* x, index_t ldx, index_t m, Y* y, index_t ldy, const Y* add,
                 const E4m3Operands& o, bool quantised, std::byte* workspace, std::size_t workspace_bytes) {
  const index_t stride = packed_row_bytes(Format::f8_e4m3, k);
  quantise_rows(stream, {x, ldx, quantised ? nullptr : o.codes, o.scale, static_cast<int>(m), static_cast<int>(k), w, stride, o.w_scale, static_cast<int>(n)});
  BlasTask t{w, o.codes, y, stride, k, ldy, m, n, k, CUDA_R_8F_E4M3, blas_type<Y>(), add};
  t.w_scale = o.w_scale, t.x_scale = o.scale, t.row_scales = t.fast_sums = true;
  return blas.multiply(stream, t, workspace, workspace_bytes);
}

}  // namespace tinyllama::cuda
