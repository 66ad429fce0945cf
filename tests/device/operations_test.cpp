// The public form of each operation: static and dynamic shapes, one's own memory, and an Error that names what disagrees.
#include "tinyllama/device/operations.hpp"

#include "tests/kernels/agree.hpp"
#include "tinyllama/device/cpu.hpp"

namespace {
using namespace tinyllama;
using namespace tinyllama::test;

template <class F>
std::string message(F&& f) {
  try {
    f();
  } catch (const Error& e) {
    return e.what();
  }
  return "no error";
}
}  // namespace

TEST_CASE("operations on spans and vectors give what the kernels give") {
  Cpu dev({.threads = 2});
  Random random(1);
  const auto x = random.vector(3 * 64), gain = random.vector(64);
  std::vector<float> out(x.size()), expected(x.size());
  rmsnorm(dev, view<dyn, 64>(out), view<dyn, 64>(x), view<64>(gain), 1e-5f);
  for (index_t t = 0; t < 3; ++t) dev.kernels().rmsnorm(expected.data() + t * 64, x.data() + t * 64, gain.data(), 64, 1e-5f);
  check_same(out, expected);
  std::vector<float> one(64);
  rmsnorm(dev, view<64>(one), View<const float, dyn>(x.data() + 64, {64}), view<dyn>(gain), 1e-5f);
  CHECK(std::memcmp(one.data(), expected.data() + 64, 64 * sizeof(float)) == 0);

  swiglu(dev, view<dyn, 64>(out), view<dyn, 64>(x), view<dyn, 64>(x));
  dev.kernels().swiglu(expected.data(), x.data(), x.data(), 192);
  check_same(out, expected);
  softmax(dev, view<dyn, 64>(out), view<dyn, 64>(x), 2.0f);
  for (index_t t = 0; t < 3; ++t) dev.kernels().softmax(expected.data() + t * 64, x.data() + t * 64, 64, 2.0f);
  check_same(out, expected);
  auto turned = x;
  const auto angle = random.vector(3 * 8);
  rope(dev, view<dyn, 64>(turned), view<dyn, 8>(angle), view<dyn, 8>(angle), RopeLayout::interleaved);
  expected = x;
  for (index_t t = 0; t < 3; ++t) dev.kernels().rope(expected.data() + t * 64, angle.data() + t * 8, angle.data() + t * 8, 4, 16, RopeLayout::interleaved);
  check_same(turned, expected);
}

TEST_CASE("matmul with one's own f32, f16 and bf16 elements") {
  Cpu dev({.threads = 2});
  Random random(2);
  const auto x = random.vector(2 * 33), w = random.vector(5 * 33);
  const auto check = [&]<class T>(T) {
    std::vector<T> own;
    for (const float v : w) own.push_back(T(v));
    std::vector<float> y(10);
    matmul(dev, view<2, 5>(y), view<dyn, 33>(x), view<dyn, 33>(own));
    for (std::size_t i = 0; i < 2; ++i)
      for (std::size_t j = 0; j < 5; ++j) {
        double sum = 0, size = 0;
        for (std::size_t k = 0; k < 33; ++k) {
          const double term = static_cast<double>(static_cast<float>(own[j * 33 + k])) * x[i * 33 + k];
          sum += term, size += std::fabs(term);
        }
        CHECK(std::fabs(y[i * 5 + j] - sum) <= size * (std::is_same_v<T, bf16> ? 1.0 / 256 : sum_bound));
      }
  };
  check(float()), check(f16()), check(bf16());
}

TEST_CASE("an operand of the wrong shape is named, with what was expected and found") {
  Cpu dev({.threads = 1});
  std::vector<float> a(64), b(64), c(64);
  const View<float, dyn, dyn> m48{a.data(), {4, 8}}, m38{b.data(), {3, 8}}, m47{b.data(), {4, 7}}, m88{c.data(), {8, 8}};
  const View<float, dyn> v8{c.data(), {8}}, v7{c.data(), {7}};
  CHECK(message([&] { rmsnorm(dev, m48, m38, v8, 1e-5f); }) == "rmsnorm: rows of x: expected 4, found 3");
  CHECK(message([&] { rmsnorm(dev, m48, m47, v8, 1e-5f); }) == "rmsnorm: columns of x: expected 8, found 7");
  CHECK(message([&] { rmsnorm(dev, m48, m48, v7, 1e-5f); }) == "rmsnorm: gain: expected 8, found 7");
  CHECK(message([&] { rmsnorm(dev, m48, transposed(m88), v8, 1e-5f); }) == "rmsnorm: rows of x: expected 4, found 8");
  CHECK(message([&] { rmsnorm(dev, m88, transposed(m88), v8, 1e-5f); }).find("rmsnorm: x: expected rows of adjacent elements") == 0);
  CHECK(message([&] { swiglu(dev, m48, m48, m47); }) == "swiglu: up: expected 8, found 7");
  CHECK(message([&] { softmax(dev, m48, m38); }) == "softmax: x: expected 4, found 3");
  CHECK(message([&] { rope(dev, m47, View<float, dyn, dyn>(b.data(), {4, 2}), View<float, dyn, dyn>(b.data(), {4, 2}), RopeLayout::half); }) ==
        "rope: x: expected a multiple of 4 columns, found 7");
  CHECK(message([&] { rope(dev, m48, View<float, dyn, dyn>(b.data(), {3, 2}), View<float, dyn, dyn>(b.data(), {3, 2}), RopeLayout::half); }) ==
        "rope: rows of cos: expected 4, found 3");
  CHECK(message([&] { matmul(dev, m48, m38, m88); }) == "matmul: rows of x: expected 4, found 3");
  CHECK(message([&] { matmul(dev, m48, m47, m88); }) == "matmul: columns of x: expected 8, found 7");
  CHECK(message([&] { matmul(dev, m47, m48, m88); }) == "matmul: columns of y: expected 8, found 7");
  CHECK(message([&] { matmul(dev, m48, m48, transposed(m88)); }).find("matmul: w: expected contiguous rows") == 0);
  const std::vector<std::byte> bytes(1000);
  CHECK(message([&] { matmul(dev, m48, m48, Linear(Matrix{Format::q8_0, false, 8, 8, bytes.data()})); }) ==
        "matmul: columns of w, q8_0: expected a multiple of 32, found 8");
  Linear two(Matrix{Format::f32, false, 4, 8, bytes.data()});
  two.part[1] = {Format::f32, false, 4, 9, bytes.data()}, two.parts = 2;
  CHECK(message([&] { matmul(dev, m48, m48, two); }) == "matmul: columns of w: expected 8, found 9");
}
