// cluster_gemm on a card against sums in float64: awkward m, n and k, rows apart, sums added to, gate and up at once, every shape of tile and cluster, the same
// bits for any batch.
#include "tinyllama/kernels/cuda/cluster_gemm.cuh"

#include "tests/kernels/cuda_products.cuh"

namespace {

using namespace tinyllama;
using namespace tinyllama::test_products;

struct Runs {
  Cuda& device;
  cuda::cluster::Choice as{};
  bool operator()(const cuda::StreamTask& t) const { return cuda::cluster_gemm(device.stream(), t, as); }
};
template <class Y>
void check(Cuda& d, const Runs& run, const test::TestMatrix& w, index_t m, bool adds, std::vector<Y>* bits = nullptr) {
  check_product<Y>(d, run, w, cuda::cluster::most_m, m, adds, bits);
}

}  // namespace

TEST_CASE("cuda: cluster_gemm at awkward sizes") {
  if (!usable()) return;
  Cuda d;
  Random random(1);
  const Runs run{d};
  const test::TestMatrix narrow(Format::bf16, 8, 520, random), wide(Format::bf16, 264, 2056, random), tall(Format::bf16, 3000, 704, random);
  for (const index_t m : {1, 8, 15, 17, 63, 64, 65, 113, 128}) check<float>(d, run, narrow, m, true);
  check<bf16>(d, run, wide, 16, false), check<float>(d, run, wide, 100, false), check<bf16>(d, run, wide, 127, true), check<float>(d, run, wide, 3, true);
  check<bf16>(d, run, tall, 31, false), check<float>(d, run, tall, 90, true);
}

TEST_CASE("cuda: cluster_gemm in each shape of tile and cluster, several tiles a cluster") {
  if (!usable()) return;
  Cuda d;
  Random random(2);
  const test::TestMatrix w(Format::bf16, 6000, 520, random);
  for (const int n : cuda::cluster::tile_rows)
    for (const int size : cuda::cluster::sizes) {
      CAPTURE(n);
      CAPTURE(size);
      check<bf16>(d, {d, {n, size}}, w, 20, false);
      check<float>(d, {d, {n, size}}, w, 66, true);
    }
}

TEST_CASE("cuda: cluster_gemm gives a row the same bits in any batch") {
  if (!usable()) return;
  Cuda d;
  Random random(3);
  const Runs run{d};
  const test::TestMatrix w(Format::bf16, 656, 2048, random);
  std::vector<float> one, some;
  check<float>(d, run, w, 1, false, &one);
  for (const index_t m : {2, 40, 100, 128}) {
    check<float>(d, run, w, m, false, &some);
    some.resize(one.size() - 6), one.resize(some.size());
    test::check_same(some, one);
    one.resize(one.size() + 6);
  }
}

TEST_CASE("cuda: cluster_gemm of gate and up") {
  if (!usable()) return;
  Cuda d;
  Random random(4);
  for (const index_t n : {48, 728}) check_gated(d, Runs{d}, Format::bf16, n, 1288, {12, 70, 128}, random);
}

// y = x W^T + residual, then a product with rmsnorm(y), plain and gated: no kernel for the norm between.
TEST_CASE("cuda: cluster_gemm does a norm in halves") {
  if (!usable()) return;
  Cuda d;
  Random random(5);
  constexpr index_t n = 2056, k = 520, after = 264, ld = n + 8;
  constexpr float eps = 1e-5f;
  const test::TestMatrix w(Format::bf16, n, k, random, 0.05f), reader(Format::bf16, after, n, random, 0.05f);
  const Memory<Cuda> packed(d, Cuda::packed_bytes(w.format, n, k)), packed_reader(d, 2 * Cuda::packed_bytes(w.format, after, n)), squares(d, cuda::SplitNorm::most_rows * cuda::SplitNorm::most_parts * sizeof(float));
  const std::size_t one = Cuda::packed_bytes(w.format, after, n);
  pack(d, packed.data(), w), pack(d, packed_reader.data(), reader), pack(d, packed_reader.data() + one, reader);
  const auto gain = numbers<float>(random, n);
  const Array<float> gains(d, gain);
  for (const index_t m : {2, 16, 33, 100, 128}) {
    CAPTURE(m);
    const auto x = numbers<bf16>(random, m * k);
    const auto residual = numbers<float>(random, m * ld);
    const Array<bf16> xs(d, x), normed(d, std::vector<bf16>(static_cast<std::size_t>(m * ld))), gated(d, std::vector<bf16>(static_cast<std::size_t>(m * after)));
    const Array<float> residuals(d, residual), y(d, std::vector<float>(static_cast<std::size_t>(m * ld))), out(d, std::vector<float>(static_cast<std::size_t>(m * after)));
    cuda::SplitNorm norm{reinterpret_cast<float*>(squares.data()), normed.data(), ld, n, gains.data(), eps};
    REQUIRE(cuda::cluster_gemm(d.stream(), {Format::bf16, packed.data(), nullptr, n, k, xs.data(), k, m, y.data(), ld, true, residuals.data(), nullptr, &norm}));
    REQUIRE(cuda::cluster_gemm(d.stream(), {Format::bf16, packed_reader.data(), nullptr, after, n, normed.data(), ld, m, out.data(), after, true, nullptr, &norm}));
    REQUIRE(cuda::cluster_gemm(d.stream(), {Format::bf16, packed_reader.data(), packed_reader.data() + one, after, n, normed.data(), ld, m, gated.data(), after, false, nullptr, &norm}));
    const auto sums = y.host(d, static_cast<std::size_t>(m * ld));
    const auto halves = normed.host(d, sums.size());
    const auto got = out.host(d, static_cast<std::size_t>(m * after));
    const auto got_gated = gated.host(d, got.size());
    const Expected e(w, x, k, m), read(reader, halves, ld, m);
    std::vector<float> values, want;
    std::vector<double> bound;
    const auto expect = [&](double v, double expected, double b) { values.push_back(static_cast<float>(v)), want.push_back(static_cast<float>(expected)), bound.push_back(b); };
    for (index_t i = 0; i < m; ++i) {
      double all = 0;
      for (index_t j = 0; j < n; ++j) {
        const auto at = static_cast<std::size_t>(i * n + j), to = static_cast<std::size_t>(i * ld + j);
        const double sum = e.sum[at] + residual[to];
        expect(sums[to], sum, 4 * test::eps * (e.size[at] + std::fabs(residual[to])) + 1e-6);
        CHECK(halves[to].bits == bf16(sums[to] * gain[static_cast<std::size_t>(j)]).bits);
        all += static_cast<double>(sums[to]) * sums[to];
      }
      const double scale = 1 / std::sqrt(all / n + eps);
      for (index_t j = 0; j < after; ++j) {
        const auto at = static_cast<std::size_t>(i * after + j);
        const double v = read.sum[at] * scale, slack = 16 * test::eps * read.size[at] * scale + 1e-6, silu = v / (1 + std::exp(-v));
        expect(got[at], v, slack);
        expect(static_cast<float>(got_gated[at]), silu * v, 0x1p-7 * std::fabs(silu * v) + 3 * slack * (std::fabs(v) + 1));
      }
    }
    test::check_close(values, want, [&](index_t i) { return bound[static_cast<std::size_t>(i)]; });
  }
}

TEST_CASE("cuda: cluster_gemm leaves to others what it does not take") {
  if (!usable()) return;
  Cuda d;
  const Memory<Cuda> some(d, 1 << 20);
  auto* x = reinterpret_cast<bf16*>(some.data());
  const cuda::StreamTask good{Format::bf16, some.data(), nullptr, 64, 256, x, 256, 16, some.data() + (1 << 19), 64, true, nullptr};
  const auto refused = [&](auto change) {
    cuda::StreamTask t = good;
    change(t);
    return !cuda::cluster_gemm(d.stream(), t);
  };
  CHECK(refused([](auto& t) { t.n = 60; }));
  CHECK(refused([](auto& t) { t.k = 252, t.ldx = 252; }));
  CHECK(refused([](auto& t) { t.k = 64; }));  // a cluster has two blocks, and each a column of 64
  CHECK(refused([](auto& t) { t.m = 129; }));
  CHECK(refused([](auto& t) { t.ldx = 260; }));
  CHECK(refused([](auto& t) { t.x += 1; }));
  CHECK(refused([](auto& t) { t.ldy = 65; }));
  CHECK(refused([](auto& t) { t.format = Format::f16; }));
  CHECK(refused([](auto& t) { t.up = t.w + 10; }));
  cuda::SplitNorm norm{nullptr, x, 64, 64, reinterpret_cast<const float*>(some.data()), 1e-5f};
  CHECK(refused([&](auto& t) { t.norm = &norm, t.float_out = false; }));
  CHECK(refused([&](auto& t) { t.norm = &norm, t.n = 1 << 16; }));  // more tiles than clusters at a time
  norm.ld = 63;
  CHECK(refused([&](auto& t) { t.norm = &norm; }));
  d.synchronize();
}
