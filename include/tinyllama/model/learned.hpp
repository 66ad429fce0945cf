// A matrix that is learned: f32 master weights, where its gradient is summed, and low-rank adapters beside it (arXiv 2106.09685).
#pragma once

#include <array>
#include <cstdint>

#include "tinyllama/device/training.hpp"

namespace tinyllama {

/// W' = W + scale B A for some of the matrix's rows: what LoRA learns while W stays.
struct LearnedAdapter {
  index_t first_row = 0, rows = 0, rank = 0;
  const float *a = nullptr, *b = nullptr;       // [rank, K], [rows, rank]
  float *a_gradient = nullptr, *b_gradient = nullptr;
  float scale = 1.0f;                           // alpha / rank
  float dropout = 0.0f;                         // of the adapter's input
  std::uint64_t key = 0;                        // of this step's random bits
};

/// Memory that adapters share.
struct AdapterWork {
  float* dropped = nullptr;   // [T, widest K]: the input, and in the backward pass its gradient
  float *low = nullptr, *d_low = nullptr;  // [T, rank]
};

/// W [rows, columns] in f32. Without `gradient` it is frozen.
struct LearnedMatrix {
  const float* value = nullptr;
  float* gradient = nullptr;
  index_t rows = 0, columns = 0;
  GemmOptions how = {};        // of its gradient; `accumulate`: add to what is there
  std::array<LearnedAdapter, 3> adapters{};
  int adapter_count = 0;
  AdapterWork work = {};

  View<const float, dyn, dyn> view() const { return {value, {rows, columns}}; }
  GemmOptions product(bool accumulate) const { return {how.bf16, accumulate}; }
};

namespace detail {

/// The adapter's input: x, or x with dropout in work.dropped.
template <class D>
View<const float, dyn, dyn> adapter_input(D& dev, const LearnedMatrix& w, const LearnedAdapter& a, View<const float, dyn, dyn> x) {
  if (a.dropout == 0.0f) return x;
  const View<float, dyn, dyn> dropped(w.work.dropped, {x.extent(0), x.extent(1)});
  dropout(dev, dropped, x, a.dropout, a.key);
  return dropped;
}

}  // namespace detail

/// y [T, N] = x [T, K] W'^T
template <TrainingDevice D>
void matmul(D& dev, View<float, dyn, dyn> y, View<const float, dyn, dyn> x, const LearnedMatrix& w) {
  gemm(dev, y, x, w.view(), w.product(false));
  for (int i = 0; i < w.adapter_count; ++i) {
    const LearnedAdapter& a = w.adapters[static_cast<std::size_t>(i)];
    const View<float, dyn, dyn> low(w.work.low, {x.extent(0), a.rank});
    gemm(dev, low, detail::adapter_input(dev, w, a, x), View<const float, dyn, dyn>(a.a, {a.rank, w.columns}), w.product(false));
    scale(dev, low, a.scale);
    gemm(dev, columns(y, a.first_row, a.first_row + a.rows), low, View<const float, dyn, dyn>(a.b, {a.rows, a.rank}), w.product(true));
  }
}

/// dx [T, K] = dy [T, N] W'; dW += dy^T x, and the adapters' gradients.
template <TrainingDevice D>
void matmul_backward(D& dev, View<float, dyn, dyn> dx, View<const float, dyn, dyn> dy, View<const float, dyn, dyn> x, const LearnedMatrix& w) {
  gemm(dev, dx, dy, transposed(w.view()), w.product(false));
  if (w.gradient) gemm(dev, View<float, dyn, dyn>(w.gradient, {w.rows, w.columns}), transposed(dy), transposed(x), w.how);
  for (int i = 0; i < w.adapter_count; ++i) {
    const LearnedAdapter& a = w.adapters[static_cast<std::size_t>(i)];
    const View<float, dyn, dyn> low(w.work.low, {x.extent(0), a.rank}), d_low(w.work.d_low, {x.extent(0), a.rank});
    const View<const float, dyn, dyn> down(a.a, {a.rank, w.columns}), up(a.b, {a.rows, a.rank}), d_out = columns(dy, a.first_row, a.first_row + a.rows);
    const View<const float, dyn, dyn> in = detail::adapter_input(dev, w, a, x);
    gemm(dev, low, in, down, w.product(false));
    scale(dev, low, a.scale);
    gemm(dev, View<float, dyn, dyn>(a.b_gradient, {a.rows, a.rank}), transposed(d_out), transposed(View<const float, dyn, dyn>(low)), w.how);
    gemm(dev, d_low, d_out, transposed(up), w.product(false));
    scale(dev, d_low, a.scale);
    gemm(dev, View<float, dyn, dyn>(a.a_gradient, {a.rank, w.columns}), transposed(View<const float, dyn, dyn>(d_low)), transposed(in), w.how);
    if (a.dropout == 0.0f) {
      gemm(dev, dx, d_low, transposed(down), w.product(true));
    } else {
      const View<float, dyn, dyn> d_in(w.work.dropped, {x.extent(0), w.columns});
      gemm(dev, d_in, d_low, transposed(down), w.product(false));
      dropout(dev, d_in, d_in, a.dropout, a.key);
      dev.add(dx, d_in);
    }
  }
}

}  // namespace tinyllama
