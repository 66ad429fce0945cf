// rmsnorm in training: after a sum whose second part is in 16 bits; and its gradients, of its input, added to that of the residual stream, and of its gain.
//
//   r = 1 / sqrt(mean(x^2) + eps);  dx += r (g dy - x r^2 mean(g dy x));  dgain += sum over rows of dy x r
#pragma once

#include "tinyllama/kernels/cuda/reduce.cuh"
#include "tinyllama/kernels/cuda/vectors.cuh"

namespace tinyllama::cuda {

template <class A>
struct RmsnormGradientTask {
  float* dx;            // [rows, n]: +=
  index_t ld_dx;
  A* rounded;           // [rows, n]: dx, rounded; null: not wanted
  index_t ld_rounded;
  A* normed;            // [rows, n]: the norm once more; null: not wanted
  index_t ld_normed;
  const A* dy;          // [rows, n]
  index_t ld_dy;
  const float* x;       // [rows, n]
  index_t ld_x;
  const float* gain;    // [n]
  float* partial;       // [blocks, n]: each block's part of the gain's gradient; null: not wanted
  int rows, n;
  float eps;
};

/// Blocks take this many rows or more; how many there are depends on the rows alone, and so do the sums.
inline constexpr int gain_blocks = 1024;
inline int rmsnorm_gradient_blocks(int rows) { return rows < gain_blocks ? rows : gain_blocks; }

// A block a run of rows; a thread keeps Keep vectors of N columns, and over all rows the gain's gradient there.
template <class A, int N, int Keep>
__global__ void __launch_bounds__(256) rmsnorm_gradient_kernel(RmsnormGradientTask<A> t) {
  using F = Vec<float, N>;
  using H = Vec<A, N>;
  __shared__ float shared[2][8][2];
  const int vectors = t.n / N, me = static_cast<int>(threadIdx.x), lane = me % 32, warp = me / 32;
  const int first = static_cast<int>(static_cast<index_t>(t.rows) * blockIdx.x / gridDim.x), last = static_cast<int>(static_cast<index_t>(t.rows) * (blockIdx.x + 1) / gridDim.x);
  F gain[Keep], d_gain[Keep];
#pragma unroll
  for (int i = 0; i < Keep; ++i) {
    const int v = me + i * 256;
#pragma unroll
    for (int j = 0; j < N; ++j) gain[i].at[j] = d_gain[i].at[j] = 0.0f;
    if (v < vectors) gain[i] = reinterpret_cast<const F*>(t.gain)[v];
  }
  for (int row = first; row < last; ++row) {
    const auto* xs = reinterpret_cast<const F*>(t.x + row * t.ld_x);
    const auto* dys = reinterpret_cast<const H*>(t.dy + row * t.ld_dy);
    auto* dxs = reinterpret_cast<F*>(t.dx + row * t.ld_dx);
    F x[Keep], d[Keep];
    H dy[Keep];
#pragma unroll
    for (int i = 0; i < Keep; ++i) {
      const int v = me + i * 256;
      if (v < vectors) x[i] = xs[v], dy[i] = dys[v], d[i] = dxs[v];
    }
    float squares = 0, dots = 0;
#pragma unroll
    for (int i = 0; i < Keep; ++i)
      if (me + i * 256 < vectors)
#pragma unroll
        for (int j = 0; j < N; ++j) squares += x[i].at[j] * x[i].at[j], dots += x[i].at[j] * gain[i].at[j] * to_float(dy[i].at[j]);
    squares = warp_reduce<Sum>(squares), dots = warp_reduce<Sum>(dots);
    // Two buffers in turn: one barrier a row.
    if (lane == 0) shared[row & 1][warp][0] = squares, shared[row & 1][warp][1] = dots;
    __syncthreads();
    // In block_reduce's order, so that the norm has the bits that the forward pass gave it.
    const auto all = [&](int what) {
      const auto pair = [&](int w) { return shared[row & 1][w][what] + shared[row & 1][w + 4][what]; };
      return (pair(0) + pair(2)) + (pair(1) + pair(3));
    };
    squares = all(0), dots = all(1);
    const float r = rsqrtf(squares / static_cast<float>(t.n) + t.eps), c = r * r * dots / static_cast<float>(t.n);
#pragma unroll
    for (int i = 0; i < Keep; ++i) {
      const int v = me + i * 256;
      if (v >= vectors) continue;
      H rounded, normed;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float g = to_float(dy[i].at[j]);
        d[i].at[j] += r * (gain[i].at[j] * g - x[i].at[j] * c);
        d_gain[i].at[j] += g * x[i].at[j] * r;
        rounded.at[j] = from_float<A>(d[i].at[j]), normed.at[j] = from_float<A>(x[i].at[j] * r * gain[i].at[j]);
      }
      dxs[v] = d[i];
      if (t.rounded) reinterpret_cast<H*>(t.rounded + row * t.ld_rounded)[v] = rounded;
      if (t.normed) reinterpret_cast<H*>(t.normed + row * t.ld_normed)[v] = normed;
    }
  }
  if (!t.partial) return;
#pragma unroll
  for (int i = 0; i < Keep; ++i)
    if (me + i * 256 < vectors) reinterpret_cast<F*>(t.partial + static_cast<index_t>(blockIdx.x) * t.n)[me + i * 256] = d_gain[i];
}

// out [n] += the sum of `blocks` rows: 32 columns a block, rows dealt to 8 warps, their sums added in order.
static __global__ void add_rows_kernel(float* out, const float* rows, int blocks, int n) {
  __shared__ float sums[8][32];
  const int column = static_cast<int>(blockIdx.x * 32 + threadIdx.x % 32), warp = static_cast<int>(threadIdx.x) / 32;
  float sum = 0;
  if (column < n)
    for (int b = warp; b < blocks; b += 8) sum += rows[static_cast<index_t>(b) * n + column];
  sums[warp][threadIdx.x % 32] = sum;
  __syncthreads();
  if (warp || column >= n) return;
  for (int w = 1; w < 8; ++w) sum += sums[w][threadIdx.x];
  out[column] += sum;
}

/// sum = x + added;  normed = gain sum / sqrt(mean(sum^2) + eps)
template <class A>
struct AddRmsnormTask {
  A* normed;            // [rows, n]
  index_t ld_normed;
  float* sum;           // [rows, n], may be x
  index_t ld_sum;
  const float* x;
  index_t ld_x;
  const A* added;
  index_t ld_added;
  const float* gain;    // [n]
  int rows, n;
  float eps;
};

// A block a row, which is kept in registers between the passes as far as it fits.
template <class A, int N, int Keep>
__global__ void __launch_bounds__(256) add_rmsnorm_kernel(AddRmsnormTask<A> t) {
  using F = Vec<float, N>;
  using H = Vec<A, N>;
  __shared__ float shared[32];
  const index_t row = blockIdx.x;
  const int vectors = t.n / N, me = static_cast<int>(threadIdx.x);
  auto* const sum = reinterpret_cast<F*>(t.sum + row * t.ld_sum);
  F keep[Keep];
  float squares = 0;
  const auto fetch = [&](int v) {
    F a = reinterpret_cast<const F*>(t.x + row * t.ld_x)[v];
    const H b = reinterpret_cast<const H*>(t.added + row * t.ld_added)[v];
#pragma unroll
    for (int j = 0; j < N; ++j) a.at[j] += to_float(b.at[j]), squares += a.at[j] * a.at[j];
    sum[v] = a;
    return a;
  };
#pragma unroll
  for (int i = 0; i < Keep; ++i)
    if (me + i * 256 < vectors) keep[i] = fetch(me + i * 256);
  for (int v = me + Keep * 256; v < vectors; v += 256) fetch(v);
  const float r = rsqrtf(block_reduce<Sum>(squares, shared) / static_cast<float>(t.n) + t.eps);
  const auto write = [&](int v, const F& a) {
    const F g = reinterpret_cast<const F*>(t.gain)[v];
    H o;
#pragma unroll
    for (int j = 0; j < N; ++j) o.at[j] = from_float<A>(a.at[j] * r * g.at[j]);
    reinterpret_cast<H*>(t.normed + row * t.ld_normed)[v] = o;
  };
#pragma unroll
  for (int i = 0; i < Keep; ++i)
    if (me + i * 256 < vectors) write(me + i * 256, keep[i]);
  for (int v = me + Keep * 256; v < vectors; v += 256) write(v, sum[v]);
}

template <class A>
void add_rmsnorm(cudaStream_t stream, const AddRmsnormTask<A>& t) {
  if (t.rows == 0) return;
  const auto rows = static_cast<unsigned>(t.rows);
  if (in_vectors<4>(t.x, t.ld_x, t.n) && in_vectors<4>(t.sum, t.ld_sum, t.n) && in_vectors<4>(t.added, t.ld_added, t.n) && in_vectors<4>(t.normed, t.ld_normed, t.n) && in_vectors<4>(t.gain, 0, t.n))
    add_rmsnorm_kernel<A, 4, 2><<<rows, 256, 0, stream>>>(t);
  else add_rmsnorm_kernel<A, 1, 4><<<rows, 256, 0, stream>>>(t);
  launched("add_rmsnorm");
}

/// dgain [n], or null. `scratch`: gain_blocks n floats.
template <class A>
void rmsnorm_gradient(cudaStream_t stream, RmsnormGradientTask<A> t, float* dgain, float* scratch) {
  if (t.rows == 0 || t.n == 0) return;
  t.partial = dgain ? scratch : nullptr;
  const int blocks = rmsnorm_gradient_blocks(t.rows);
  const bool four = in_vectors<4>(t.dx, t.ld_dx, t.n) && in_vectors<4>(t.dy, t.ld_dy, t.n) && in_vectors<4>(t.x, t.ld_x, t.n) && in_vectors<4>(t.gain, 0, t.n) &&
                    (!t.rounded || in_vectors<4>(t.rounded, t.ld_rounded, t.n)) && (!t.normed || in_vectors<4>(t.normed, t.ld_normed, t.n));
  const int keep = static_cast<int>(ceil_div(t.n / (four ? 4 : 1), 256));
  const auto go = [&]<int N, int Keep>() { rmsnorm_gradient_kernel<A, N, Keep><<<static_cast<unsigned>(blocks), 256, 0, stream>>>(t); };
  if (four && keep <= 1) go.template operator()<4, 1>();
  else if (four && keep <= 2) go.template operator()<4, 2>();
  else if (four && keep <= 4) go.template operator()<4, 4>();
  else if (!four && keep <= 8) go.template operator()<1, 8>();
  else throw Error("rmsnorm_backward", "n", four ? "at most 4096" : "at most 2048 where rows are not at multiples of 4 elements", std::to_string(t.n));
  launched("rmsnorm_gradient");
  if (!dgain) return;
  add_rows_kernel<<<static_cast<unsigned>(ceil_div(t.n, 32)), 256, 0, stream>>>(dgain, scratch, blocks, t.n);
  launched("add_rows");
}

}  // namespace tinyllama::cuda
