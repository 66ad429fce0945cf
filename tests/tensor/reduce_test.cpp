// Reductions: every axis, awkward sizes, all types, the same bits for any number of threads, errors within the promised bound.
#include "tinyllama/tensor/reduce.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "tests/tensor/threads.hpp"

namespace tl = tinyllama;
using tl::dyn;
using tl::index_t;
using tl::test::numbers;
using tl::test::Threads;

namespace {

struct Sums {
  double sum = 0, magnitude = 0, square = 0, high = -INFINITY, low = INFINITY;
  index_t at = 0, n = 0;
  void add(double x) {
    if (x > high) high = x, at = n;
    low = std::min(low, x);
    sum += x, magnitude += std::fabs(x), square += x * x, ++n;
  }
};

// All reductions of `in` along `axis` against doubles.
template <class T>
void check(const Threads& dev, tl::View<const T, dyn, dyn> in, int axis) {
  const index_t outputs = in.extent(axis == 0 ? 1 : 0), count = in.extent(axis == 0 ? 0 : 1);
  std::vector<Sums> expected(static_cast<std::size_t>(outputs));
  for (index_t o = 0; o < outputs; ++o)
    for (index_t k = 0; k < count; ++k) expected[static_cast<std::size_t>(o)].add(static_cast<float>(axis == 0 ? in(k, o) : in(o, k)));
  std::vector<float> y(static_cast<std::size_t>(outputs));
  const double rounding = (std::log2(static_cast<double>(count) + 1) + 40) * 0x1p-24;
  const auto all = [&](auto&& holds) {
    int wrong = 0;
    for (std::size_t o = 0; o < y.size(); ++o) wrong += !holds(y[o], expected[o]);
    return wrong == 0;
  };
  tl::sum(dev, y, in, axis);
  CHECK(all([&](float v, const Sums& e) { return std::fabs(v - e.sum) <= rounding * e.magnitude; }));
  tl::sum_of_squares(dev, y, in, axis);
  CHECK(all([&](float v, const Sums& e) { return std::fabs(v - e.square) <= rounding * e.square; }));
  tl::max(dev, y, in, axis);
  CHECK(all([&](float v, const Sums& e) { return v == e.high; }));
  tl::min(dev, y, in, axis);
  CHECK(all([&](float v, const Sums& e) { return v == e.low; }));
  if (count == 0) return;
  tl::mean(dev, y, in, axis - 2);  // negative: from the last axis
  CHECK(all([&](float v, const Sums& e) { return std::fabs(v - e.sum / static_cast<double>(count)) <= 1.01 * rounding * e.magnitude / static_cast<double>(count); }));
  std::vector<std::int32_t> at(y.size());
  tl::argmax(dev, at, in, axis);
  int wrong = 0;
  for (std::size_t o = 0; o < at.size(); ++o) wrong += at[o] != expected[o].at;
  CHECK(wrong == 0);
}

}  // namespace

TEST_CASE_TEMPLATE("sum, mean, max, min, argmax along both axes", T, float, tl::bf16, tl::f16) {
  const Threads dev(2);
  for (index_t n : tl::test::awkward_sizes())
    for (index_t rows : {index_t{1}, index_t{3}}) {
      CAPTURE(n);
      const auto x = tl::test::converted<T>(numbers(n * rows));
      check<T>(dev, tl::View<const T, dyn, dyn>(x.data(), {rows, n}), 1);
      check<T>(dev, tl::View<const T, dyn, dyn>(x.data(), {rows, n}), 0);
      check<T>(dev, tl::View<const T, dyn, dyn>(x.data(), {n, rows}), 1);
      check<T>(dev, tl::View<const T, dyn, dyn>(x.data(), {n, rows}), 0);
    }
}

TEST_CASE("down columns wider than a band, rows beyond a block") {
  const Threads dev(2);
  const auto x = numbers(75 * 2600);
  const tl::View<const float, dyn, dyn> m(x.data(), {75, 2600});
  for (const index_t rows : {1, 7, 8, 9, 33, 75}) {
    CAPTURE(rows);
    check<float>(dev, tl::columns(tl::slice(m, 0, rows), 1, 2590), 0);
    check<float>(dev, tl::columns(tl::slice(m, 0, rows), 0, 1024), 0);
  }
}

TEST_CASE("reductions of slices, broadcasts and transposes") {
  const Threads dev(2);
  const auto x = numbers(40 * 70);
  const tl::View<const float, dyn, dyn> m(x.data(), {40, 70});
  for (int axis : {0, 1}) {
    check<float>(dev, tl::columns(m, 3, 50), axis);
    check<float>(dev, tl::transposed(m), axis);
    check<float>(dev, tl::broadcast_rows(tl::row(m, 2), 33), axis);
    check<float>(dev, tl::broadcast_columns(tl::View<const float, dyn>(x.data(), {19}), 90), axis);
  }
}

TEST_CASE("the middle axis of three, and the only axis of one") {
  const Threads dev(3);
  const auto x = numbers(5 * 6 * 37);
  const tl::View<const float, 5, 6, 37> v(x.data());
  std::vector<float> y(5 * 37);
  tl::sum(dev, tl::View<float, 5, 37>(y.data()), v, 1);
  for (index_t i = 0; i < 5; ++i)
    for (index_t k = 0; k < 37; ++k) {
      double s = 0;
      for (index_t j = 0; j < 6; ++j) s += v(i, j, k);
      CHECK(std::fabs(y[static_cast<std::size_t>(i * 37 + k)] - s) < 6 * 24 * 0x1p-24);
    }
  float all = 0;
  tl::max(dev, tl::View<float>(&all, {}), tl::View<const float, dyn>(x.data(), {1110}), 0);
  CHECK(all == *std::max_element(x.begin(), x.end()));
}

TEST_CASE("one thread and three give the same bits") {
  const Threads one(1), three(3);
  for (auto [rows, width] : {std::pair<index_t, index_t>{3, 50021}, {50021, 3}, {301, 299}, {1, 200000}}) {
    const auto x = numbers(rows * width);
    const tl::View<const float, dyn, dyn> m(x.data(), {rows, width});
    for (int axis : {0, 1}) {
      std::vector<float> a(static_cast<std::size_t>(m.extent(axis == 0 ? 1 : 0))), b(a.size());
      tl::sum(one, a, m, axis);
      tl::sum(three, b, m, axis);
      CHECK(std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
    }
  }
}

TEST_CASE("a million tenths: the error stays that of a tree, not of a running sum") {
  const Threads dev(2);
  const std::vector<float> x(1000000, 0.1f);
  std::vector<float> y(1);
  tl::sum(dev, y, tl::View<const float, 1, dyn>(x.data(), {1, 1000000}), 1);
  CHECK(std::fabs(y[0] - 100000.0f * (1.0 + 1.5e-8)) < 100000.0 * 1e-6);  // a running f32 sum is off by 9e-3
  tl::sum(dev, y, tl::View<const float, dyn, 1>(x.data(), {1000000, 1}), 0);
  CHECK(std::fabs(y[0] - 100000.0f * (1.0 + 1.5e-8)) < 100000.0 * 1e-6);
}

TEST_CASE("a reduction of one's own") {
  const Threads dev(1);
  const std::vector<float> x{1, 2, 3, 4, 0.5f};
  std::vector<float> y(1);
  tl::reduce(dev, y, tl::View<const float, 1, 5>(x.data()), 1, 1.0f, [](auto a, auto b) { return a * b; });
  CHECK(y[0] == 12.0f);
}

TEST_CASE("NaNs are ignored by max, min and argmax, and not by sum, and ties go to the first") {
  const Threads dev(1);
  constexpr float nan = std::numeric_limits<float>::quiet_NaN();
  for (index_t n : {2, 20, 200}) {
    std::vector<float> x(static_cast<std::size_t>(n), -5.0f);
    x[0] = nan;
    x[static_cast<std::size_t>(n / 2)] = 3.0f;
    x.back() = 3.0f;
    std::vector<float> y(1);
    std::vector<int> at(1);
    const tl::View<const float, 1, dyn> v(x.data(), {1, n});
    tl::max(dev, y, v, 1);
    CHECK(y[0] == 3.0f);
    tl::min(dev, y, v, 1);
    CHECK(y[0] == (n == 2 ? 3.0f : -5.0f));
    tl::argmax(dev, at, v, 1);
    CHECK(at[0] == n / 2);
    tl::sum(dev, y, v, 1);
    CHECK(std::isnan(y[0]));
  }
  const std::vector<float> none(7, nan);
  std::vector<int> at(1, 9);
  tl::argmax(dev, at, tl::View<const float, 1, 7>(none.data()), 1);
  CHECK(at[0] == 0);
}

TEST_CASE("wrong axes and shapes are Errors") {
  const Threads dev(1);
  std::vector<float> x(12), y(3);
  const tl::View<const float, dyn, dyn> m(x.data(), {3, 4});
  CHECK_THROWS_AS(tl::sum(dev, y, m, 2), tl::Error);
  CHECK_THROWS_AS(tl::sum(dev, y, m, -3), tl::Error);
  CHECK_THROWS_WITH_AS(tl::sum(dev, y, m, 0), "sum: output: expected shape [4], found [3]", tl::Error);
  std::vector<int> at(3);
  CHECK_THROWS_AS(tl::argmax(dev, at, tl::View<const float, dyn, dyn>(x.data(), {3, 0}), 1), tl::Error);
}
