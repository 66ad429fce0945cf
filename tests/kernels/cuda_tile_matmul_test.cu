// Products of many rows on a card with their ends, against sums in float64: awkward sizes, several tiles a block, each width of tile, rows that a norm scales.
#include "tinyllama/kernels/cuda/gated_matmul.cuh"
#include "tinyllama/kernels/cuda/sum_matmul.cuh"

#include "tests/kernels/cuda_products.cuh"

namespace {

using namespace tinyllama;
using namespace tinyllama::test_products;

constexpr float eps = 1e-5f;
/// Of the size of their terms: tensor cores cut sums off, at each 16 of k.
constexpr double sums_of(index_t k) { return test::eps * std::max(4.0, static_cast<double>(k) / 256); }

struct Checks {
  std::vector<float> values, want;
  std::vector<double> bound;
  void expect(double v, double expected, double b) { values.push_back(static_cast<float>(v)), want.push_back(static_cast<float>(expected)), bound.push_back(b); }
  ~Checks() {
    test::check_close(values, want, [&](index_t i) { return bound[static_cast<std::size_t>(i)]; });
  }
};

std::size_t at(index_t i) { return static_cast<std::size_t>(i); }
const bf16* plain(const Memory<Cuda>& m) { return reinterpret_cast<const bf16*>(m.data()); }
index_t packed_ld(index_t k) { return cuda::packed_row_bytes(Format::bf16, k) / 2; }

/// Sums of squares of m rows as `parts` of each, and the factors they stand for, of a norm over n.
struct Squares {
  std::vector<float> parts;
  std::vector<double> scale;
  Squares(Random& random, index_t m, int count, index_t n) {
    for (index_t i = 0; i < m; ++i) {
      double all = 0;
      for (int p = 0; p < count; ++p) parts.push_back(std::fabs(static_cast<float>(random.normal())) + 0.1f), all += parts.back();
      scale.push_back(1 / std::sqrt(all / static_cast<double>(n) + eps));
    }
  }
};

}  // namespace

TEST_CASE("cuda: sum_matmul adds the residual and does half of a norm") {
  if (!usable()) return;
  Cuda d;
  Random random(1);
  const auto check = [&](index_t m, index_t n, index_t k, int columns, bool norms, bool in_place) {
    CAPTURE(m);
    CAPTURE(n);
    CAPTURE(k);
    CAPTURE(columns);
    const index_t ldx = k + 8, ldy = n + 4, ldn = n + 8;
    const test::TestMatrix w(Format::bf16, n, k, random, 0.05f);
    const Memory<Cuda> packed(d, Cuda::packed_bytes(w.format, n, k));
    pack(d, packed.data(), w);
    const auto x = numbers<bf16>(random, m * ldx);
    const auto residual = numbers<float>(random, m * ldy), gain = numbers<float>(random, n);
    const int parts = cuda::sum_parts(m, n, d.multiprocessors(), columns);
    const Array<bf16> xs(d, x), normed(d, std::vector<bf16>(at(m * ldn)));
    const Array<float> residuals(d, residual), gains(d, gain), y(d, std::vector<float>(at(m * ldy), std::numeric_limits<float>::quiet_NaN())), squares(d, std::vector<float>(at(m * parts), -1.0f));
    float* const to = in_place ? residuals.data() : y.data();
    REQUIRE(cuda::sum_matmul(d.stream(), {xs.data(), plain(packed), ldx, packed_ld(k), residuals.data(), to, ldy, static_cast<int>(m), static_cast<int>(n), static_cast<int>(k),
                                          norms ? gains.data() : nullptr, normed.data(), ldn, squares.data(), true}, d.multiprocessors(), columns));
    const auto sums = (in_place ? residuals : y).host(d, at(m * ldy)), pieces = squares.host(d, at(m * parts));
    const auto halves = normed.host(d, at(m * ldn));
    const Expected e(w, x, ldx, m);
    Checks checks;
    for (index_t i = 0; i < m; ++i) {
      double all = 0, found = 0;
      for (index_t j = 0; j < n; ++j) {
        const float got = sums[at(i * ldy + j)];
        checks.expect(got, e.sum[at(i * n + j)] + residual[at(i * ldy + j)], sums_of(k) * (e.size[at(i * n + j)] + std::fabs(residual[at(i * ldy + j)])) + 1e-6);
        if (norms && halves[at(i * ldn + j)].bits != bf16(got * gain[at(j)]).bits) CHECK_MESSAGE(false, "gain y");
        all += static_cast<double>(got) * got;
      }
      for (index_t j = n; j < ldy && !in_place; ++j) CHECK(std::isnan(sums[at(i * ldy + j)]));
      for (int p = 0; p < parts; ++p) found += pieces[at(i * parts + p)];
      if (norms) checks.expect(found, all, 1e-5 * all);
      else CHECK(pieces[at(i * parts)] == -1.0f);
    }
  };
  for (const int columns : {64, 128, 192, 256}) {
    check(1, 8, 8, columns, true, false);
    check(130, 264, 72, columns, true, true);
    check(300, 520, 136, columns, true, false);
    check(257, 312, 2056, columns, false, false);
  }
  check(3000, 1544, 64, 64, true, false);     // several tiles a block
  check(2700, 2056, 72, 128, true, false);
  check(3400, 2312, 72, 256, true, true);
}

TEST_CASE("cuda: gated_matmul scales rows") {
  if (!usable()) return;
  Cuda d;
  Random random(2);
  const auto check = [&](index_t m, index_t n, index_t k, bool keeps, int parts, int columns) {
    CAPTURE(m);
    CAPTURE(n);
    CAPTURE(k);
    const test::TestMatrix gate(Format::bf16, n, k, random, 0.05f), up(Format::bf16, n, k, random, 0.05f);
    const Memory<Cuda> g(d, Cuda::packed_bytes(gate.format, n, k)), u(d, Cuda::packed_bytes(up.format, n, k));
    pack(d, g.data(), gate), pack(d, u.data(), up);
    const auto x = numbers<bf16>(random, m * k);
    const Squares s(random, m, std::max(parts, 1), 30);
    const Array<float> squares(d, s.parts);
    const Array<bf16> xs(d, x), out(d, std::vector<bf16>(at(m * n))), kept(d, std::vector<bf16>(at(m * 2 * n)));
    cuda::GatedTask t{xs.data(), plain(g), plain(u), k, packed_ld(k), out.data(), n, static_cast<int>(m), static_cast<int>(n), static_cast<int>(k), keeps ? kept.data() : nullptr, 2 * n};
    if (parts) t.scale = {squares.data(), parts, 1.0f / 30, eps};
    t.early = true;
    REQUIRE(cuda::gated_matmul(d.stream(), t, d.multiprocessors(), columns));
    const auto got = out.host(d, at(m * n)), both = kept.host(d, at(m * 2 * n));
    const Expected eg(gate, x, k, m), eu(up, x, k, m);
    Checks checks;
    for (index_t i = 0; i < m; ++i)
      for (index_t j = 0; j < n; ++j) {
        const double f = parts ? s.scale[at(i)] : 1, slack = 8 * test::eps * f;
        double a = eg.sum[at(i * n + j)] * f, b = eu.sum[at(i * n + j)] * f;
        const double of_a = slack * eg.size[at(i * n + j)] + 1e-6, of_b = slack * eu.size[at(i * n + j)] + 1e-6;
        if (keeps) {
          const float ka = static_cast<float>(both[at(i * 2 * n + j)]), kb = static_cast<float>(both[at(i * 2 * n + n + j)]);
          checks.expect(ka, a, of_a + 0x1p-8 * std::fabs(a)), checks.expect(kb, b, of_b + 0x1p-8 * std::fabs(b));
          a = ka, b = kb;
        }
        const double y = a / (1 + std::exp(-a)) * b;
        checks.expect(static_cast<float>(got[at(i * n + j)]), y, 0x1p-7 * std::fabs(y) + 1.2 * of_a * std::fabs(b) + of_b * (std::fabs(a) + 0.3));
      }
  };
  check(700, 120, 72, true, 0, 0), check(700, 120, 72, true, 8, 0), check(2049, 1416, 72, false, 0, 0);
  for (const int columns : {176, 256}) check(513, 264, 200, false, 4, columns), check(3000, 600, 72, false, 12, columns);
}

TEST_CASE("cuda: products of many rows leave to others what they do not take") {
  if (!usable()) return;
  Cuda d;
  const Memory<Cuda> some(d, 1 << 20);
  auto* const x = reinterpret_cast<bf16*>(some.data());
  auto* const y = reinterpret_cast<float*>(some.data() + (1 << 19));
  const auto sum = [&](auto change) {
    cuda::SumTask t{x, x, 64, 64, y, y, 64, 16, 64, 64, y, x, 64, y};
    change(t);
    return cuda::sum_matmul(d.stream(), t, d.multiprocessors());
  };
  CHECK_FALSE(sum([](auto& t) { t.n = 60; }));
  CHECK_FALSE(sum([](auto& t) { t.k = 60; }));
  CHECK_FALSE(sum([](auto& t) { t.ldy = 62; }));
  CHECK_FALSE(sum([](auto& t) { t.y += 1; }));
  CHECK_FALSE(sum([](auto& t) { t.ld_normed = 60; }));
  d.synchronize();
}
