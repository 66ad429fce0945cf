// xtensor containers as operands, and views as xtensor expressions, without a copy. The only header that includes xtensor.
#pragma once

#include <array>
#include <cstddef>
#include <string>
#include <type_traits>

#if __has_include(<xtensor/containers/xtensor.hpp>)  // 0.26 and newer
#include <xtensor/containers/xadapt.hpp>
#include <xtensor/containers/xarray.hpp>
#include <xtensor/containers/xfixed.hpp>
#include <xtensor/containers/xtensor.hpp>
#include <xtensor/views/xview.hpp>
#else
#include <xtensor/xadapt.hpp>
#include <xtensor/xarray.hpp>
#include <xtensor/xfixed.hpp>
#include <xtensor/xtensor.hpp>
#include <xtensor/xview.hpp>
#endif

#include "tinyllama/tensor/tensor.hpp"

namespace tinyllama {

/// An xtensor expression whose elements lie in memory at fixed strides: xtensor, xarray, xtensor_fixed, xt::adapt and slices of
/// them. The others (lazy expressions, index views, filters) have no elements to point at and go through copy_of().
template <class X>
concept XtensorInMemory = xt::is_xexpression<std::remove_cvref_t<X>>::value && xt::has_data_interface<std::remove_cvref_t<X>>::value &&
                          xt::has_strides<std::remove_cvref_t<X>>::value;

namespace detail {

// The extents of a View of an expression of this shape type: static for xtensor_fixed, else dyn, as many as the rank.
template <class T, class Shape>
struct XtensorView;
template <class T, class I, std::size_t N>
struct XtensorView<T, std::array<I, N>> {
  template <std::size_t... K>
  static View<T, (static_cast<void>(K), dyn)...> of(std::index_sequence<K...>);
  using type = decltype(of(std::make_index_sequence<N>()));
};
template <class T, std::size_t... E>
struct XtensorView<T, xt::fixed_shape<E...>> {
  using type = View<T, static_cast<index_t>(E)...>;
};

// The rank that the type of an expression's shape tells, or -1.
template <class Shape>
inline constexpr int xtensor_rank = -1;
template <class I, std::size_t N>
inline constexpr int xtensor_rank<std::array<I, N>> = static_cast<int>(N);
template <std::size_t... E>
inline constexpr int xtensor_rank<xt::fixed_shape<E...>> = static_cast<int>(sizeof...(E));

// A container is what its own evaluation would be; slices and adaptors are not.
template <class X>
inline constexpr bool xtensor_owns = [] {
  if constexpr (requires { typename X::temporary_type; })
    return std::is_same_v<X, typename X::temporary_type>;
  else
    return false;
}();

template <class V, class X>
V xtensor_view(X& x, bool rows_only) {
  constexpr std::size_t rank = V::rank;
  if (x.dimension() != rank) throw Error("as_view", "rank", std::to_string(rank), std::to_string(x.dimension()));
  std::array<index_t, rank> shape{}, strides{};
  index_t size = 1;  // xtensor gives an axis of one element the stride 0; here it gets the one it would have if it were longer
  for (std::size_t k = rank; k-- > 0;) {
    shape[k] = static_cast<index_t>(x.shape()[k]);
    strides[k] = shape[k] == 1 ? size : static_cast<index_t>(x.strides()[k]);
    size = strides[k] * shape[k];
  }
  if constexpr (rank > 0)
    if (rows_only && strides[rank - 1] != 1 && shape[rank - 1] != 0)
      throw Error("as_view", "elements", "contiguous rows: call copy_of first, or as_strided_view where the operation takes strides",
                  "strides " + shape_text(strides));
  return {x.data() + x.data_offset(), shape, strides};
}

template <class X>
using XtensorElement = std::remove_pointer_t<decltype(std::declval<X&>().data())>;

}  // namespace detail

/// A View of the same elements: [n, m] of an xt::xtensor<float, 2> becomes View<float, dyn, dyn>, an xtensor_fixed keeps static
/// extents, a const container gives const elements. The last axis must be contiguous: slices of rows are, slices of columns and
/// transposes throw Error. Other expressions do not compile: call copy_of.
template <class X>
  requires(xt::is_xexpression<X>::value)
struct Adapt<X> {
  static constexpr bool borrows = !detail::xtensor_owns<X>;
  template <class Y>
  static auto view(Y& x) {
    static_assert(XtensorInMemory<X>, "as_view: this xtensor expression holds no elements in memory; evaluate it with tinyllama::copy_of(expression) first");
    constexpr bool known = detail::xtensor_rank<typename X::shape_type> >= 0;
    static_assert(known || !XtensorInMemory<X>, "as_view: the rank is known at run time only; write as_view<RANK>(x)");
    if constexpr (known && XtensorInMemory<X>)
      return detail::xtensor_view<typename detail::XtensorView<detail::XtensorElement<Y>, typename X::shape_type>::type>(x, true);
  }
};

/// The same for an xarray or another expression whose rank is known at run time only; Error where it is another.
template <std::size_t Rank, XtensorInMemory X>
auto as_view(X&& x) {
  static_assert(std::is_lvalue_reference_v<X> || !detail::xtensor_owns<std::remove_cvref_t<X>>, "as_view: the elements would die with this temporary");
  using Y = std::remove_reference_t<X>;
  return detail::xtensor_view<typename detail::XtensorView<detail::XtensorElement<Y>, std::array<std::size_t, Rank>>::type>(x, true);
}

/// As as_view, for slices of columns and transposes too: the strides are the expression's. map, reduce, softmax, cast take them.
template <std::size_t Rank, XtensorInMemory X>
auto as_strided_view(X&& x) {
  static_assert(std::is_lvalue_reference_v<X> || !detail::xtensor_owns<std::remove_cvref_t<X>>, "as_strided_view: the elements would die with this temporary");
  using Y = std::remove_reference_t<X>;
  return detail::xtensor_view<typename detail::XtensorView<detail::XtensorElement<Y>, std::array<std::size_t, Rank>>::type>(x, false);
}

/// The elements of any xtensor expression, computed once into a container of their own: an xtensor, or an xarray where the rank is
/// known at run time only.  auto c = copy_of(a + b); map(dev, out, f, c);
template <class T = void, class X>
  requires(xt::is_xexpression<std::remove_cvref_t<X>>::value)
auto copy_of(X&& expression) {
  using E = std::remove_cvref_t<X>;
  using Value = std::conditional_t<std::is_void_v<T>, std::remove_cv_t<typename E::value_type>, T>;
  constexpr int rank = detail::xtensor_rank<typename E::shape_type>;
  if constexpr (rank < 0)
    return xt::xarray<Value>(expression);
  else
    return xt::xtensor<Value, static_cast<std::size_t>(rank)>(expression);
}

/// A view, or a tensor, as an xtensor expression over the same elements, to read, assign and save. It must be contiguous.
template <class T, index_t... E>
auto as_xtensor(View<T, E...> v) {
  const auto elements = v.span();
  std::array<std::size_t, sizeof...(E)> shape{};
  for (std::size_t k = 0; k < shape.size(); ++k) shape[k] = static_cast<std::size_t>(v.extent(k));
  return xt::adapt(elements.data(), elements.size(), xt::no_ownership(), shape);
}
template <class Device, class T, index_t... E>
auto as_xtensor(Tensor<Device, T, E...>& t) { return as_xtensor(t.view()); }
template <class Device, class T, index_t... E>
auto as_xtensor(const Tensor<Device, T, E...>& t) { return as_xtensor(t.view()); }

}  // namespace tinyllama
