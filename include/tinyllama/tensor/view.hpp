// View<T, extents...>: elements that someone else owns, with a shape of which each extent is static or `dyn`.
#pragma once

#include <array>
#include <cstddef>
#include <span>
#include <string>
#include <type_traits>

#include "tinyllama/tensor/dtype.hpp"

namespace tinyllama {

/// An extent that is known at run time only.
inline constexpr index_t dyn = -1;

namespace detail {
inline std::string shape_text(std::span<const index_t> shape) {
  std::string s = "[";
  for (std::size_t i = 0; i < shape.size(); ++i) s.append(i ? ", " : "").append(std::to_string(shape[i]));
  return s + "]";
}
}  // namespace detail

/// A non-owning, strided view. The last axis is usually contiguous (`stride(rank-1) == 1`); kernels ask for that and say so.
/// Strides are in elements; 0 broadcasts. A view of const elements is made from one of mutable elements implicitly.
template <class T, index_t... E>
class View {
 public:
  using element_type = T;
  using value_type = std::remove_cv_t<T>;
  static constexpr std::size_t rank = sizeof...(E);
  static constexpr std::array<index_t, rank> static_extents{E...};

  constexpr View() requires(((E != dyn) && ...) || rank == 0) = default;

  /// Contiguous, row-major elements at `data` in `shape`; a static extent that disagrees throws Error.
  constexpr View(T* data, std::array<index_t, rank> shape) : data_(data), shape_(shape) {
    check();
    index_t stride = 1;
    for (std::size_t i = rank; i-- > 0; stride *= shape_[i]) strides_[i] = stride;
  }
  constexpr View(T* data, std::array<index_t, rank> shape, std::array<index_t, rank> strides) : data_(data), shape_(shape), strides_(strides) { check(); }

  /// All extents static.
  constexpr explicit View(T* data) requires((E != dyn) && ...) : View(data, {E...}) {}

  /// From a view of the same rank: const is added, static extents are forgotten or (checked) asserted.
  template <class U, index_t... F>
    requires(sizeof...(F) == rank && std::is_convertible_v<U (*)[], T (*)[]> && ((E == F || E == dyn || F == dyn) && ...))
  constexpr View(const View<U, F...>& v) : data_(v.data()), shape_(v.shape()), strides_(v.strides()) { check(); }

  constexpr T* data() const { return data_; }
  constexpr const std::array<index_t, rank>& shape() const { return shape_; }
  constexpr const std::array<index_t, rank>& strides() const { return strides_; }
  constexpr index_t extent(std::size_t i) const { return shape_[i]; }
  constexpr index_t stride(std::size_t i) const { return strides_[i]; }
  constexpr index_t size() const {
    index_t n = 1;
    for (index_t e : shape_) n *= e;
    return n;
  }
  /// True when the elements lie row-major without gaps.
  constexpr bool contiguous() const {
    index_t expected = 1;
    for (std::size_t i = rank; i-- > 0; expected *= shape_[i])
      if (shape_[i] != 1 && strides_[i] != expected) return false;
    return true;
  }

  template <class... I>
    requires(sizeof...(I) == rank)
  constexpr T& operator()(I... i) const {
    index_t offset = 0;
    std::size_t axis = 0;
    ((offset += static_cast<index_t>(i) * strides_[axis++]), ...);
    return data_[offset];
  }

  /// All elements as a span; the view must be contiguous.
  constexpr std::span<T> span() const {
    if (!contiguous()) throw Error("View::span", "", "contiguous elements", "strides " + detail::shape_text(strides_));
    return {data_, static_cast<std::size_t>(size())};
  }

 private:
  constexpr void check() const {
    for (std::size_t i = 0; i < rank; ++i)
      if (shape_[i] < 0 || (static_extents[i] != dyn && static_extents[i] != shape_[i]))
        throw Error("View", "shape", detail::shape_text(static_extents) + " (-1 is free)", detail::shape_text(shape_));
  }
  T* data_ = nullptr;
  std::array<index_t, rank> shape_{E...};
  std::array<index_t, rank> strides_{};
};

/// `view<dyn, 2048>(span)`: the one dynamic extent, if any, follows from the number of elements. Works for any contiguous container.
template <index_t... E, class Container>
  requires requires(Container& c) { c.data(); c.size(); }
constexpr auto view(Container&& c) {
  using T = std::remove_pointer_t<decltype(c.data())>;
  static_assert(((E == dyn) + ... + 0) <= 1, "view: at most one extent can follow from the size; give View the others");
  constexpr index_t known = ((E == dyn ? 1 : E) * ... * 1);
  const auto n = static_cast<index_t>(c.size());
  const index_t free = known ? n / known : 0;
  View<T, E...> v(c.data(), {(E == dyn ? free : E)...});
  if (v.size() != n) throw Error("view", "size", "a multiple of " + std::to_string(known), std::to_string(n));
  return v;
}

/// Rows [first, last) of the leading axis.
template <class T, index_t E0, index_t... E>
constexpr View<T, dyn, E...> slice(View<T, E0, E...> v, index_t first, index_t last) {
  if (first < 0 || first > last || last > v.extent(0))
    throw Error("slice", "rows", "0 <= first <= last <= " + std::to_string(v.extent(0)), std::to_string(first) + ".." + std::to_string(last));
  auto shape = v.shape();
  shape[0] = last - first;
  return {v.data() + first * v.stride(0), shape, v.strides()};
}

/// Element `i` of the leading axis: a view of one rank less.
template <class T, index_t E0, index_t... E>
constexpr View<T, E...> row(View<T, E0, E...> v, index_t i) {
  if (i < 0 || i >= v.extent(0)) throw Error("row", "index", "0 <= i < " + std::to_string(v.extent(0)), std::to_string(i));
  std::array<index_t, sizeof...(E)> shape{}, strides{};
  for (std::size_t k = 0; k < sizeof...(E); ++k) shape[k] = v.extent(k + 1), strides[k] = v.stride(k + 1);
  return {v.data() + i * v.stride(0), shape, strides};
}

/// Columns [first, last) of the last axis of a matrix.
template <class T, index_t E0, index_t E1>
constexpr View<T, E0, dyn> columns(View<T, E0, E1> v, index_t first, index_t last) {
  if (first < 0 || first > last || last > v.extent(1))
    throw Error("columns", "range", "0 <= first <= last <= " + std::to_string(v.extent(1)), std::to_string(first) + ".." + std::to_string(last));
  return {v.data() + first * v.stride(1), {v.extent(0), last - first}, v.strides()};
}

/// A vector seen as the matrix that repeats it `rows` times: no copy, stride 0.
template <class T, index_t E>
constexpr View<T, dyn, E> broadcast_rows(View<T, E> v, index_t rows) {
  return {v.data(), {rows, v.extent(0)}, {0, v.stride(0)}};
}

/// A vector seen as a column repeated `columns` times.
template <class T, index_t E>
constexpr View<T, E, dyn> broadcast_columns(View<T, E> v, index_t columns) {
  return {v.data(), {v.extent(0), columns}, {v.stride(0), 0}};
}

/// The transposed matrix, as a view: no element moves.
template <class T, index_t E0, index_t E1>
constexpr View<T, E1, E0> transposed(View<T, E0, E1> v) {
  return {v.data(), {v.extent(1), v.extent(0)}, {v.stride(1), v.stride(0)}};
}

/// The same contiguous elements in another shape.
template <index_t... E, class T, index_t... F>
constexpr View<T, E...> reshape(View<T, F...> v, std::array<index_t, sizeof...(E)> shape) {
  View<T, E...> r(v.span().data(), shape);
  if (r.size() != v.size()) throw Error("reshape", "elements", std::to_string(v.size()), std::to_string(r.size()));
  return r;
}

}  // namespace tinyllama
