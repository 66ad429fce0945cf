// Rows of the embedding, and the angles of their positions.
#pragma once

#include "tinyllama/kernels/cuda/batch.hpp"
#include "tinyllama/kernels/cuda/packed_values.cuh"
#include "tinyllama/kernels/cuda/vectors.cuh"

namespace tinyllama::cuda {

/// out [rows, columns] = rows `ids` of a packed table.
struct EmbeddingTask {
  float* out;
  index_t ld_out;
  const std::byte* table;
  int columns;
  const std::int32_t* ids;
  int rows;
};

// A thread 8 columns.
template <Format F>
__global__ void embedding_kernel(EmbeddingTask t) {
  const index_t row = blockIdx.x;
  const int p = static_cast<int>(blockIdx.y * blockDim.x + threadIdx.x);
  if (8 * p >= t.columns) return;
  float v[8];
  load8<F>(t.table + t.ids[row] * packed_row_bytes(F, t.columns), t.columns, p, v);
  float* const to = t.out + row * t.ld_out + 8 * p;
  for (int i = 0; i < 8; ++i)
    if (8 * p + i < t.columns) to[i] = v[i];
}

inline void embedding(cudaStream_t stream, Format format, const EmbeddingTask& t) {
  if (t.rows == 0) return;
  visit(format, [&]<Format F>() {
    embedding_kernel<F><<<dim3(static_cast<unsigned>(t.rows), static_cast<unsigned>(ceil_div(t.columns, 8 * 64))), 64, 0, stream>>>(t);
  });
  launched("embedding");
}

/// cos and sin [rows, count] of position * frequency. The angle is reduced to one turn in double: f32 angles are off by 1e-4 at position 2000.
struct RopeAnglesTask {
  float *cos, *sin;
  const std::int32_t* positions;
  int rows, count;
  double frequencies[128];
};

static __global__ void rope_angles_kernel(const __grid_constant__ RopeAnglesTask t) {
  const int i = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= t.rows * t.count) return;
  constexpr double turn = 6.283185307179586476925286766559;
  const double angle = static_cast<double>(t.positions[i / t.count]) * t.frequencies[i % t.count];
  float s, c;
  sincosf(static_cast<float>(angle - turn * rint(angle / turn)), &s, &c);
  t.sin[i] = s, t.cos[i] = c;
}

inline void rope_angles(cudaStream_t stream, const RopeAnglesTask& t) {
  if (t.rows * t.count == 0) return;
  rope_angles_kernel<<<static_cast<unsigned>(ceil_div(t.rows * t.count, 256)), 256, 0, stream>>>(t);
  launched("rope_angles");
}

/// out [sequences, columns] = the last row of each sequence.
template <class A>
__global__ void last_rows_kernel(A* out, index_t ld_out, const A* x, index_t ld, index_t columns, const BatchSequence* sequences) {
  const BatchSequence s = sequences[blockIdx.x];
  const index_t i = blockIdx.y * blockDim.x + threadIdx.x;
  if (i < columns) out[blockIdx.x * ld_out + i] = x[(s.first_row + s.tokens - 1) * ld + i];
}

template <class A>
void last_rows(cudaStream_t stream, A* out, index_t ld_out, const A* x, index_t ld, index_t columns, const BatchView& b) {
  last_rows_kernel<<<dim3(static_cast<unsigned>(b.count), static_cast<unsigned>(ceil_div(columns, 256))), 256, 0, stream>>>(out, ld_out, x, ld, columns, b.sequences);
  launched("last_rows");
}

}  // namespace tinyllama::cuda
