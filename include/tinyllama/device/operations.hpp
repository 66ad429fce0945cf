// Each operation of a device as a function: static shapes disagree at compile time, dynamic ones with an Error that names the operand.
#pragma once

#include <string>

#include "tinyllama/device/device.hpp"

namespace tinyllama {
namespace detail {

template <index_t A, index_t B>
inline constexpr bool fits = A == B || A == dyn || B == dyn;

inline void expect_extent(std::string_view operation, std::string_view operand, index_t expected, index_t found) {
  if (expected != found) throw Error(operation, operand, std::to_string(expected), std::to_string(found));
}
template <class T, index_t... E>
void expect_rows(std::string_view operation, std::string_view operand, const View<T, E...>& v) {
  constexpr std::size_t last = sizeof...(E) - 1;
  if (v.extent(last) > 1 && v.stride(last) != 1) throw Error(operation, operand, "rows of adjacent elements", "stride " + std::to_string(v.stride(last)));
}
/// Row-major matrix of any rank >= 1 as [rows, columns].
template <class T, index_t R, index_t N>
constexpr View<T, dyn, dyn> matrix(View<T, R, N> v) { return v; }
template <class T, index_t N>
constexpr View<T, dyn, dyn> matrix(View<T, N> v) { return {v.data(), {1, v.extent(0)}}; }

}  // namespace detail

/// out = gain x / sqrt(mean(x^2) + eps) for each row (arXiv 1910.07467). out, x: [T, n] or [n]; gain: [n]. In place allowed.
template <Device D, class O, index_t... A, class X, index_t... B, class G, index_t N>
  requires(sizeof...(A) == sizeof...(B))
void rmsnorm(D& dev, View<O, A...> out, View<X, B...> x, View<G, N> gain, float eps) {
  static_assert((detail::fits<A, B> && ...), "rmsnorm: out and x differ in shape");
  static_assert(detail::fits<View<O, A...>::static_extents[sizeof...(A) - 1], N>, "rmsnorm: gain has one element for each column");
  const View<O, dyn, dyn> o = detail::matrix(out);
  const View<const float, dyn, dyn> i = detail::matrix(View<const float, B...>(x));
  detail::expect_extent("rmsnorm", "rows of x", o.extent(0), i.extent(0));
  detail::expect_extent("rmsnorm", "columns of x", o.extent(1), i.extent(1));
  detail::expect_extent("rmsnorm", "gain", o.extent(1), gain.extent(0));
  detail::expect_rows("rmsnorm", "x", i);
  detail::expect_rows("rmsnorm", "out", o);
  detail::expect_rows("rmsnorm", "gain", gain);
  dev.rmsnorm(o, i, gain.data(), eps);
}

/// Rotary position embedding, in place (arXiv 2104.09864). x: [T, heads * head_dim]; cos, sin: [T, head_dim / 2] of each row's position.
template <Device D, class X, index_t T, index_t N, class F, index_t... A>
void rope(D& dev, View<X, T, N> x, View<F, A...> cos, View<F, A...> sin, RopeLayout layout) {
  static_assert(sizeof...(A) == 2, "rope: cos and sin are [T, head_dim / 2]");
  const index_t head_dim = 2 * cos.extent(1);
  detail::expect_extent("rope", "rows of cos", x.extent(0), cos.extent(0));
  detail::expect_extent("rope", "rows of sin", x.extent(0), sin.extent(0));
  detail::expect_extent("rope", "columns of sin", cos.extent(1), sin.extent(1));
  if (head_dim == 0 || x.extent(1) % head_dim) throw Error("rope", "x", "a multiple of " + std::to_string(head_dim) + " columns", std::to_string(x.extent(1)));
  detail::expect_rows("rope", "x", x);
  dev.rope(x, View<const float, dyn, dyn>(cos), View<const float, dyn, dyn>(sin), x.extent(1) / head_dim, layout);
}

/// out = gate sigmoid(gate) up (arXiv 2002.05202). All [T, n] or [n].
template <Device D, class O, index_t... A, class G, index_t... B, class U, index_t... C>
  requires(sizeof...(A) == sizeof...(B) && sizeof...(A) == sizeof...(C))
void swiglu(D& dev, View<O, A...> out, View<G, B...> gate, View<U, C...> up) {
  static_assert(((detail::fits<A, B> && detail::fits<A, C>) && ...), "swiglu: out, gate and up differ in shape");
  const View<O, dyn, dyn> o = detail::matrix(out);
  const View<const O, dyn, dyn> g = detail::matrix(View<const O, B...>(gate)), u = detail::matrix(View<const O, C...>(up));
  for (std::size_t axis : {std::size_t{0}, std::size_t{1}}) {
    detail::expect_extent("swiglu", "gate", o.extent(axis), g.extent(axis));
    detail::expect_extent("swiglu", "up", o.extent(axis), u.extent(axis));
  }
  detail::expect_rows("swiglu", "out", o);
  detail::expect_rows("swiglu", "gate", g);
  detail::expect_rows("swiglu", "up", u);
  dev.swiglu(o, g, u);
}

/// y = x w^T. y: [T, N], of activations or float; x: [T, K], of activations; w: [N, K] in any storage format, packed or in rows.
template <Device D, class Y, index_t T, index_t N, class X, index_t S, index_t K>
void matmul(D& dev, View<Y, T, N> y, View<X, S, K> x, const Linear& w) {
  static_assert(detail::fits<T, S>, "matmul: y and x differ in rows");
  detail::expect_extent("matmul", "rows of x", y.extent(0), x.extent(0));
  detail::expect_extent("matmul", "columns of x", w.columns(), x.extent(1));
  detail::expect_extent("matmul", "columns of y", w.rows(), y.extent(1));
  for (int i = 0; i < w.parts; ++i) {
    const Matrix& m = w.part[static_cast<std::size_t>(i)];
    detail::expect_extent("matmul", "columns of w", w.columns(), m.columns);
    if (m.columns % info(m.format).block != 0)
      throw Error("matmul", "columns of w, " + std::string(name(m.format)), "a multiple of " + std::to_string(info(m.format).block), std::to_string(m.columns));
  }
  detail::expect_rows("matmul", "x", x);
  detail::expect_rows("matmul", "y", y);
  dev.matmul(View<Y, dyn, dyn>(y), View<const typename D::activation, dyn, dyn>(x), w);
}

/// The same with w [N, K] as a view of one's own f32, f16 or bf16 elements.
template <Device D, class Y, index_t T, index_t N, class X, index_t S, index_t K, class W, index_t M, index_t L>
void matmul(D& dev, View<Y, T, N> y, View<X, S, K> x, View<W, M, L> w) {
  static_assert(detail::fits<N, M> && detail::fits<K, L>, "matmul: w is [columns of y, columns of x]");
  if (!w.contiguous()) throw Error("matmul", "w", "contiguous rows", "strides " + detail::shape_text(w.strides()));
  matmul(dev, y, x, Linear(Matrix{format_of<W>, false, w.extent(0), w.extent(1), reinterpret_cast<const std::byte*>(w.data())}));
}

/// Rows of out = softmax(scale x). out, x: [T, n] or [n]. In place allowed.
template <Device D, index_t... A, class X, index_t... B>
  requires(sizeof...(A) == sizeof...(B))
void softmax(D& dev, View<float, A...> out, View<X, B...> x, float scale = 1.0f) {
  static_assert((detail::fits<A, B> && ...), "softmax: out and x differ in shape");
  const View<float, dyn, dyn> o = detail::matrix(out);
  const View<const float, dyn, dyn> i = detail::matrix(View<const float, B...>(x));
  for (std::size_t axis : {std::size_t{0}, std::size_t{1}}) detail::expect_extent("softmax", "x", o.extent(axis), i.extent(axis));
  detail::expect_rows("softmax", "out", o);
  detail::expect_rows("softmax", "x", i);
  dev.softmax(o, i, scale);
}

}  // namespace tinyllama
