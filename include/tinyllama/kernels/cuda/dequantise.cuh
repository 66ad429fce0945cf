// Packed weights as values, for a library's matrix product.
#pragma once

#include "tinyllama/kernels/cuda/packed_values.cuh"

namespace tinyllama::cuda {

/// out [rows, columns], rows ldo apart, of T. columns are a multiple of 8.
template <Format F, class T>
__global__ void dequantise_kernel(const std::byte* w, index_t row_stride, int rows, int columns, T* out, index_t ldo) {
  const int per_row = columns / 8;
  for (index_t i = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < static_cast<index_t>(rows) * per_row; i += static_cast<index_t>(gridDim.x) * blockDim.x) {
    const index_t r = i / per_row;
    const int p = static_cast<int>(i % per_row);
    float v[8];
    load8<F>(w + r * row_stride, columns, p, v);
    alignas(16) T t[8];
#pragma unroll
    for (int j = 0; j < 8; ++j) t[j] = from_float<T>(v[j]);
    T* const to = out + r * ldo + 8 * p;
    if (reinterpret_cast<std::uintptr_t>(to) % 16 == 0) {
#pragma unroll
      for (int j = 0; j < static_cast<int>(sizeof t / 16); ++j) reinterpret_cast<uint4*>(to)[j] = reinterpret_cast<const uint4*>(t)[j];
    } else {
      for (int j = 0; j < 8; ++j) to[j] = t[j];
    }
  }
}

/// Launches it for a format known at run time. `w` points to packed rows in device memory.
template <class T>
void dequantise(cudaStream_t stream, Format format, const std::byte* w, int rows, int columns, T* out, index_t ldo) {
  visit(format, [&]<Format F>() {
    const index_t n = static_cast<index_t>(rows) * (columns / 8);
    if (n == 0) return;
    const auto blocks = static_cast<unsigned>(std::min<index_t>((n + 255) / 256, 8192));
    dequantise_kernel<F, T><<<blocks, 256, 0, stream>>>(w, packed_row_bytes(F, columns), rows, columns, out, ldo);
  });
}

}  // namespace tinyllama::cuda
