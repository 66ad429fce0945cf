// Small things that training does to each element: scale, add, dropout, round, fill.
#pragma once

#include "tinyllama/kernels/cuda/vectors.cuh"

namespace tinyllama::cuda {

template <class F>
__global__ void each_element_kernel(index_t rows, index_t n, F f) {
  for (index_t i = static_cast<index_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < rows * n; i += static_cast<index_t>(gridDim.x) * blockDim.x) f(i / n, i % n, i);
}

/// f(row, column, index) for each element of [rows, n].
template <class F>
void each_element(cudaStream_t stream, const char* name, index_t rows, index_t n, F f) {
  if (rows * n == 0) return;
  const index_t blocks = ceil_div(rows * n, 256);
  each_element_kernel<<<static_cast<unsigned>(blocks < 16384 ? blocks : 16384), 256, 0, stream>>>(rows, n, f);
  launched(name);
}

// What is done to an element of row r and column i, the at-th of all.
template <class A>
struct ScaleElement {
  A* x;
  index_t ld;
  float by;
  __device__ void operator()(index_t r, index_t i, index_t) const { x[r * ld + i] = from_float<A>(to_float(x[r * ld + i]) * by); }
};
template <class A>
struct AddElement {
  A* x;
  index_t ld;
  const A* y;
  index_t ld_y;
  __device__ void operator()(index_t r, index_t i, index_t) const { x[r * ld + i] = from_float<A>(to_float(x[r * ld + i]) + to_float(y[r * ld_y + i])); }
};
/// The same elements are kept as on the CPU: splitmix64 as a function of its count.
template <class A>
struct DropElement {
  A* out;
  index_t ld_out;
  const A* x;
  index_t ld;
  std::uint64_t key;
  std::uint32_t threshold;
  float keep;
  __device__ void operator()(index_t r, index_t i, index_t at) const {
    std::uint64_t z = key + static_cast<std::uint64_t>(at) * 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    out[r * ld_out + i] = from_float<A>(static_cast<std::uint32_t>((z ^ (z >> 31)) >> 32) < threshold ? 0.0f : to_float(x[r * ld + i]) * keep);
  }
};
template <class A>
struct RoundElement {
  A* to;
  const float* from;
  __device__ void operator()(index_t, index_t, index_t i) const { to[i] = from_float<A>(from[i]); }
};
struct FillElement {
  float* x;
  float value;
  __device__ void operator()(index_t, index_t, index_t i) const { x[i] = value; }
};

template <class A>
void scale(cudaStream_t stream, A* x, index_t ld, index_t rows, index_t n, float by) { each_element(stream, "scale", rows, n, ScaleElement<A>{x, ld, by}); }

/// x += y
template <class A>
void add_to(cudaStream_t stream, A* x, index_t ld, const A* y, index_t ld_y, index_t rows, index_t n) { each_element(stream, "add", rows, n, AddElement<A>{x, ld, y, ld_y}); }

/// out = x / (1 - p) where it is kept, 0 where not.
template <class A>
void dropout(cudaStream_t stream, A* out, index_t ld_out, const A* x, index_t ld, index_t rows, index_t n, float p, std::uint64_t key) {
  const auto threshold = static_cast<std::uint32_t>(static_cast<double>(p) * 4294967296.0);
  each_element(stream, "dropout", rows, n, DropElement<A>{out, ld_out, x, ld, key, threshold, 1.0f / (1.0f - p)});
}

/// to = from, rounded to nearest even.
template <class A>
void round_to(cudaStream_t stream, A* to, const float* from, index_t n) { each_element(stream, "round", 1, n, RoundElement<A>{to, from}); }

// 16 bytes of f32 at a time, and as many elements of the other format.
template <int N, class To, class From>
__global__ void __launch_bounds__(256) convert_kernel(To* to, const From* from, index_t n) {
  const index_t step = static_cast<index_t>(gridDim.x) * 256;
  for (index_t i = static_cast<index_t>(blockIdx.x) * 256 + threadIdx.x; i < n / N; i += step) {
    const auto x = reinterpret_cast<const Vec<From, N>*>(from)[i];
    Vec<To, N> y;
#pragma unroll
    for (int j = 0; j < N; ++j) y.at[j] = from_float<To>(to_float(x.at[j]));
    reinterpret_cast<Vec<To, N>*>(to)[i] = y;
  }
  if (blockIdx.x == 0 && threadIdx.x < n % N) to[n / N * N + threadIdx.x] = from_float<To>(to_float(from[n / N * N + threadIdx.x]));
}
/// to = from, [n], to nearest even.
template <class To, class From>
void convert(cudaStream_t stream, const char* name, To* to, const From* from, index_t n) {
  if (n == 0) return;
  const index_t blocks = ceil_div(n, 4 * 256 * 4);
  const auto grid = static_cast<unsigned>(blocks < 2048 ? blocks : 2048);
  const auto aligned = [](const auto* p) { return reinterpret_cast<std::uintptr_t>(p) % (4 * sizeof *p) == 0; };
  if (aligned(to) && aligned(from)) convert_kernel<4><<<grid, 256, 0, stream>>>(to, from, n);
  else convert_kernel<1><<<grid, 256, 0, stream>>>(to, from, n);
  launched(name);
}

inline void fill(cudaStream_t stream, float* x, index_t n, float value) { each_element(stream, "fill", 1, n, FillElement{x, value}); }

}  // namespace tinyllama::cuda
