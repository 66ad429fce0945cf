// A matrix that is learned: what products read of it, where its gradient is summed, and low-rank adapters beside it (arXiv 2106.09685).
#pragma once

#include <array>
#include <cstdint>
#include <type_traits>

#include "tinyllama/device/training.hpp"

namespace tinyllama {

/// W' = W + scale B A for some of the matrix's rows: what LoRA learns while W stays.
template <class A = float>
struct LearnedAdapter {
  index_t first_row = 0, rows = 0, rank = 0;
  const A *a = nullptr, *b = nullptr;           // [rank, K], [rows, rank]
  float *a_gradient = nullptr, *b_gradient = nullptr;
  float scale = 1.0f;                           // alpha / rank
  float dropout = 0.0f;                         // of the adapter's input
  std::uint64_t key = 0;                        // of this step's random bits
};

/// Memory that adapters share.
template <class A = float>
struct AdapterWork {
  A* dropped = nullptr;       // [T, widest K]: the input, and in the backward pass its gradient
  A *low = nullptr, *d_low = nullptr;  // [T, rank]
};

/// W [rows, columns] as products read it, in the type A of activations: the f32 master weights themselves where A is float, their rounded copy where it is
/// not. The gradient is f32; without one W is frozen.
template <class A = float>
struct LearnedMatrix {
  const A* value = nullptr;
  float* gradient = nullptr;
  index_t rows = 0, columns = 0;
  GemmOptions how = {};        // of its gradient; `accumulate`: add to what is there
  std::array<LearnedAdapter<A>, 3> adapters{};
  int adapter_count = 0;
  AdapterWork<A> work = {};

  View<const A, dyn, dyn> view() const { return {value, {rows, columns}}; }
  /// Whether products with W are products with the array `value`.
  bool plain() const { return adapter_count == 0 && !how.fp8; }
  /// Known by its address: of a layer's matrices, not of copies.
  Fp8Weights<A> in_8_bits() const { return {view(), this, how.passing}; }
  GemmOptions product(bool accumulate) const { return {how.bf16, accumulate}; }
};

namespace detail {

/// The adapter's input: x, or x with dropout in work.dropped.
template <class D, class A = typename D::activation>
View<const A, dyn, dyn> adapter_input(D& dev, const LearnedMatrix<A>& w, const LearnedAdapter<A>& a, View<const A, dyn, dyn> x) {
  if (a.dropout == 0.0f) return x;
  const View<A, dyn, dyn> dropped(w.work.dropped, {x.extent(0), x.extent(1)});
  dropout(dev, dropped, x, a.dropout, a.key);
  return dropped;
}

}  // namespace detail

/// y [T, N] = x [T, K] W'^T; y of activations or of float.
template <TrainingDevice D, class Y, index_t N, class X, index_t K>
void matmul(D& dev, View<Y, dyn, N> out, View<X, dyn, K> in, const LearnedMatrix<typename D::activation>& w) {
  using A = typename D::activation;
  const View<Y, dyn, dyn> y = out;
  const View<const A, dyn, dyn> x = in;
  if constexpr (requires { gemm_fp8(dev, y, x, w.in_8_bits()); })
    if (w.how.fp8) return gemm_fp8(dev, y, x, w.in_8_bits());
  gemm(dev, y, x, w.view(), w.product(false));
  for (int i = 0; i < w.adapter_count; ++i) {
    const LearnedAdapter<A>& a = w.adapters[static_cast<std::size_t>(i)];
    const View<A, dyn, dyn> low(w.work.low, {x.extent(0), a.rank});
    gemm(dev, low, detail::adapter_input(dev, w, a, x), View<const A, dyn, dyn>(a.a, {a.rank, w.columns}), w.product(false));
    scale(dev, low, a.scale);
    gemm(dev, columns(y, a.first_row, a.first_row + a.rows), View<const A, dyn, dyn>(low), View<const A, dyn, dyn>(a.b, {a.rows, a.rank}), w.product(true));
  }
}

/// dx [T, K] = dy [T, N] W'
template <TrainingDevice D, class A = typename D::activation>
void matmul_backward_input(D& dev, std::type_identity_t<View<A, dyn, dyn>> dx, std::type_identity_t<View<const A, dyn, dyn>> dy, const LearnedMatrix<typename D::activation>& w) {
  using Const = View<const A, dyn, dyn>;
  if constexpr (requires { gemm_fp8_input(dev, dx, dy, w.in_8_bits()); })
    if (w.how.fp8) return gemm_fp8_input(dev, dx, dy, w.in_8_bits());
  gemm(dev, dx, dy, transposed(w.view()), w.product(false));
  for (int i = 0; i < w.adapter_count; ++i) {
    const LearnedAdapter<A>& a = w.adapters[static_cast<std::size_t>(i)];
    const View<A, dyn, dyn> d_low(w.work.d_low, {dx.extent(0), a.rank});
    const Const down(a.a, {a.rank, w.columns}), up(a.b, {a.rows, a.rank});
    gemm(dev, d_low, columns(dy, a.first_row, a.first_row + a.rows), transposed(up), w.product(false));
    scale(dev, d_low, a.scale);
    if (a.dropout == 0.0f) {
      gemm(dev, dx, Const(d_low), transposed(down), w.product(true));
    } else {
      const View<A, dyn, dyn> d_in(w.work.dropped, {dx.extent(0), w.columns});
      gemm(dev, d_in, Const(d_low), transposed(down), w.product(false));
      dropout(dev, d_in, Const(d_in), a.dropout, a.key);
      add(dev, dx, Const(d_in));
    }
  }
}

/// dW += dy^T x, and the adapters' gradients. After matmul_backward_input of the same matrix, which may have kept what it made of dy.
template <TrainingDevice D, class A = typename D::activation>
void matmul_backward_weight(D& dev, const LearnedMatrix<typename D::activation>& w, std::type_identity_t<View<const A, dyn, dyn>> dy, std::type_identity_t<View<const A, dyn, dyn>> x) {
  using Const = View<const A, dyn, dyn>;
  if constexpr (requires { gemm_fp8_weight(dev, View<float, dyn, dyn>(w.gradient, {w.rows, w.columns}), x, w.in_8_bits(), true); })
    if (w.how.fp8) return gemm_fp8_weight(dev, View<float, dyn, dyn>(w.gradient, {w.rows, w.columns}), x, w.in_8_bits(), w.how.accumulate);
  if (w.gradient) gemm(dev, View<float, dyn, dyn>(w.gradient, {w.rows, w.columns}), transposed(dy), transposed(x), w.how);
  for (int i = 0; i < w.adapter_count; ++i) {
    const LearnedAdapter<A>& a = w.adapters[static_cast<std::size_t>(i)];
    const View<A, dyn, dyn> low(w.work.low, {x.extent(0), a.rank}), d_low(w.work.d_low, {x.extent(0), a.rank});
    const Const down(a.a, {a.rank, w.columns}), up(a.b, {a.rows, a.rank}), d_out = columns(dy, a.first_row, a.first_row + a.rows);
    const Const in = detail::adapter_input(dev, w, a, x);
    gemm(dev, low, in, down, w.product(false));
    scale(dev, low, a.scale);
    gemm(dev, View<float, dyn, dyn>(a.b_gradient, {a.rows, a.rank}), transposed(d_out), transposed(Const(low)), w.how);
    gemm(dev, d_low, d_out, transposed(up), w.product(false));
    scale(dev, d_low, a.scale);
    gemm(dev, View<float, dyn, dyn>(a.a_gradient, {a.rank, w.columns}), transposed(Const(d_low)), transposed(in), w.how);
  }
}

}  // namespace tinyllama
