// xtensor containers in and out without a copy, and what has to be copied.
#include <doctest/doctest.h>

#if __has_include(<xtensor/xtensor.hpp>) || __has_include(<xtensor/containers/xtensor.hpp>)

#include "tinyllama/tensor/xtensor.hpp"

#if __has_include(<xtensor/views/xstrided_view.hpp>)
#include <xtensor/views/xstrided_view.hpp>
#else
#include <xtensor/xstrided_view.hpp>
#endif

#include "tests/tensor/threads.hpp"
#include "tinyllama/tensor/map.hpp"
#include "tinyllama/tensor/reduce.hpp"

namespace tl = tinyllama;
using tl::dyn;
using tl::test::Threads;

namespace {
using Matrix = xt::xtensor<float, 2>;
Matrix counting() { return xt::arange<float>(15).reshape({3, 5}); }
using Lazy = decltype(std::declval<Matrix&>() + std::declval<Matrix&>());
static_assert(tl::XtensorInMemory<Matrix> && tl::XtensorInMemory<xt::xarray<float>> && !tl::XtensorInMemory<Lazy>);
}  // namespace

TEST_CASE("as_view points at the container's own elements") {
  Matrix a = counting();
  const auto v = tl::as_view(a);
  static_assert(std::is_same_v<decltype(v), const tl::View<float, dyn, dyn>>);
  CHECK(v.data() == a.data());
  CHECK(v(2, 3) == 13.0f);
  v(2, 3) = -1.0f;
  CHECK(a(2, 3) == -1.0f);

  const Matrix& constant = a;
  static_assert(std::is_same_v<decltype(tl::as_view(constant)), tl::View<const float, dyn, dyn>>);
  CHECK(tl::as_view(constant).data() == a.data());

  xt::xtensor_fixed<float, xt::xshape<2, 3>> fixed;
  static_assert(std::is_same_v<decltype(tl::as_view(fixed)), tl::View<float, 2, 3>>);
  CHECK(tl::as_view(fixed).data() == fixed.data());

  xt::xarray<float> array = counting();
  CHECK(tl::as_view<2>(array).data() == array.data());
  CHECK_THROWS_WITH_AS(tl::as_view<3>(array), "as_view: rank: expected 3, found 2", tl::Error);

  std::vector<float> mine(15);
  auto adapted = xt::adapt(mine, std::array<std::size_t, 2>{3, 5});
  CHECK(tl::as_view(adapted).data() == mine.data());
}

TEST_CASE("slices of rows are views, with an offset and a stride, and so are temporaries of them") {
  Matrix a = counting();
  const auto row = tl::as_view(xt::view(a, 1, xt::all()));
  static_assert(decltype(row)::rank == 1);
  CHECK(row.data() == &a(1, 0));
  const auto some = tl::as_view(xt::view(a, xt::range(1, 3), xt::range(1, 4)));
  CHECK(some.data() == &a(1, 1));
  CHECK(some.extent(1) == 3);
  CHECK(some(1, 2) == a(2, 3));
  const auto single = tl::as_view(xt::view(a, xt::range(1, 2), xt::all()));  // xtensor's stride of the axis of one is 0
  CHECK(single.contiguous());
  Matrix column = xt::ones<float>({3, 1});
  CHECK(tl::as_view(column).strides() == std::array<tl::index_t, 2>{1, 1});
}

TEST_CASE("slices of columns and transposes need a copy, or strides") {
  Matrix a = counting();
  CHECK_THROWS_AS(tl::as_view(xt::view(a, xt::all(), 1)), tl::Error);
  CHECK_THROWS_AS(tl::as_view<2>(xt::transpose(a)), tl::Error);
  const auto t = tl::as_strided_view<2>(xt::transpose(a));
  CHECK(t.data() == a.data());
  CHECK(t(4, 1) == a(1, 4));
  const auto copy = tl::copy_of(xt::transpose(a));
  CHECK(tl::as_view<2>(copy)(4, 1) == a(1, 4));
  const auto column = tl::copy_of(xt::view(a, xt::all(), 1));
  CHECK(tl::as_view(column)(2) == 11.0f);
}

TEST_CASE("copy_of evaluates an expression once, in its own type or another") {
  const Matrix a = counting();
  const auto sum = tl::copy_of(a + a);
  static_assert(std::is_same_v<decltype(sum), const Matrix>);
  CHECK(tl::as_view(sum)(2, 4) == 28.0f);
  static_assert(std::is_same_v<decltype(tl::copy_of<float>(xt::cast<double>(a) * 2.0)), Matrix>);
}

TEST_CASE("containers are operands of map and of reductions") {
  const Threads dev(2);
  const Matrix a = counting();
  Matrix y = xt::zeros<float>({3, 5});
  tl::map(dev, y, [](auto p, auto q) { return p * q; }, a, a);
  CHECK(y(2, 4) == 196.0f);
  tl::map(dev, xt::view(y, 0, xt::all()), [](auto p) { return -p; }, xt::view(a, 1, xt::all()));
  CHECK(y(0, 4) == -9.0f);
  xt::xtensor<float, 1> s = xt::zeros<float>({3});
  tl::sum(dev, s, a, 1);
  CHECK(s == xt::xtensor<float, 1>{10.0f, 35.0f, 60.0f});
}

TEST_CASE("as_xtensor is an expression over the view's own elements") {
  const Threads dev(1);
  tl::Tensor<Threads, float, 2, dyn> t(dev, 3);
  auto x = tl::as_xtensor(t);
  x = xt::arange<float>(6).reshape({2, 3});
  CHECK(x.data() == t.data());
  CHECK(t(1, 2) == 5.0f);
  CHECK(tl::as_view(x).data() == t.data());  // and back
  const auto& constant = t;
  CHECK(xt::sum(tl::as_xtensor(constant))() == 15.0f);
  CHECK_THROWS_AS(tl::as_xtensor(tl::columns(tl::View<float, dyn, dyn>(t), 0, 2)), tl::Error);
}

#endif
