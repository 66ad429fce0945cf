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
  d.synchronize();
}
