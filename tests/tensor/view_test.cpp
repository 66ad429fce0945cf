// View: shapes, strides, slices, broadcasts; and the errors of each.
#include "tinyllama/tensor/view.hpp"

#include <doctest/doctest.h>

#include <numeric>
#include <vector>

namespace tl = tinyllama;
using tl::dyn;
using tl::index_t;

TEST_CASE("a view of a container: the dynamic extent follows from the size") {
  std::vector<float> x(12);
  std::iota(x.begin(), x.end(), 0.0f);
  const auto v = tl::view<dyn, 4>(x);
  static_assert(std::is_same_v<decltype(v), const tl::View<float, dyn, 4>>);
  CHECK(v.extent(0) == 3);
  CHECK(v.size() == 12);
  CHECK(v(2, 1) == 9.0f);
  CHECK(v.contiguous());
  CHECK(v.span().data() == x.data());
  CHECK_THROWS_AS((tl::view<dyn, 5>(x)), tl::Error);
  CHECK_THROWS_AS((tl::view<11>(x)), tl::Error);
  const std::vector<float>& constant = x;
  static_assert(std::is_same_v<decltype(tl::view<dyn>(constant)), tl::View<const float, dyn>>);
  const tl::View<const float, dyn, dyn> general = v;  // const is added, static extents are forgotten
  CHECK(general.extent(1) == 4);
  const tl::View<float, 3, 4> fixed = v;
  CHECK(fixed.data() == x.data());
  CHECK_THROWS_AS((tl::View<float, 2, 4>(v)), tl::Error);
  static_assert(!std::is_convertible_v<tl::View<const float, dyn>, tl::View<float, dyn>>);
  static_assert(!std::is_convertible_v<tl::View<float, 3>, tl::View<float, 4>>);
}

TEST_CASE("slices, rows, columns, broadcasts and transposes move no element") {
  std::vector<float> x(20);
  std::iota(x.begin(), x.end(), 0.0f);
  const auto m = tl::view<dyn, 5>(x);  // [4, 5]
  const auto middle = tl::slice(m, 1, 3);
  CHECK(middle.extent(0) == 2);
  CHECK(middle(0, 0) == 5.0f);
  CHECK(middle.contiguous());
  CHECK(tl::row(m, 3)(2) == 17.0f);
  const auto c = tl::columns(m, 2, 4);
  CHECK(c(1, 1) == 8.0f);
  CHECK_FALSE(c.contiguous());
  CHECK_THROWS_AS(c.span(), tl::Error);
  const auto t = tl::transposed(m);
  CHECK(t(4, 1) == 9.0f);
  CHECK_FALSE(t.contiguous());
  const auto rows = tl::broadcast_rows(tl::row(m, 1), 7);
  CHECK(rows(6, 4) == 9.0f);
  const auto cols = tl::broadcast_columns(tl::view<dyn>(x), 3);
  CHECK(cols(6, 2) == 6.0f);
  const auto r = tl::reshape<2, 10>(m, {2, 10});
  CHECK(r(1, 0) == 10.0f);
}

TEST_CASE("what lies outside of a view is an Error") {
  std::vector<float> x(20);
  const auto m = tl::view<dyn, 5>(x);
  CHECK_THROWS_AS(tl::slice(m, -1, 2), tl::Error);
  CHECK_THROWS_AS(tl::slice(m, 3, 2), tl::Error);
  CHECK_THROWS_AS(tl::slice(m, 0, 5), tl::Error);
  CHECK_THROWS_AS(tl::row(m, 4), tl::Error);
  CHECK_THROWS_AS(tl::columns(m, 0, 6), tl::Error);
  CHECK_THROWS_AS((tl::reshape<dyn>(m, {19})), tl::Error);
  CHECK_THROWS_AS((tl::View<float, dyn>(x.data(), {-1})), tl::Error);
}

TEST_CASE("empty views and views of one row are contiguous whatever their strides") {
  std::vector<float> x(5);
  CHECK(tl::View<float, dyn, dyn>(x.data(), {1, 5}, {99, 1}).contiguous());
  CHECK(tl::view<dyn, 5>(std::span<float>(x.data(), 0)).size() == 0);
}
