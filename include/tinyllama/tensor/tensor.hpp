// Tensor<Device, T, extents...>: a View that owns its elements, in the memory of one device.
#pragma once

#include <array>
#include <cstddef>
#include <cstring>
#include <limits>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "tinyllama/tensor/view.hpp"

namespace tinyllama {

namespace detail {

/// Bytes of a shape, or an Error where an extent is negative or the product overflows.
template <class T>
constexpr std::size_t checked_bytes(std::span<const index_t> shape) {
  constexpr auto most = static_cast<std::size_t>(std::numeric_limits<index_t>::max());
  std::size_t bytes = sizeof(T);
  for (index_t e : shape) {
    if (e < 0) throw Error("Tensor", "shape", "no negative extent", shape_text(shape));
    if (e == 0) return 0;
  }
  for (index_t e : shape) {
    if (bytes > most / static_cast<std::size_t>(e)) throw Error("Tensor", "shape", "bytes that fit in 63 bits", shape_text(shape));
    bytes *= static_cast<std::size_t>(e);
  }
  return bytes;
}

/// The shape of static extents E with the dynamic ones filled in from left to right.
template <index_t... E, class... I>
constexpr std::array<index_t, sizeof...(E)> fill_extents(I... dynamic) {
  static_assert(sizeof...(I) == ((E == dyn ? std::size_t{1} : 0u) + ... + std::size_t{0}),
                "give one number for each dynamic extent, and none for the static ones");
  static_assert((std::is_integral_v<I> && ...), "extents are integers");
  const std::array<index_t, sizeof...(I) + 1> given{static_cast<index_t>(dynamic)..., 0};
  std::array<index_t, sizeof...(E)> shape{E...};
  std::size_t next = 0;
  for (index_t& e : shape)
    if (e == dyn) e = given[next++];
  return shape;
}

}  // namespace detail

/// Contiguous, row-major elements in memory that `Device` allocates (64-byte aligned). The elements start out uninitialised.
/// Refers to its device, which must outlive it. Moves; copies only by clone().
///   Tensor<Cpu, float, dyn, 5632> h(dev, rows);   // [rows, 5632]
template <class Device, class T, index_t... E>
class Tensor {
  static_assert(std::is_trivially_copyable_v<T> && !std::is_const_v<T>, "Tensor holds plain, mutable elements");
  static_assert(((E >= 0 || E == dyn) && ...), "an extent is a size or dyn");

 public:
  using element_type = T;
  using value_type = T;
  static constexpr std::size_t rank = sizeof...(E);

  /// One number for each dynamic extent, from left to right.
  template <class... I>
    requires(std::is_integral_v<I> && ...)
  explicit Tensor(const Device& device, I... dynamic) : Tensor(device, detail::fill_extents<E...>(dynamic...)) {}

  Tensor(const Device& device, std::array<index_t, rank> shape) : device_(&device), view_(allocate(device, shape), shape) {}

  Tensor(Tensor&& other) noexcept : device_(other.device_), view_(std::exchange(other.view_, empty())) {}
  Tensor& operator=(Tensor&& other) noexcept {
    std::swap(device_, other.device_);
    std::swap(view_, other.view_);
    return *this;
  }
  ~Tensor() {
    if (view_.data()) device_->deallocate(reinterpret_cast<std::byte*>(view_.data()));
  }

  /// A copy with memory of its own, on the same device.
  Tensor clone() const {
    Tensor r(*device_, shape());
    const std::size_t n = detail::checked_bytes<T>(shape());
    if constexpr (requires { device_->copy_bytes(r.data(), data(), n); })  // a device whose memory the host cannot touch
      device_->copy_bytes(r.data(), data(), n);
    else if (n)
      std::memcpy(r.data(), data(), n);
    return r;
  }

  View<T, E...> view() { return view_; }
  View<const T, E...> view() const { return view_; }
  /// To any view that view() converts to: of const elements, of forgotten extents.
  template <class U, index_t... F>
    requires std::is_constructible_v<View<U, F...>, View<T, E...>>
  operator View<U, F...>() { return view_; }
  template <class U, index_t... F>
    requires std::is_constructible_v<View<U, F...>, View<const T, E...>>
  operator View<U, F...>() const { return view(); }

  const Device& device() const { return *device_; }
  T* data() { return view_.data(); }
  const T* data() const { return view_.data(); }
  const std::array<index_t, rank>& shape() const { return view_.shape(); }
  index_t extent(std::size_t i) const { return view_.extent(i); }
  index_t size() const { return view_.size(); }
  std::span<T> span() { return view_.span(); }
  std::span<const T> span() const { return {data(), static_cast<std::size_t>(size())}; }

  template <class... I>
  T& operator()(I... i) { return view_(i...); }
  template <class... I>
  const T& operator()(I... i) const { return view_(i...); }

 private:
  // A moved-from tensor of static shape would need elements that it no longer has: it keeps its shape and a null pointer.
  static View<T, E...> empty() { return {nullptr, {(E == dyn ? 0 : E)...}}; }
  static T* allocate(const Device& device, const std::array<index_t, rank>& shape) {
    const std::array<index_t, rank> fixed{E...};
    for (std::size_t i = 0; i < rank; ++i)
      if (fixed[i] != dyn && fixed[i] != shape[i]) throw Error("Tensor", "shape", detail::shape_text(fixed) + " (-1 is free)", detail::shape_text(shape));
    return reinterpret_cast<T*>(device.allocate(detail::checked_bytes<T>(shape)));
  }
  const Device* device_;
  View<T, E...> view_;
};

/// Specialise it to let the operations take another container as an operand: `static View<...> view(X& x)`, no copy, and
/// `borrows`, true where X itself owns no elements. tensor/xtensor.hpp does so.
template <class X>
struct Adapt;

template <class T, std::size_t N>
struct Adapt<std::span<T, N>> {
  static constexpr bool borrows = true;
  static View<T, N == std::dynamic_extent ? dyn : static_cast<index_t>(N)> view(std::span<T, N> s) { return {s.data(), {static_cast<index_t>(s.size())}}; }
};

template <class T, class Allocator>
struct Adapt<std::vector<T, Allocator>> {
  static constexpr bool borrows = false;
  static View<T, dyn> view(std::vector<T, Allocator>& v) { return {v.data(), {static_cast<index_t>(v.size())}}; }
  static View<const T, dyn> view(const std::vector<T, Allocator>& v) { return {v.data(), {static_cast<index_t>(v.size())}}; }
};

/// What the operations of the tensor layer take as operands: views, and what turns into one without a copy.
template <class T, index_t... E>
constexpr View<T, E...> as_view(View<T, E...> v) { return v; }
template <class Device, class T, index_t... E>
View<T, E...> as_view(Tensor<Device, T, E...>& t) { return t.view(); }
template <class Device, class T, index_t... E>
View<const T, E...> as_view(const Tensor<Device, T, E...>& t) { return t.view(); }
template <class X>
  requires requires(X& x) { Adapt<std::remove_const_t<X>>::view(x); }
auto as_view(X& x) { return Adapt<std::remove_const_t<X>>::view(x); }
/// A temporary will do where it only refers to elements that live elsewhere.
template <class X>
  requires(!std::is_lvalue_reference_v<X> && Adapt<std::remove_const_t<X>>::borrows)
auto as_view(X&& x) { return Adapt<std::remove_const_t<X>>::view(x); }

}  // namespace tinyllama
