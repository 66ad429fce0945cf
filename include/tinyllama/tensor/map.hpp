// map: one lambda over any number of inputs, a vector of elements at a time; and what follows from it: cast and fill.
#pragma once

#include <algorithm>
#include <array>
#include <string>
#include <type_traits>
#include <utility>

#include "tinyllama/tensor/tensor.hpp"
#include "tinyllama/tensor/vec.hpp"

HWY_BEFORE_NAMESPACE();
namespace tinyllama {
inline namespace TINYLLAMA_VEC_NAMESPACE {

namespace vec_detail {

/// Elements of one task: some 2 us of work, against 0.15 us for handing it to a thread.
inline constexpr index_t task_elements = 8192;

// The one place where tails are handled: k < lanes elements go through a padded buffer, and through the same instructions.
template <class T>
HWY_INLINE Vec load_partial(const T* p, index_t stride, index_t k) {
  alignas(64) T buffer[Vec::lanes] = {};
  for (index_t i = 0; i < k; ++i) buffer[i] = p[i * stride];
  return load(buffer);
}
template <class T>
HWY_INLINE void store_partial(Vec v, T* p, index_t stride, index_t k) {
  alignas(64) T buffer[Vec::lanes];
  store(v, buffer);
  for (index_t i = 0; i < k; ++i) p[i * stride] = buffer[i];
}

template <class T>
HWY_INLINE Vec load_strided(const T* p, index_t stride) {
  if (stride == 1) return load(p);
  if (stride == 0) return Vec(static_cast<float>(*p));
  return load_partial(p, stride, Vec::lanes);
}

/// A run of elements: where it starts, and from one element to the next.
template <class T>
struct Run {
  T* p;
  index_t stride;
};

// out[i] = f(in[i]...) for i in [0, n).
template <class F, class T, class... U>
HWY_INLINE void map_run(index_t n, const F& f, Run<T> out, Run<U>... in) {
  constexpr index_t lanes = Vec::lanes;
  index_t i = 0;
  const bool all_contiguous = (true && ... && (in.stride == 1));
  if (out.stride == 1 && all_contiguous) {
    for (; i + 4 * lanes <= n; i += 4 * lanes) {
      const Vec a = f(load(in.p + i)...), b = f(load(in.p + i + lanes)...), c = f(load(in.p + i + 2 * lanes)...), d = f(load(in.p + i + 3 * lanes)...);
      store(a, out.p + i), store(b, out.p + i + lanes), store(c, out.p + i + 2 * lanes), store(d, out.p + i + 3 * lanes);
    }
    for (; i + lanes <= n; i += lanes) store(f(load(in.p + i)...), out.p + i);
  } else if (out.stride == 1) {
    for (; i + lanes <= n; i += lanes) store(f(load_strided(in.p + i * in.stride, in.stride)...), out.p + i);
  } else {
    for (; i + lanes <= n; i += lanes) store_partial(f(load_strided(in.p + i * in.stride, in.stride)...), out.p + i * out.stride, out.stride, lanes);
  }
  if (i < n) store_partial(f(load_partial(in.p + i * in.stride, in.stride, n - i)...), out.p + i * out.stride, out.stride, n - i);
}

struct Same {
  HWY_INLINE Vec operator()(Vec x) const { return x; }
};
struct Plus {
  HWY_INLINE Vec operator()(Vec x, Vec y) const { return x + y; }
};

/// One shape and the strides of several operands, with axes merged wherever every operand allows it: contiguous operands of any
/// rank become one run.
template <std::size_t Rank, std::size_t Operands>
struct Layout {
  static constexpr std::size_t axes = Rank ? Rank : 1;
  std::size_t used = 1;                                              // axes in use, outermost first
  std::array<index_t, axes> shape{};
  std::array<std::array<index_t, axes>, Operands> strides{};

  Layout(const std::array<index_t, Rank>& s, const std::array<std::array<index_t, Rank>, Operands>& t) {
    used = 0;
    for (std::size_t k = 0; k < Rank; ++k) {
      if (s[k] == 1) continue;
      bool merge = used > 0;
      for (std::size_t o = 0; o < Operands && merge; ++o) merge = strides[o][used - 1] == t[o][k] * s[k];
      if (!merge) ++used;
      shape[used - 1] = merge ? shape[used - 1] * s[k] : s[k];
      for (std::size_t o = 0; o < Operands; ++o) strides[o][used - 1] = t[o][k];
    }
    if (used == 0) {
      used = 1, shape[0] = 1;
      for (std::size_t o = 0; o < Operands; ++o) strides[o][0] = 1;
    }
  }

  index_t inner() const { return shape[used - 1]; }
  index_t outer() const {
    index_t n = 1;
    for (std::size_t k = 0; k + 1 < used; ++k) n *= shape[k];
    return n;
  }
  /// Offset of operand o at run r.
  index_t offset(std::size_t o, index_t r) const {
    index_t at = 0;
    for (std::size_t k = used - 1; k-- > 1; r /= shape[k]) at += r % shape[k] * strides[o][k];
    return used > 1 ? at + r * strides[o][0] : at;
  }
  index_t inner_stride(std::size_t o) const { return strides[o][used - 1]; }
};

template <class T>
inline constexpr bool is_float_element = std::is_same_v<std::remove_const_t<T>, float> || std::is_same_v<std::remove_const_t<T>, bf16> ||
                                         std::is_same_v<std::remove_const_t<T>, f16>;

template <std::size_t R>
void check_same_shape(const char* operation, std::size_t operand, const std::array<index_t, R>& out, const std::array<index_t, R>& in) {
  if (out != in)
    throw Error(operation, "input " + std::to_string(operand), "shape " + detail::shape_text(out) + " of the output", detail::shape_text(in));
}

template <std::size_t R>
void check_writable(const char* operation, const std::array<index_t, R>& shape, const std::array<index_t, R>& strides) {
  for (index_t e : shape)
    if (e == 0) return;
  for (std::size_t k = 0; k < R; ++k)
    if (shape[k] > 1 && strides[k] == 0)
      throw Error(operation, "output", "a place for each element", "a broadcast view, strides " + detail::shape_text(strides));
}

template <class A, class B>
inline constexpr bool extents_may_agree = false;
template <class T, index_t... E, class U, index_t... F>
  requires(sizeof...(E) == sizeof...(F))
inline constexpr bool extents_may_agree<View<T, E...>, View<U, F...>> = ((E == F || E == dyn || F == dyn) && ...);

template <class Device, class F, class T, index_t... E, class... In>
void map_views(const char* operation, const Device& device, View<T, E...> out, const F& f, In... in) {
  constexpr std::size_t rank = sizeof...(E), operands = sizeof...(In) + 1;
  static_assert(operands <= 9, "map takes at most eight inputs");
  static_assert(!std::is_const_v<T>, "map: the output is a view of const elements");
  static_assert(is_float_element<T> && (is_float_element<typename In::element_type> && ...), "map works on float, bf16 and f16");
  static_assert(((In::rank == rank) && ...), "map: inputs have the rank of the output; see broadcast_rows and broadcast_columns");
  static_assert((extents_may_agree<View<T, E...>, In> && ...), "map: an input's static extents differ from the output's");
  [[maybe_unused]] std::size_t operand = 0;
  (check_same_shape(operation, operand++, out.shape(), in.shape()), ...);
  check_writable(operation, out.shape(), out.strides());
  if (out.size() == 0) return;

  const Layout<rank, operands> layout(out.shape(), {out.strides(), in.strides()...});
  const index_t inner = layout.inner(), total = inner * layout.outer();
  device.parallel_for(total, task_elements, [&](index_t begin, index_t end) {
    for (index_t run = begin / inner, first = begin % inner, n; begin < end; begin += n, ++run, first = 0) {
      n = std::min(inner - first, end - begin);
      [&]<std::size_t... I>(std::index_sequence<I...>) {
        const auto at = [&](auto* p, std::size_t o) {
          return Run<std::remove_pointer_t<decltype(p)>>{p + layout.offset(o, run) + first * layout.inner_stride(o), layout.inner_stride(o)};
        };
        map_run(n, f, at(out.data(), 0), at(in.data(), I + 1)...);
      }(std::make_index_sequence<sizeof...(In)>());
    }
  });
}

}  // namespace vec_detail

/// out[i] = f(in[i]...) for every element. Operands are views or tensors of one shape, of float, bf16 or f16 in any mixture: f gets
/// each as a Vec of floats, and its result is rounded to nearest even where the output is narrower. Inputs may be broadcast or
/// strided views, and may be the output itself. Throws Error that names the operand whose shape differs.
///   map(dev, h, [](auto g, auto u) { return silu(g) * u; }, gate, up);
template <class Device, class Out, class F, class... In>
void map(const Device& device, Out&& out, const F& f, const In&... in) {
  vec_detail::map_views("map", device, as_view(out), f, as_view(in)...);
}

/// Every element converted to the output's type, rounded to nearest even. Views may be strided or broadcast.
template <class Device, class Out, class In>
void cast(const Device& device, Out&& out, const In& in) {
  vec_detail::map_views("cast", device, as_view(out), vec_detail::Same(), as_view(in));
}

/// The same value in every element.
template <class Device, class Out>
void fill(const Device& device, Out&& out, float value) {
  vec_detail::map_views("fill", device, as_view(out), [=]() HWY_ATTR { return Vec(value); });
}

}  // namespace TINYLLAMA_VEC_NAMESPACE
}  // namespace tinyllama
HWY_AFTER_NAMESPACE();
