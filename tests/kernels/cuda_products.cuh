// What the tests of batched decoding's products on Hopper share: operands on the card, sums in float64, one check of a product and one of a gated product.
#pragma once

#include "tests/kernels/agree.hpp"
#include "tinyllama/cuda.hpp"
#include "tinyllama/kernels/cuda/stream_task.cuh"

namespace tinyllama::test_products {

using test::Random;

/// One with code for the card that it is for.
inline bool usable() {
  if (cuda::card_count() > 0 && cuda::launches_overlap()) return true;
  MESSAGE("skipped: no card of compute capability 9.0, or no code for it");
  return false;
}

template <class T>
std::vector<T> numbers(Random& random, index_t n) {
  std::vector<T> v(static_cast<std::size_t>(n));
  for (T& x : v) x = T(random.normal());
  return v;
}
template <class T>
struct Array {
  Memory<Cuda> memory;
  Array(Cuda& d, const std::vector<T>& v) : memory(d, v.size() * sizeof(T)) { d.upload(memory.data(), v.data(), v.size() * sizeof(T)); }
  T* data() const { return reinterpret_cast<T*>(memory.data()); }
  std::vector<T> host(Cuda& d, std::size_t n) const {
    std::vector<T> v(n);
    d.download(v.data(), memory.data(), n * sizeof(T));
    return v;
  }
};

inline void pack(Cuda& d, std::byte* to, const test::TestMatrix& w) { d.pack(to, {w.format, false, w.n, w.k, w.stored.data(), w.scale.empty() ? nullptr : w.scale.data()}); }

/// W x^T in float64 of weights rounded to bf16 as the kernels round them (not those that have scales of rows), [m, n], and the size of what was added up.
struct Expected {
  std::vector<double> sum, size;
  Expected(const test::TestMatrix& w, const std::vector<bf16>& x, index_t ldx, index_t m) : sum(static_cast<std::size_t>(m * w.n)), size(sum.size()) {
    for (index_t j = 0; j < w.n; ++j) {
      std::vector<float> row = w.row(j);
      if (w.scale.empty())
        for (float& v : row) v = static_cast<float>(bf16(v));
      for (index_t i = 0; i < m; ++i)
        for (index_t a = 0; a < w.k; ++a) {
          const double p = static_cast<double>(row[static_cast<std::size_t>(a)]) * static_cast<float>(x[static_cast<std::size_t>(i * ldx + a)]);
          sum[static_cast<std::size_t>(i * w.n + j)] += p, size[static_cast<std::size_t>(i * w.n + j)] += std::fabs(p);
        }
    }
  }
};

/// Where a weight lies close between two bf16 the kernel's f32 arithmetic may round it to the other one; q4_0 has rounded scales.
inline double rounding_of_weights(Format f) { return f == Format::bf16 || f == Format::f8_e4m3 ? 4 * test::eps : f == Format::q4_0 ? 0x1p-7 : 0x1p-9; }

/// run(StreamTask) multiplies, or says that it does not.
template <class Y, class Run>
void check_product(Cuda& d, Run&& run, const test::TestMatrix& w, index_t most_m, index_t m, bool adds, std::vector<Y>* bits = nullptr) {
  CAPTURE(m);
  CAPTURE(w.n);
  CAPTURE(w.k);
  Random random(7);
  const index_t ldx = w.k + 8, ldy = w.n + 6;
  const auto x = numbers<bf16>(random, most_m * ldx);
  const auto add = numbers<Y>(random, most_m * ldy);
  const Memory<Cuda> packed(d, Cuda::packed_bytes(w.format, w.n, w.k));
  pack(d, packed.data(), w);
  const Array<bf16> xs(d, x);
  const Array<Y> adds_to(d, add), y(d, std::vector<Y>(static_cast<std::size_t>(m * ldy), Y(std::numeric_limits<float>::quiet_NaN())));
  REQUIRE(run(cuda::StreamTask{w.format, packed.data(), nullptr, w.n, w.k, xs.data(), ldx, m, y.data(), ldy, std::is_same_v<Y, float>, adds ? adds_to.data() : nullptr}));
  const auto got = y.host(d, static_cast<std::size_t>(m * ldy));
  if (bits) *bits = got;
  const Expected e(w, x, ldx, m);
  const double slack = rounding_of_weights(w.format), last = std::is_same_v<Y, float> ? test::eps : 0x1p-8;
  std::vector<float> g, want;
  std::vector<double> bound;
  for (index_t i = 0; i < m; ++i)
    for (index_t j = 0; j < w.n; ++j) {
      const auto at = static_cast<std::size_t>(i * w.n + j);
      const double a = adds ? static_cast<double>(static_cast<float>(add[static_cast<std::size_t>(i * ldy + j)])) : 0.0;
      g.push_back(static_cast<float>(got[static_cast<std::size_t>(i * ldy + j)])), want.push_back(static_cast<float>(e.sum[at] + a));
      bound.push_back(slack * e.size[at] + last * std::fabs(e.sum[at] + a) + 1e-6);
    }
  test::check_close(g, want, [&](index_t i) { return bound[static_cast<std::size_t>(i)]; });
  for (index_t i = 0; i < m; ++i)
    for (index_t j = w.n; j < ldy; ++j)
      if (!std::isnan(static_cast<float>(got[static_cast<std::size_t>(i * ldy + j)]))) {
        CHECK_MESSAGE(false, "written between the rows");
        return;
      }
}

/// silu(x gate^T) (x up^T) of n rows each.
template <class Run>
void check_gated(Cuda& d, Run&& run, Format f, index_t n, index_t k, std::initializer_list<index_t> all_m, Random& random) {
  const index_t ldy = n + 8;
  test::TestMatrix gate(f, n, k, random, 0.05f), up(f, n, k, random, 0.05f);
  gate.with_scales(random), up.with_scales(random);
  const std::size_t one = Cuda::packed_bytes(f, n, k);
  const Memory<Cuda> packed(d, 2 * one);
  pack(d, packed.data(), gate), pack(d, packed.data() + one, up);
  for (const index_t m : all_m) {
    CAPTURE(m);
    CAPTURE(n);
    const auto x = numbers<bf16>(random, m * k);
    const Array<bf16> xs(d, x), y(d, std::vector<bf16>(static_cast<std::size_t>(m * ldy), bf16(std::numeric_limits<float>::quiet_NaN())));
    REQUIRE(run(cuda::StreamTask{f, packed.data(), packed.data() + one, n, k, xs.data(), k, m, y.data(), ldy, false, nullptr}));
    const auto got = y.host(d, static_cast<std::size_t>(m * ldy));
    const Expected g(gate, x, k, m), u(up, x, k, m);
    std::vector<float> values, want;
    std::vector<double> bound;
    for (index_t i = 0; i < m; ++i)
      for (index_t j = 0; j < n; ++j) {
        const auto at = static_cast<std::size_t>(i * n + j);
        const double a = g.sum[at], b = u.sum[at], y0 = a / (1 + std::exp(-a)) * b, slack = rounding_of_weights(f);
        values.push_back(static_cast<float>(got[static_cast<std::size_t>(i * ldy + j)])), want.push_back(static_cast<float>(y0));
        bound.push_back(0x1p-7 * std::fabs(y0) + slack * (1.2 * g.size[at] * std::fabs(b) + u.size[at] * (std::fabs(a) + 0.3)) + 1e-6);
      }
    test::check_close(values, want, [&](index_t i) { return bound[static_cast<std::size_t>(i)]; });
  }
}

}  // namespace tinyllama::test_products
