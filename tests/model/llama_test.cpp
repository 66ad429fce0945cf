// The forward pass against Hugging Face's float64 logits, whole, in chunks, token by token and in batches.
#include "tinyllama/model/llama.hpp"

#include <doctest/doctest.h>

#include "tests/model/golden.hpp"
#include "tinyllama/io/convert.hpp"
#include "tinyllama/kernels/reference.hpp"

namespace tl = tinyllama;
using namespace tinyllama::test;

namespace {

// f32 rounds to 6e-8; errors of some 10 roundings for each of 2 or 3 layers add up like a random walk: 5e-7 was seen, Hugging Face's own
// f32 run is at 7e-7.
constexpr double f32_tolerance = 1e-6;
constexpr tl::index_t T = 48;

template <class C>
struct Golden {
  tl::Cpu dev{{.threads = 2, .kernels = nullptr}};
  Reference reference{golden_folder<C>()};
  tl::Model<C, tl::Cpu> model = tl::load<C>(dev, golden_folder<C>(), exact());
  std::vector<std::int32_t> ids = reference.ids("input_ids");
  std::vector<float> logits = reference.values<float>("logits");
  std::span<const std::int32_t> row(int b) const { return std::span<const std::int32_t>(ids).subspan(static_cast<std::size_t>(b * T), T); }
  std::span<const float> expected(int b) const {
    return std::span<const float>(logits).subspan(static_cast<std::size_t>(b * T * C::vocab), static_cast<std::size_t>(T * C::vocab));
  }
};

}  // namespace

TEST_CASE_TEMPLATE("llama: logits of the goldens", C, golden_gqa, golden_tied) {
  const Golden<C> g;
  for (int b = 0; b < 2; ++b) {
    auto session = g.model.start();
    const auto l = session.logits_of(g.row(b));
    REQUIRE(l.size() == T * C::vocab);
    CHECK(relative_error(l.span(), g.expected(b)) < f32_tolerance);
  }
}

TEST_CASE_TEMPLATE("llama: chunks, single steps and batches are the whole run", C, golden_gqa, golden_tied) {
  const Golden<C> g;
  const auto last = [&](int b, tl::index_t t) { return g.expected(b).subspan(static_cast<std::size_t>(t * C::vocab), C::vocab); };
  SUBCASE("chunks") {
    for (const tl::index_t chunk : {1, 3, 7, 47, 48, 100}) {
      auto session = g.model.start();
      CHECK(relative_error(session.prefill(g.row(0), {.chunk = chunk}), last(0, T - 1)) < f32_tolerance);
      CHECK(session.length() == T);
    }
  }
  SUBCASE("single steps") {
    auto session = g.model.start();
    for (tl::index_t t = 0; t < T; ++t) {
      const auto l = session.decode(g.row(1)[static_cast<std::size_t>(t)]);
      REQUIRE(relative_error(l, last(1, t)) < f32_tolerance);
    }
  }
  SUBCASE("two sequences of different lengths, mixed prefill and decoding") {
    auto a = g.model.start(), b = g.model.start();
    tl::Session<C, tl::Cpu>* both[] = {&a, &b};
    const std::span<const std::int32_t> first[] = {g.row(0).first(5), g.row(1).first(30)};
    auto l = tl::prefill_batch<C, tl::Cpu>(both, first);
    CHECK(relative_error(tl::row(l, 0).span(), last(0, 4)) < f32_tolerance);
    CHECK(relative_error(tl::row(l, 1).span(), last(1, 29)) < f32_tolerance);
    const std::span<const std::int32_t> second[] = {g.row(0).subspan(5, 20), g.row(1).subspan(30, 1)};
    l = tl::prefill_batch<C, tl::Cpu>(both, second);
    CHECK(relative_error(a.logits(), last(0, 24)) < f32_tolerance);
    CHECK(relative_error(b.logits(), last(1, 30)) < f32_tolerance);
    const std::int32_t next[] = {g.row(0)[25], g.row(1)[31]};
    l = tl::decode_batch<C, tl::Cpu>(both, next);
    CHECK(relative_error(tl::row(l, 0).span(), last(0, 25)) < f32_tolerance);
    CHECK(relative_error(tl::row(l, 1).span(), last(1, 31)) < f32_tolerance);
  }
}

TEST_CASE_TEMPLATE("llama: greedy continuation of the goldens", C, golden_gqa, golden_tied) {
  const Golden<C> g;
  auto session = g.model.start();
  CHECK(greedy(session, g.row(0).first(8), 24) == g.reference.ids("greedy"));
}

TEST_CASE("llama: the reference kernels and every instruction set agree on a whole model") {
  const Reference reference(golden_folder<golden_gqa>());
  const auto ids = reference.ids("input_ids");
  const auto expected = reference.values<float>("logits");
  std::vector<const tl::Kernels*> tables(tl::all_cpu_kernels().begin(), tl::all_cpu_kernels().end());
  tables.push_back(&tl::reference::kernels);
  for (const tl::Kernels* table : tables) {
    CAPTURE(table->instruction_set);
    tl::Cpu dev({.threads = 1, .kernels = table});
    auto session = tl::load<golden_gqa>(dev, golden_folder<golden_gqa>(), exact()).start();
    const auto l = session.logits_of(std::span<const std::int32_t>(ids).first(T));
    CHECK(relative_error(l.span(), std::span<const float>(expected).first(T * golden_gqa::vocab)) < f32_tolerance);
  }
}

TEST_CASE("llama: the same bits for any number of threads") {
  const Golden<golden_tied> g;
  std::vector<float> one;
  for (const int threads : {1, 2, 3, 5}) {
    tl::Cpu dev({.threads = threads, .kernels = nullptr});
    auto session = tl::load<golden_tied>(dev, golden_folder<golden_tied>()).start();
    session.prefill(g.row(0));
    const auto l = session.decode(7);
    if (one.empty()) one.assign(l.begin(), l.end());
    CHECK(std::equal(l.begin(), l.end(), one.begin(), one.end()));
  }
}

TEST_CASE("llama: a run-time config runs the same model") {
  const Golden<golden_gqa> g;
  tl::Cpu dev;
  bool called = false;
  tl::load_any(dev, tl::open_checkpoint(golden_folder<golden_gqa>()), exact(), [&](const auto& model) {
    called = true;
    CHECK(model.config().hidden == 64);
    auto session = model.start();
    CHECK(relative_error(session.logits_of(g.row(1)).span(), g.expected(1)) < f32_tolerance);
  });
  CHECK(called);
}

TEST_CASE("llama: observers see the residual stream and the attention") {
  struct Observer {
    std::vector<int> layers;
    double last_norm = 0;
    int attentions = 0;
    void hidden(int layer, tl::View<const float, tl::dyn, tl::dyn> x) {
      layers.push_back(layer);
      CHECK(x.extent(0) == 10);
      CHECK(x.extent(1) == golden_gqa::hidden);
      last_norm = 0;
      for (tl::index_t i = 0; i < x.extent(1); ++i) last_norm += static_cast<double>(x(9, i)) * x(9, i);
    }
    void attention(int, const tl::Sequence& s, tl::View<const float, tl::dyn, tl::dyn, tl::dyn> p) {
      ++attentions;
      CHECK(p.extent(0) == golden_gqa::heads);
      CHECK(p.extent(1) == s.tokens);
      for (tl::index_t h = 0; h < p.extent(0); ++h)
        for (tl::index_t t = 0; t < p.extent(1); ++t) {
          double sum = 0;
          for (tl::index_t k = 0; k < p.extent(2); ++k) {
            sum += p(h, t, k);
            if (k > s.position + t) REQUIRE(p(h, t, k) == 0.0f);
          }
          REQUIRE(sum == doctest::Approx(1.0).epsilon(1e-6));
        }
    }
  };
  const Golden<golden_gqa> g;
  auto session = g.model.start();
  Observer o;
  const auto l = session.logits_of(g.row(0).first(10), o);
  CHECK(o.layers == std::vector<int>{-1, 0, 1});
  CHECK(o.attentions == 2);
  CHECK(o.last_norm > 0);
  CHECK(relative_error(l.span(), g.expected(0).first(10 * golden_gqa::vocab)) < f32_tolerance);
}

TEST_CASE("llama: caches of 16 and 8 bits and bf16 products stay within their formats") {
  const Golden<golden_tied> g;
  const auto error = [&](tl::LoadOptions o) {
    tl::Cpu dev;
    auto session = tl::load<golden_tied>(dev, golden_folder<golden_tied>(), o).start();
    return relative_error(session.logits_of(g.row(0)).span(), g.expected(0));
  };
  const double f16 = error({.compute = tl::Compute::f32, .cache = tl::Format::f16}), bf16 = error({.compute = tl::Compute::f32, .cache = tl::Format::bf16});
  CHECK(f16 < 5e-4);   // 2^-11
  CHECK(f16 > 1e-6);   // it is in use
  CHECK(bf16 < 4e-3);  // 2^-8
  CHECK(bf16 > f16);
  const double q8_0 = error({.compute = tl::Compute::f32, .cache = tl::Format::q8_0});
  CHECK(q8_0 < 1.0 / 127);  // half a step of the largest value, at most
  CHECK(q8_0 > f16);
  const double e4m3 = error({.compute = tl::Compute::f32, .cache = tl::Format::f8_e4m3});
  CHECK(e4m3 < 0x1p-4);  // half a step
  CHECK(e4m3 > bf16);
}

TEST_CASE("llama: weights of 8-bit floats are expanded to bf16 with their scales, packed file or not") {
  const TempFolder tmp;
  const auto from = tl::open_checkpoint(golden_folder<golden_gqa>());
  tl::save_safetensors(from, tmp / "e4m3", {.format = tl::Format::f8_e4m3});
  const auto narrow = tl::open_checkpoint(tmp / "e4m3");
  tl::save_safetensors(narrow, tmp / "f32", {.format = tl::Format::f32});   // the same values
  tl::save_safetensors(narrow, tmp / "bf16", {.format = tl::Format::bf16});  // rounded as the loader rounds them
  const Golden<golden_gqa> g;
  tl::Cpu dev;
  const auto logits = [&](const char* folder, tl::LoadOptions o = exact()) {
    auto session = tl::load<golden_gqa>(dev, tmp / folder, o).start();
    const auto l = session.logits_of(g.row(0));
    return std::vector<float>(l.span().begin(), l.span().end());
  };
  const auto got = logits("e4m3");
  CHECK(got == logits("bf16"));
  CHECK(relative_error(got, logits("f32")) < 8e-3);  // 2^-8 of each weight, through two layers
  const double error = relative_error(got, g.expected(0));
  CHECK(error < 0.1);
  CHECK(error > 8e-3);  // it is in use
  tl::LoadOptions packed = exact();
  packed.packed = tmp / "packed";
  CHECK(logits("e4m3", packed) == got);
  CHECK(logits("e4m3", packed) == got);  // mapped
}
