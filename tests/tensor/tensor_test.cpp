// Tensor and Arena: ownership, shapes, limits; and the whole layer once on the real Cpu.
#include "tinyllama/tensor.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>

#include "tests/tensor/threads.hpp"

namespace tl = tinyllama;
using tl::dyn;
using tl::index_t;
using tl::test::Threads;

TEST_CASE("a tensor owns aligned memory of its device and gives it back") {
  const Threads dev(1);
  {
    tl::Tensor<Threads, float, dyn, 5> a(dev, 3);
    CHECK(a.shape() == std::array<index_t, 2>{3, 5});
    CHECK(reinterpret_cast<std::uintptr_t>(a.data()) % 64 == 0);
    for (float& v : a.span()) v = 2.0f;
    a(2, 4) = 7.0f;

    auto copy = a.clone();
    CHECK(copy.data() != a.data());
    CHECK(copy(2, 4) == 7.0f);
    copy(0, 0) = 1.0f;
    CHECK(a(0, 0) == 2.0f);

    const float* where = a.data();
    auto moved = std::move(a);
    CHECK(moved.data() == where);
    CHECK(a.data() == nullptr);
    moved = std::move(copy);
    CHECK(moved(0, 0) == 1.0f);

    tl::View<float, dyn, 5> v = moved;
    tl::View<const float, dyn, dyn> general = moved;
    static_assert(!std::is_convertible_v<const tl::Tensor<Threads, float, dyn, 5>&, tl::View<float, dyn, 5>>);
    CHECK(v.data() == general.data());
    static_assert(!std::is_copy_constructible_v<tl::Tensor<Threads, float, dyn>>);
    static_assert(std::is_same_v<decltype(tl::as_view(std::as_const(moved))), tl::View<const float, dyn, 5>>);

    tl::Tensor<Threads, tl::bf16, 4, 8> fixed(dev);
    CHECK(fixed.size() == 32);
    tl::Tensor<Threads, float, dyn> empty(dev, 0);
    CHECK(empty.size() == 0);
    CHECK(empty.clone().size() == 0);
  }
  CHECK(dev.live == 0);
}

TEST_CASE("impossible shapes are Errors, and allocate nothing") {
  const Threads dev(1);
  using Matrix = tl::Tensor<Threads, float, dyn, dyn>;
  CHECK_THROWS_AS(Matrix(dev, -1, 4), tl::Error);
  CHECK_THROWS_AS(Matrix(dev, index_t{1} << 40, index_t{1} << 40), tl::Error);
  CHECK_THROWS_AS((tl::Tensor<Threads, float, 3, dyn>(dev, std::array<index_t, 2>{4, 4})), tl::Error);
  CHECK(Matrix(dev, index_t{1} << 62, 0).size() == 0);
  CHECK(dev.live == 0);
}

TEST_CASE("an arena hands out aligned pieces, takes them back, and says when it is full") {
  const Threads dev(1);
  {
    tl::Arena arena(dev, 1000);
    CHECK(arena.capacity() == 1024);
    auto a = arena.take<float, dyn, 4>(3);
    auto b = arena.take<tl::bf16, dyn>(5);
    CHECK(reinterpret_cast<std::byte*>(b.data()) - reinterpret_cast<std::byte*>(a.data()) == 64);
    const auto mark = arena.mark();
    auto c = arena.take<float, 32>();
    arena.reset(mark);
    CHECK(arena.take<float, 32>().data() == c.data());
    CHECK(arena.used() == 256);
    CHECK_THROWS_WITH_AS((arena.take<float, dyn>(200)), "Arena: [200]: expected 832 bytes free, found 768 of 1024", tl::Error);
    CHECK(arena.used() == 256);
    arena.reset();
    CHECK(arena.used() == 0);
    CHECK(arena.peak() == 256);
    {
      tl::ArenaScope scope(arena);
      arena.take<float, 64>();
    }
    CHECK(arena.used() == 0);
    CHECK(arena.take<float, dyn>(0).size() == 0);
  }
  CHECK(dev.live == 0);
}

namespace {
constexpr void a_step(auto& arena, index_t rows) {
  arena.template take<float, dyn, 10>(rows);
  tl::ArenaScope scope(arena);
  arena.template take<float, dyn>(rows);
}
}  // namespace

TEST_CASE("sizing counts what the same code takes, also at compile time") {
  constexpr std::size_t planned = [] {
    tl::Arena<Threads> plan;
    a_step(plan, 7);
    a_step(plan, 7);
    return plan.peak();
  }();
  static_assert(planned == 2 * 320 + 64);
  const Threads dev(1);
  tl::Arena arena(dev, planned);
  a_step(arena, 7);
  a_step(arena, 7);
  CHECK(arena.peak() == planned);
  CHECK_THROWS_AS(a_step(arena, 7), tl::Error);
}

TEST_CASE("the layer on the Cpu: map, sum, softmax, transpose, cast, quantise") {
  tl::Cpu dev;
  tl::Tensor<tl::Cpu, float, dyn, 256> x(dev, 4);
  const auto n = tl::test::numbers(4 * 256);
  std::copy(n.begin(), n.end(), x.data());
  tl::Tensor<tl::Cpu, float, dyn, 256> y(dev, 4);
  tl::map(dev, y, [](auto v) { return tl::abs(v); }, x);
  tl::Tensor<tl::Cpu, float, dyn> s(dev, 4);
  tl::max(dev, s, y, 1);
  CHECK(s(0) <= 4.0f);
  tl::softmax(dev, y, x);
  tl::sum(dev, s, y, 1);
  for (index_t i = 0; i < 4; ++i) CHECK(std::fabs(s(i) - 1.0f) < 256 * 6e-8f);
  tl::Tensor<tl::Cpu, float, 256, dyn> t(dev, 4);
  tl::transpose(dev, t, x);
  CHECK(t(200, 3) == x(3, 200));
  const auto bytes = tl::quantise(dev, tl::Format::q8_0, x);
  tl::dequantise(dev, y, tl::Format::q8_0, bytes);
  // Half a step of the block's scale, which is off by half a unit of f16 itself.
  for (index_t i = 0; i < 4 * 256; ++i) CHECK(std::fabs(y.data()[i] - x.data()[i]) <= 4.0f * (0.5f / 127.0f + 0x1p-11f));
}
