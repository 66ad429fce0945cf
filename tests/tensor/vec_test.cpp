// Vec: elementary functions against double precision, float overloads against vectors, conversions of 16-bit floats for every pattern.
#include "tinyllama/tensor/vec.hpp"

#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

namespace tl = tinyllama;
using tl::Vec;

namespace {

constexpr float inf = std::numeric_limits<float>::infinity();

// |y - exact| in units of the last place of `exact` as a float.
double ulps(float y, double exact) {
  if (std::isnan(exact)) return std::isnan(y) ? 0.0 : 1e9;
  if (std::isinf(static_cast<float>(exact))) return static_cast<float>(exact) == y ? 0.0 : 1e9;
  if (!std::isfinite(y)) return 1e9;
  int e = -200;
  if (exact != 0.0) std::frexp(exact, &e);
  return std::fabs(y - exact) / std::ldexp(1.0, std::max(e - 24, -149));
}

struct Worst {
  double ulp = 0, absolute = 0;  // where |exact| >= threshold and x in the range; elsewhere
  int overload = 0;              // disagreements of the float overload with the vector
};

// Every `step`-th float pattern through f.
template <class F, class G>
Worst worst(F f, G exact, float low, float high, double threshold = 0.0, std::uint32_t step = 4099) {
  Worst w;
  float x[Vec::lanes], y[Vec::lanes];
  for (std::uint64_t start = 0; start < (std::uint64_t{1} << 32); start += static_cast<std::uint64_t>(step) * Vec::lanes) {
    for (tl::index_t i = 0; i < Vec::lanes; ++i) x[i] = std::bit_cast<float>(static_cast<std::uint32_t>(start + static_cast<std::uint64_t>(i) * step));
    f(Vec::load(x)).store(y);
    for (tl::index_t i = 0; i < Vec::lanes; ++i) {
      const double r = exact(static_cast<double>(x[i]));
      const bool inside = std::isnan(x[i]) || (x[i] >= low && x[i] <= high);
      if (inside && !(std::fabs(r) < threshold))
        w.ulp = std::max(w.ulp, ulps(y[i], r));
      else
        w.absolute = std::max(w.absolute, std::isnan(y[i]) ? 1e9 : std::fabs(y[i] - r));
      const float one = f(x[i]);
      w.overload += !(one == y[i] || (std::isnan(one) && std::isnan(y[i])));
    }
  }
  return w;
}

#define FUNCTION(name) [](auto x) { return tl::name(x); }

}  // namespace

// The bounds are those of the documentation of kernels/cpu/math-inl.h.
TEST_CASE("exp is within 1.1 ulp, from 0 over subnormals to infinity") {
  const Worst w = worst(FUNCTION(exp), [](double x) { return std::exp(x); }, -inf, inf);
  CHECK(w.ulp <= 1.1);
  CHECK(w.overload == 0);
  CHECK(tl::exp(0.0f) == 1.0f);
  CHECK(tl::exp(88.8f) == inf);
  CHECK(tl::exp(-88.0f) > 0.0f);
  CHECK(tl::exp(-104.0f) == 0.0f);
}

TEST_CASE("log is within 1 ulp, of subnormals too, and knows its ends") {
  const Worst w = worst(FUNCTION(log), [](double x) { return std::log(x); }, -inf, inf);
  CHECK(w.ulp <= 1.0);
  CHECK(w.overload == 0);
  CHECK(tl::log(0.0f) == -inf);
  CHECK(tl::log(-0.0f) == -inf);
  CHECK(tl::log(inf) == inf);
  CHECK(tl::log(1.0f) == 0.0f);
  CHECK(std::isnan(tl::log(-1.0f)));
}

TEST_CASE("tanh is within 2.7 ulp everywhere") {
  const Worst w = worst(FUNCTION(tanh), [](double x) { return std::tanh(x); }, -inf, inf);
  CHECK(w.ulp <= 2.7);
  CHECK(w.overload == 0);
  CHECK(tl::tanh(20.0f) == 1.0f);
}

TEST_CASE("sigmoid and silu are within 2.5 and 2.4 ulp where their results are normal, and vanish below") {
  const Worst sigmoid = worst(FUNCTION(sigmoid), [](double x) { return 1.0 / (1.0 + std::exp(-x)); }, -87.0f, inf);
  CHECK(sigmoid.ulp <= 2.5);
  CHECK(sigmoid.absolute <= 1e-38);
  CHECK(sigmoid.overload == 0);
  const Worst silu = worst(FUNCTION(silu), [](double x) { return x == -inf ? 0.0 : x / (1.0 + std::exp(-x)); }, -87.0f, inf);
  CHECK(silu.ulp <= 2.4);
  CHECK(silu.absolute <= 4e-37);
  CHECK(silu.overload == 0);
}

TEST_CASE("gelu follows its tanh form") {
  const auto exact = [](double x) {
    const double z = std::sqrt(8.0 / 3.14159265358979323846) * (x + 0.044715 * x * x * x);
    return x == -inf ? 0.0 : x / (1.0 + std::exp(-z));
  };
  const Worst w = worst(FUNCTION(gelu), exact, -40.0f, inf, 1e-3);
  CHECK(w.ulp <= 14.0);
  CHECK(w.absolute <= 1e-8);
  CHECK(w.overload == 0);
}

TEST_CASE("sqrt, rsqrt, abs, relu, square agree with their float forms") {
  CHECK(worst(FUNCTION(sqrt), [](double x) { return std::sqrt(x); }, -inf, inf).ulp <= 0.5);
  CHECK(worst(FUNCTION(rsqrt), [](double x) { return 1.0 / std::sqrt(x); }, 0.0f, inf).ulp <= 1.5);
  const Worst magnitude = worst(FUNCTION(abs), [](double x) { return std::fabs(x); }, -inf, inf);
  CHECK(magnitude.ulp == 0.0);
  CHECK(magnitude.overload == 0);
  CHECK(tl::relu(-2.0f) == 0.0f);
  CHECK(tl::relu(2.0f) == 2.0f);
  CHECK(tl::square(-3.0f) == 9.0f);
  CHECK(tl::fma(2.0f, 3.0f, 4.0f) == 10.0f);
}

TEST_CASE("operators, comparisons, select, min and max work lane by lane, with floats on either side") {
  float a[Vec::lanes], b[Vec::lanes], y[Vec::lanes];
  for (tl::index_t i = 0; i < Vec::lanes; ++i) a[i] = static_cast<float>(i) - 2.0f, b[i] = 1.5f;
  const Vec u = Vec::load(a), v = Vec::load(b);
  const auto check = [&](Vec r, auto expected) {
    r.store(y);
    for (tl::index_t i = 0; i < Vec::lanes; ++i) CHECK(y[i] == expected(a[i], b[i]));
  };
  check(u + v, [](float p, float q) { return p + q; });
  check(u - v, [](float p, float q) { return p - q; });
  check(u * v, [](float p, float q) { return p * q; });
  check(u / v, [](float p, float q) { return p / q; });
  check(-u, [](float p, float) { return -p; });
  check(2.0f * u, [](float p, float) { return 2.0f * p; });
  check(u - 1.0f, [](float p, float) { return p - 1.0f; });
  check(tl::max(u, v), [](float p, float q) { return p > q ? p : q; });
  check(tl::min(u, 0.0f), [](float p, float) { return p < 0.0f ? p : 0.0f; });
  check(tl::select(u < v, 1.0f, 0.0f), [](float p, float q) { return p < q ? 1.0f : 0.0f; });
  check(tl::select(u <= 0.0f, 1.0f, 0.0f), [](float p, float) { return p <= 0.0f ? 1.0f : 0.0f; });
  check(tl::select(u == 0.0f, 1.0f, 0.0f), [](float p, float) { return p == 0.0f ? 1.0f : 0.0f; });
  check(tl::select(u != 0.0f, 1.0f, 0.0f), [](float p, float) { return p != 0.0f ? 1.0f : 0.0f; });
  check(tl::select((u > -1.0f) & !(u >= 1.0f), u, v), [](float p, float q) { return p > -1.0f && !(p >= 1.0f) ? p : q; });
  check(tl::select((u < -1.0f) | (u > 1.0f), u, v), [](float p, float q) { return p < -1.0f || p > 1.0f ? p : q; });
  Vec w = u;
  w += v, w *= 2.0f, w -= 1.0f, w /= 4.0f;
  check(w, [](float p, float q) { return ((p + q) * 2.0f - 1.0f) / 4.0f; });
  // The second operand stays where either is a NaN.
  const float nan = std::numeric_limits<float>::quiet_NaN();
  check(tl::max(Vec(nan), v), [](float, float q) { return q; });
  tl::max(v, Vec(nan)).store(y);
  CHECK(std::isnan(y[0]));
  check(tl::select(Vec(nan) != Vec(nan), 1.0f, 0.0f), [](float, float) { return 1.0f; });
}

namespace {

// Vector conversions of T against the scalar ones: widening all patterns; narrowing every 1009th float and all ties.
template <class T>
int conversion_errors() {
  int wrong = 0;
  T in[Vec::lanes], out[Vec::lanes];
  float x[Vec::lanes];
  for (std::uint32_t start = 0; start < 65536; start += Vec::lanes) {
    for (tl::index_t i = 0; i < Vec::lanes; ++i) in[i] = T::from_bits(static_cast<std::uint16_t>(start + static_cast<std::uint32_t>(i)));
    tl::vec_detail::load(in).store(x);
    for (tl::index_t i = 0; i < Vec::lanes; ++i) {
      const float expected = in[i];
      wrong += std::isnan(expected) ? !std::isnan(x[i]) : std::bit_cast<std::uint32_t>(x[i]) != std::bit_cast<std::uint32_t>(expected);
    }
  }
  const auto narrow = [&](std::uint64_t start, std::uint32_t step) {
    for (tl::index_t i = 0; i < Vec::lanes; ++i) x[i] = std::bit_cast<float>(static_cast<std::uint32_t>(start + static_cast<std::uint64_t>(i) * step));
    tl::vec_detail::store(Vec::load(x), out);
    for (tl::index_t i = 0; i < Vec::lanes; ++i)
      wrong += std::isnan(x[i]) ? !std::isnan(static_cast<float>(out[i])) : out[i].bits != T(x[i]).bits;
  };
  for (std::uint64_t start = 0; start < (std::uint64_t{1} << 32); start += 1009ull * Vec::lanes) narrow(start, 1009);
  for (std::uint64_t start = 0; start < (std::uint64_t{1} << 32); start += 0x1000ull * Vec::lanes) narrow(start, 0x1000);
  narrow(0x7f800001u, 1), narrow(0x7ffffff0u, 1), narrow(0xffffff00u, 1);
  return wrong;
}

}  // namespace

TEST_CASE("vectors of bf16 convert as scalars do") { CHECK(conversion_errors<tl::bf16>() == 0); }
TEST_CASE("vectors of f16 convert as scalars do") { CHECK(conversion_errors<tl::f16>() == 0); }
