// stream_gemm on a card against sums in float64: every format, awkward m, n and k, rows apart, sums added to, gate and up at once, the same bits for any batch.
#include "tinyllama/kernels/cuda/stream_gemm.cuh"

#include "tests/kernels/cuda_products.cuh"

namespace {

using namespace tinyllama;
using namespace tinyllama::test_products;

struct Card {
  Cuda device;
  Memory<Cuda> partial, flags;
  Card() : partial(device, cuda::stream::partial_bytes(device.multiprocessors())), flags(device, cuda::stream::flags_bytes(device.multiprocessors())) {
    device.zero(flags.data(), flags.bytes());
  }
  bool run(const cuda::StreamTask& t) { return cuda::stream_gemm(device.stream(), t, device.multiprocessors(), reinterpret_cast<float*>(partial.data()), reinterpret_cast<unsigned*>(flags.data())); }
  template <class Y>
  void check(const test::TestMatrix& w, index_t m, bool adds, std::vector<Y>* bits = nullptr) {
    check_product<Y>(device, [&](const cuda::StreamTask& t) { return run(t); }, w, cuda::stream::most_m, m, adds, bits);
  }
};

}  // namespace

TEST_CASE("cuda: stream_gemm in each format") {
  if (!usable()) return;
  Card card;
  Random random(1);
  for (const FormatInfo& f : formats) {
    if (!cuda::stream::takes(f.format)) continue;
    CAPTURE(std::string(f.name));
    test::TestMatrix narrow(f.format, 48, 256, random), wide(f.format, 272, 2304, random), tall(f.format, 1168, 768, random);
    narrow.with_scales(random), wide.with_scales(random), tall.with_scales(random);
    for (const index_t m : {1, 9, 33, 65, 130, 256}) card.check<float>(narrow, m, true);
    card.check<bf16>(wide, 16, false), card.check<float>(wide, 100, false), card.check<bf16>(wide, 200, true);
    card.check<bf16>(tall, 31, false);
  }
}

TEST_CASE("cuda: stream_gemm gives a row the same bits in any batch") {
  if (!usable()) return;
  Card card;
  Random random(2);
  for (const Format f : {Format::f8_e4m3, Format::q4_0}) {
    const test::TestMatrix w(f, 656, 2048, random);
    std::vector<float> one, some;
    card.check<float>(w, 1, false, &one);
    for (const index_t m : {2, 40, 100, 250}) {
      card.check<float>(w, m, false, &some);
      some.resize(one.size() - 6), one.resize(some.size());
      test::check_same(some, one);
      one.resize(one.size() + 6);
    }
  }
}

TEST_CASE("cuda: stream_gemm of gate and up") {
  if (!usable()) return;
  Card card;
  Random random(3);
  for (const Format f : {Format::f8_e4m3, Format::q8_0, Format::q6_K})
    for (const index_t n : {48, 720}) check_gated(card.device, [&](const cuda::StreamTask& t) { return card.run(t); }, f, n, 1280, {12, 70, 129}, random);
}

TEST_CASE("cuda: stream_gemm leaves to others what it does not take") {
  if (!usable()) return;
  Card card;
  const Memory<Cuda> some(card.device, 1 << 20);
  const auto* w = some.data();
  auto* x = reinterpret_cast<bf16*>(some.data());
  const cuda::StreamTask good{Format::q4_0, w, nullptr, 64, 256, x, 256, 16, some.data() + (1 << 19), 64, true, nullptr};
  const auto refused = [&](auto change) {
    cuda::StreamTask t = good;
    change(t);
    return !card.run(t);
  };
  CHECK(refused([](auto& t) { t.n = 60; }));
  CHECK(refused([](auto& t) { t.k = 160, t.ldx = 160; }));
  CHECK(refused([](auto& t) { t.m = 257; }));
  CHECK(refused([](auto& t) { t.ldx = 260; }));
  CHECK(refused([](auto& t) { t.x += 1; }));
  CHECK(refused([](auto& t) { t.ldy = 65; }));
  CHECK(refused([](auto& t) { t.format = Format::f32; }));
  CHECK(refused([](auto& t) { t.format = Format::bf16; }));
  CHECK(refused([](auto& t) { t.up = t.w + 10; }));
  card.device.synchronize();
}
