// Softmax against doubles, in all types and layouts.
#include "tinyllama/tensor/softmax.hpp"

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

// Largest error relative to the exact value, over all elements.
template <class T, class U>
double worst(tl::View<const T, dyn, dyn> y, tl::View<const U, dyn, dyn> x, float scale) {
  double error = 0;
  for (index_t i = 0; i < x.extent(0); ++i) {
    double most = -INFINITY, total = 0;
    for (index_t j = 0; j < x.extent(1); ++j) most = std::max(most, double(scale) * static_cast<float>(x(i, j)));
    for (index_t j = 0; j < x.extent(1); ++j) total += std::exp(double(scale) * static_cast<float>(x(i, j)) - most);
    for (index_t j = 0; j < x.extent(1); ++j) {
      const double exact = std::exp(double(scale) * static_cast<float>(x(i, j)) - most) / total;
      error = std::max(error, std::fabs(static_cast<float>(y(i, j)) - exact) / exact);
    }
  }
  return error;
}

// |x| <= 4 and scale 2: the argument of exp is at most 16 and off by two roundings of 16; 4 more roundings beside the sum's.
double tolerance(index_t n) { return (2 * 16 + 4 + 40 + std::log2(n + 1.0)) * 0x1p-24; }

template <class T>
double format_rounding() { return std::is_same_v<T, float> ? 0.0 : std::is_same_v<T, tl::bf16> ? 0x1p-8 : 0x1p-11; }

}  // namespace

TEST_CASE_TEMPLATE("softmax of rows", T, float, tl::bf16) {
  for (int threads : {1, 3}) {
    const Threads dev(threads);
    for (index_t n : tl::test::awkward_sizes()) {
      CAPTURE(n);
      const auto x = tl::test::converted<T>(numbers(3 * n));
      std::vector<T> y(x.size());
      const tl::View<const T, dyn, dyn> in(x.data(), {3, n});
      const tl::View<T, dyn, dyn> out(y.data(), {3, n});
      tl::softmax(dev, out, in, 2.0f);
      CHECK(worst<T, T>(out, in, 2.0f) <= tolerance(n) + format_rounding<T>());
    }
  }
}

TEST_CASE("softmax in place, of slices, of columns through transposed views, of one vector") {
  const Threads dev(2);
  const auto x = numbers(30 * 50);
  const tl::View<const float, dyn, dyn> in(x.data(), {30, 50});
  auto y = x;
  const tl::View<float, dyn, dyn> out(y.data(), {30, 50});
  tl::softmax(dev, out, out, 2.0f);
  CHECK(worst<float, float>(out, in, 2.0f) <= tolerance(50));
  tl::softmax(dev, tl::columns(out, 1, 40), tl::columns(in, 5, 44), 2.0f);
  CHECK(worst<float, float>(tl::columns(out, 1, 40), tl::columns(in, 5, 44), 2.0f) <= tolerance(39));
  tl::softmax(dev, tl::transposed(out), tl::transposed(in), 2.0f);
  CHECK(worst<float, float>(tl::transposed(out), tl::transposed(in), 2.0f) <= tolerance(30));
  std::vector<float> v{1.0f, 1.0f};
  tl::softmax(dev, v, v);
  CHECK(v[0] == 0.5f);
}

TEST_CASE("softmax is at ease with large numbers and with -inf, which masks") {
  const Threads dev(1);
  std::vector<float> x{1e30f, 1e30f, -INFINITY, -1e30f}, y(4);
  tl::softmax(dev, y, x);
  CHECK(y == std::vector<float>{0.5f, 0.5f, 0.0f, 0.0f});
  x.assign(4, -INFINITY);
  tl::softmax(dev, y, x);
  CHECK(std::isnan(y[0]));
  std::vector<float> other(3);
  CHECK_THROWS_AS(tl::softmax(dev, other, x), tl::Error);
}
