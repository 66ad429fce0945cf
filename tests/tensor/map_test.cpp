// map, cast and fill: sizes around the lanes, all element types, strides and broadcasts, threads, errors.
#include "tinyllama/tensor/map.hpp"

#include <doctest/doctest.h>

#include "tests/tensor/threads.hpp"

namespace tl = tinyllama;
using tl::dyn;
using tl::index_t;
using tl::test::converted;
using tl::test::numbers;

namespace {

template <class T>
bool equal(const std::vector<T>& a, const std::vector<T>& b) { return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0); }

// silu(a) * b in the types T <- (U, float), against the float overloads element by element.
template <class T, class U>
void check_types() {
  for (index_t n : tl::test::awkward_sizes()) {
    CAPTURE(n);
    const auto a = converted<U>(numbers(n, 1));
    const auto b = numbers(n, 2);
    std::vector<T> expected;
    for (std::size_t i = 0; i < a.size(); ++i) expected.push_back(T(tl::silu(static_cast<float>(a[i])) * b[i]));
    for (int threads : {1, 3}) {
      const tl::test::Threads dev(threads);
      std::vector<T> y(a.size() + 1, T(7.0f));
      tl::map(dev, tl::View<T, dyn>(y.data(), {n}), [](auto p, auto q) { return tl::silu(p) * q; }, a, b);
      CHECK(static_cast<float>(y.back()) == 7.0f);  // nothing beyond the end
      y.pop_back();
      CHECK(equal(y, expected));
    }
  }
}

}  // namespace

TEST_CASE_TEMPLATE("map gives the float overload's bits for every size and type", T, float, tl::bf16, tl::f16) {
  check_types<T, float>();
  check_types<T, tl::bf16>();
  check_types<float, T>();
}

TEST_CASE("map takes from none to eight inputs") {
  const tl::test::Threads dev(2);
  const auto x = numbers(37);
  std::vector<float> y(37);
  tl::map(dev, y, [] { return tl::Vec(3.0f); });
  CHECK(y[36] == 3.0f);
  tl::map(dev, y, [](auto a, auto b, auto c, auto d, auto e, auto f, auto g, auto h) { return (a + b) + (c + d) + ((e + f) + (g + h)); }, x, x, x, x, x, x, x, x);
  for (std::size_t i = 0; i < x.size(); ++i) CHECK(y[i] == 8.0f * x[i]);
}

TEST_CASE("map works in place") {
  const tl::test::Threads dev(3);
  auto x = numbers(30011);
  const auto before = x;
  tl::map(dev, x, [](auto v) { return v * 2.0f; }, x);
  for (std::size_t i = 0; i < x.size(); ++i) REQUIRE(x[i] == 2.0f * before[i]);
}

TEST_CASE("map over slices, broadcasts and transposes, reading and writing") {
  constexpr index_t rows = 13, width = 45;
  const auto a = numbers(rows * width, 3), bias = numbers(width, 4), scale = numbers(rows, 5);
  for (int threads : {1, 3}) {
    const tl::test::Threads dev(threads);
    const tl::View<const float, dyn, dyn> m(a.data(), {rows, width});
    std::vector<float> y(static_cast<std::size_t>(rows * width), -1.0f);
    const tl::View<float, dyn, dyn> out(y.data(), {rows, width});
    const auto b = tl::broadcast_rows(tl::view<dyn>(bias), rows);
    const auto s = tl::broadcast_columns(tl::view<dyn>(scale), width);

    tl::map(dev, out, [](auto x, auto p, auto q) { return (x + p) * q; }, m, b, s);
    for (index_t i = 0; i < rows; ++i)
      for (index_t j = 0; j < width; ++j) REQUIRE(out(i, j) == (m(i, j) + bias[static_cast<std::size_t>(j)]) * scale[static_cast<std::size_t>(i)]);

    // Columns 5..22 of the output from columns 20..37 of the input; the rest stays.
    tl::fill(dev, out, -1.0f);
    tl::map(dev, tl::columns(out, 5, 22), [](auto x) { return -x; }, tl::columns(m, 20, 37));
    for (index_t i = 0; i < rows; ++i)
      for (index_t j = 0; j < width; ++j) REQUIRE(out(i, j) == (j >= 5 && j < 22 ? -m(i, j + 15) : -1.0f));

    // Through the transposed view, on either side.
    std::vector<float> z(y.size());
    tl::map(dev, tl::View<float, dyn, dyn>(z.data(), {width, rows}), [](auto x) { return x + 1.0f; }, tl::transposed(m));
    tl::map(dev, tl::transposed(tl::View<float, dyn, dyn>(z.data(), {width, rows})), [](auto x, auto v) { return v - x; }, m,
            tl::transposed(tl::View<const float, dyn, dyn>(z.data(), {width, rows})));
    for (index_t i = 0; i < rows; ++i)
      for (index_t j = 0; j < width; ++j) REQUIRE(z[static_cast<std::size_t>(j * rows + i)] == (m(i, j) + 1.0f) - m(i, j));
  }
}

TEST_CASE("map over long runs with a stride, which several tasks share, and into a slice from contiguous elements") {
  const auto a = numbers(3 * 30000);
  const tl::View<const float, dyn, dyn> m(a.data(), {30000, 3});
  for (int threads : {1, 3}) {
    const tl::test::Threads dev(threads);
    std::vector<float> y(a.size(), -1.0f);
    const tl::View<float, dyn, dyn> out(y.data(), {30000, 3});
    tl::map(dev, tl::columns(out, 1, 2), [](auto x) { return x; }, tl::columns(m, 2, 3));
    tl::map(dev, tl::columns(out, 0, 1), [](auto x) { return x; }, tl::View<const float, dyn, 1>(a.data(), {30000, 1}));
    int wrong = 0;
    for (index_t i = 0; i < 30000; ++i) wrong += out(i, 1) != m(i, 2) || out(i, 0) != a[static_cast<std::size_t>(i)] || out(i, 2) != -1.0f;
    CHECK(wrong == 0);
    tl::map(dev, tl::columns(out, 0, 2), [](auto x) { return x; }, tl::View<const float, dyn, 2>(a.data(), {30000, 2}));
    wrong = 0;
    for (index_t i = 0; i < 30000; ++i) wrong += out(i, 1) != a[static_cast<std::size_t>(2 * i + 1)] || out(i, 2) != -1.0f;
    CHECK(wrong == 0);
  }
}

TEST_CASE("map over three axes of which some merge") {
  const tl::test::Threads dev(2);
  const auto a = numbers(4 * 5 * 6);
  std::vector<float> y(a.size());
  const tl::View<const float, 4, 5, 6> v(a.data());
  // Axes swapped: [5, 4, 6] seen through strides.
  const tl::View<const float, 5, 4, 6> swapped(a.data(), {5, 4, 6}, {6, 30, 1});
  const tl::View<float, 5, 4, 6> out(y.data());
  tl::map(dev, out, [](auto x) { return x; }, swapped);
  for (index_t i = 0; i < 4; ++i)
    for (index_t j = 0; j < 5; ++j)
      for (index_t k = 0; k < 6; ++k) REQUIRE(out(j, i, k) == v(i, j, k));
  float scalar = 0.0f;
  tl::map(dev, tl::View<float>(&scalar, {}), [](auto x) { return x * 3.0f; }, tl::View<const float>(a.data(), {}));
  CHECK(scalar == a[0] * 3.0f);
}

TEST_CASE("map names the operand whose shape differs, and refuses to write into a broadcast") {
  const tl::test::Threads dev(1);
  std::vector<float> x(6), y(7);
  CHECK_THROWS_WITH_AS(tl::map(dev, x, [](auto a, auto b) { return a + b; }, x, y), "map: input 1: expected shape [6] of the output, found [7]", tl::Error);
  CHECK_THROWS_AS(tl::map(dev, tl::broadcast_rows(tl::view<dyn>(x), 3), [](auto a) { return a; }, tl::broadcast_rows(tl::view<dyn>(x), 3)), tl::Error);
}

TEST_CASE("cast rounds to nearest even, between all pairs of types") {
  const tl::test::Threads dev(3);
  const auto x = numbers(40007);
  std::vector<tl::bf16> b(x.size());
  std::vector<tl::f16> h(x.size());
  std::vector<float> f(x.size());
  tl::cast(dev, b, x);
  tl::cast(dev, h, b);
  tl::cast(dev, f, h);
  for (std::size_t i = 0; i < x.size(); ++i) {
    REQUIRE(b[i].bits == tl::bf16(x[i]).bits);
    REQUIRE(h[i].bits == tl::f16(static_cast<float>(tl::bf16(x[i]))).bits);
    REQUIRE(f[i] == static_cast<float>(h[i]));
  }
}

TEST_CASE("a lambda of one function runs over floats and over vectors alike") {
  const auto swish = [](auto x) { return x * tl::sigmoid(x); };
  const tl::test::Threads dev(1);
  const auto x = numbers(100);
  std::vector<float> y(100);
  tl::map(dev, y, swish, x);
  for (std::size_t i = 0; i < 100; ++i) CHECK(y[i] == swish(x[i]));
}
