// stream_gemm on a card against sums in float64: every format, awkward m, n and k, rows apart, sums added to, gate and up at once, the same bits for any batch.
#include "tinyllama/kernels/cuda/stream_gemm.cuh"

#include "tests/kernels/agree.hpp"
#include "tinyllama/cuda.hpp"

namespace {

using namespace tinyllama;
using test::Random;

struct Card {
  Cuda device;
  Memory<Cuda> partial, flags;
  Card() : partial(device, cuda::stream::partial_bytes(device.multiprocessors())), flags(device, cuda::stream::flags_bytes(device.multiprocessors())) {
    device.zero(flags.data(), flags.bytes());
  }
  bool run(const cuda::StreamTask& t) { return cuda::stream_gemm(device.stream(), t, device.multiprocessors(), reinterpret_cast<float*>(partial.data()), reinterpret_cast<unsigned*>(flags.data())); }
};

/// One with code for the card that it is for.
bool usable() {
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

/// W x^T in float64 of weights rounded to bf16 as the kernel rounds them, [m, n], and the size of what was added up.
struct Expected {
  std::vector<double> sum, size;
  Expected(const test::TestMatrix& w, const std::vector<bf16>& x, index_t ldx, index_t m) : sum(static_cast<std::size_t>(m * w.n)), size(sum.size()) {
    for (index_t j = 0; j < w.n; ++j) {
      std::vector<float> row = w.row(j);
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
double rounding_of_weights(Format f) { return f == Format::bf16 ? 4 * test::eps : f == Format::q4_0 ? 0x1p-7 : 0x1p-9; }

template <class Y>
void check_product(Card& card, const test::TestMatrix& w, index_t m, bool adds, std::vector<Y>* bits = nullptr) {
  CAPTURE(m);
  CAPTURE(w.n);
  CAPTURE(w.k);
  Random random(7);
  Cuda& d = card.device;
  const index_t ldx = w.k + 8, ldy = w.n + 6;
  const auto x = numbers<bf16>(random, cuda::stream::most_m * ldx);
  const auto add = numbers<Y>(random, cuda::stream::most_m * ldy);
  const Memory<Cuda> packed(d, Cuda::packed_bytes(w.format, w.n, w.k));
  d.pack(packed.data(), {w.format, false, w.n, w.k, w.stored.data()});
  const Array<bf16> xs(d, x);
  const Array<Y> adds_to(d, add), y(d, std::vector<Y>(static_cast<std::size_t>(m * ldy), Y(std::numeric_limits<float>::quiet_NaN())));
  REQUIRE(card.run({w.format, packed.data(), nullptr, w.n, w.k, xs.data(), ldx, m, y.data(), ldy, std::is_same_v<Y, float>, adds ? adds_to.data() : nullptr}));
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

}  // namespace

TEST_CASE("cuda: stream_gemm in each format") {
  if (!usable()) return;
  Card card;
  Random random(1);
  for (const FormatInfo& f : formats) {
    if (!cuda::stream::takes(f.format)) continue;
    CAPTURE(std::string(f.name));
    const test::TestMatrix narrow(f.format, 48, 256, random), wide(f.format, 272, 2304, random), tall(f.format, 1168, 768, random);
    for (const index_t m : {1, 9, 33, 65, 130, 256}) check_product<float>(card, narrow, m, true);
    check_product<bf16>(card, wide, 16, false), check_product<float>(card, wide, 100, false), check_product<bf16>(card, wide, 200, true);
    check_product<bf16>(card, tall, 31, false);
  }
  const test::TestMatrix odd(Format::bf16, 160, 1000, random), tiny(Format::bf16, 16, 8, random);  // k that is no multiple of a unit
  check_product<float>(card, odd, 17, true), check_product<float>(card, tiny, 3, false);
}

TEST_CASE("cuda: stream_gemm gives a row the same bits in any batch") {
  if (!usable()) return;
  Card card;
  Random random(2);
  for (const Format f : {Format::bf16, Format::q4_0}) {
    const test::TestMatrix w(f, 656, 2048, random);
    std::vector<float> one, some;
    check_product<float>(card, w, 1, false, &one);
    for (const index_t m : {2, 40, 100, 250}) {
      check_product<float>(card, w, m, false, &some);
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
  Cuda& d = card.device;
  for (const Format f : {Format::bf16, Format::q8_0, Format::q6_K})
    for (const index_t n : {48, 720}) {
      const index_t k = 1280, ldy = n + 8;
      const test::TestMatrix gate(f, n, k, random, 0.05f), up(f, n, k, random, 0.05f);
      const std::size_t one = Cuda::packed_bytes(f, n, k);
      const Memory<Cuda> packed(d, 2 * one);
      d.pack(packed.data(), {f, false, n, k, gate.stored.data()}), d.pack(packed.data() + one, {f, false, n, k, up.stored.data()});
      for (const index_t m : {12, 70, 129}) {
        CAPTURE(m);
        CAPTURE(n);
        const auto x = numbers<bf16>(random, m * k);
        const Array<bf16> xs(d, x), y(d, std::vector<bf16>(static_cast<std::size_t>(m * ldy), bf16(std::numeric_limits<float>::quiet_NaN())));
        REQUIRE(card.run({f, packed.data(), packed.data() + one, n, k, xs.data(), k, m, y.data(), ldy, false, nullptr}));
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
  CHECK(refused([](auto& t) { t.up = t.w + 10; }));
  card.device.synchronize();
}
