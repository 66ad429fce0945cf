// Whole models on a card: the goldens' logits whole, in chunks, token by token and in batches; texts; sessions as values.
#include "tinyllama/cuda.hpp"

#include <doctest/doctest.h>


#include "tests/device/card.hpp"
#include "tests/io/small_model.hpp"
#include "tests/model/golden.hpp"
#include "tinyllama/io/convert.hpp"

namespace tl = tinyllama;
using namespace tinyllama::test;

namespace {

// f32: as on the CPU. bf16: each of some 10 roundings a layer is 2^-9 at most, and they add up like a random walk.
template <class D>
constexpr double tolerance = std::is_same_v<D, tl::CudaF32> ? 2e-6 : 2e-2;
constexpr tl::index_t T = 48;

template <class D>
tl::LoadOptions options() { return std::is_same_v<D, tl::CudaF32> ? exact() : tl::LoadOptions{.cache = tl::Format::bf16}; }

template <class D>
struct Golden {
  Golden(std::filesystem::path where, tl::index_t v) : folder(std::move(where)), vocab(v) {}
  std::filesystem::path folder;
  tl::index_t vocab;
  D dev;
  Reference reference{folder};
  tl::Model<tl::any_llama, D> model = tl::load<tl::any_llama>(dev, folder, options<D>());
  std::vector<std::int32_t> ids = reference.ids("input_ids");
  std::vector<float> logits = reference.values<float>("logits");
  std::span<const std::int32_t> row(int b) const { return std::span<const std::int32_t>(ids).subspan(static_cast<std::size_t>(b * T), T); }
  std::span<const float> expected(int b) const { return std::span<const float>(logits).subspan(static_cast<std::size_t>(b * T * vocab), static_cast<std::size_t>(T * vocab)); }
  std::span<const float> last(int b, tl::index_t t) const { return expected(b).subspan(static_cast<std::size_t>(t * vocab), static_cast<std::size_t>(vocab)); }
};

template <class D, class F>
void on_goldens(F&& f) {
  for (const bool tied : {false, true}) {
    CAPTURE(tied);
    Golden<D> g(tied ? golden_folder<golden_tied>() : golden_folder<golden_gqa>(), tied ? golden_tied::vocab : golden_gqa::vocab);
    f(g);
  }
}

}  // namespace

TEST_CASE_TEMPLATE("cuda: logits of the goldens", D, tl::CudaF32, tl::Cuda) {
  if (no_card()) return;
  on_goldens<D>([](auto& g) {
    for (int b = 0; b < 2; ++b) {
      auto session = g.model.start();
      const auto l = session.logits_of(g.row(b));
      REQUIRE(l.size() == T * g.vocab);
      const double error = relative_error(l.span(), g.expected(b));
      MESSAGE("relative error " << error);
      CHECK(error < tolerance<D>);
    }
  });
}

TEST_CASE_TEMPLATE("cuda: chunks, single steps and batches are the whole run", D, tl::CudaF32, tl::Cuda) {
  if (no_card()) return;
  on_goldens<D>([](auto& g) {
    for (const tl::index_t chunk : {1, 3, 7, 47, 48, 100}) {
      auto session = g.model.start();
      CHECK(relative_error(session.prefill(g.row(0), {.chunk = chunk}), g.last(0, T - 1)) < 2 * tolerance<D>);
    }
    auto session = g.model.start();
    for (tl::index_t t = 0; t < T; ++t) REQUIRE(relative_error(session.decode(g.row(1)[static_cast<std::size_t>(t)]), g.last(1, t)) < 2 * tolerance<D>);

    auto a = g.model.start(), b = g.model.start();
    tl::Session<tl::any_llama, D>* both[] = {&a, &b};
    const auto check = [&](auto l, tl::index_t first, tl::index_t second) {
      CHECK(relative_error(tl::row(l, 0).span(), g.last(0, first)) < 2 * tolerance<D>);
      CHECK(relative_error(tl::row(l, 1).span(), g.last(1, second)) < 2 * tolerance<D>);
    };
    const std::span<const std::int32_t> first[] = {g.row(0).first(5), g.row(1).first(30)}, second[] = {g.row(0).subspan(5, 20), g.row(1).subspan(30, 1)};
    check(tl::prefill_batch<tl::any_llama, D>(both, first), 4, 29);
    check(tl::prefill_batch<tl::any_llama, D>(both, second), 24, 30);
    const std::int32_t next[] = {g.row(0)[25], g.row(1)[31]};
    check(tl::decode_batch<tl::any_llama, D>(both, next), 25, 31);
  });
}

TEST_CASE_TEMPLATE("cuda: greedy continuation of the goldens", D, tl::CudaF32, tl::Cuda) {
  if (no_card()) return;
  on_goldens<D>([](auto& g) {
    auto session = g.model.start();
    CHECK(greedy(session, g.row(0).first(8), 24) == g.reference.ids("greedy"));
  });
}

TEST_CASE("cuda: caches of 16 and 8 bits stay within their formats") {
  if (no_card()) return;
  const auto error = [](tl::Format cache) {
    tl::CudaF32 dev;
    const Reference reference(golden_folder<golden_tied>());
    const auto ids = reference.ids("input_ids");
    const auto expected = reference.values<float>("logits");
    auto session = tl::load<tl::any_llama>(dev, golden_folder<golden_tied>(), {.cache = cache}).start();
    return relative_error(session.logits_of(std::span<const std::int32_t>(ids).first(T)).span(), std::span<const float>(expected).first(T * golden_tied::vocab));
  };
  const double f16 = error(tl::Format::f16), bf16 = error(tl::Format::bf16), q8_0 = error(tl::Format::q8_0);
  CHECK(f16 < 5e-4);
  CHECK(f16 > 2e-6);
  CHECK(bf16 < 4e-3);
  CHECK(bf16 > f16);
  CHECK(q8_0 < 1.0 / 127);
  CHECK(q8_0 > f16);
  const double e4m3 = error(tl::Format::f8_e4m3);
  CHECK(e4m3 < 0x1p-4);  // half a step
  CHECK(e4m3 > bf16);
}

TEST_CASE("cuda: observers see the residual stream and the attention") {
  if (no_card()) return;
  struct Observer {
    int hiddens = 0, attentions = 0;
    void hidden(int, tl::View<const float, tl::dyn, tl::dyn> x) {
      ++hiddens;
      double norm = 0;
      for (tl::index_t i = 0; i < x.extent(1); ++i) norm += static_cast<double>(x(9, i)) * x(9, i);
      CHECK(norm > 0);
    }
    void attention(int, const tl::Sequence& s, tl::View<const float, tl::dyn, tl::dyn, tl::dyn> p) {
      ++attentions;
      for (tl::index_t h = 0; h < p.extent(0); ++h)
        for (tl::index_t t = 0; t < p.extent(1); ++t) {
          double sum = 0;
          for (tl::index_t k = 0; k < p.extent(2); ++k) sum += p(h, t, k);
          REQUIRE(sum == doctest::Approx(1.0).epsilon(1e-5));
          REQUIRE((s.position + t + 1 == p.extent(2) || p(h, t, s.position + t + 1) == 0.0f));
        }
    }
  };
  Golden<tl::CudaF32> g{golden_folder<golden_gqa>(), golden_gqa::vocab};
  auto session = g.model.start();
  Observer o;
  const auto l = session.logits_of(g.row(0).first(10), o);
  CHECK(o.hiddens == 3);
  CHECK(o.attentions == 2);
  CHECK(relative_error(l.span(), g.expected(0).first(10 * golden_gqa::vocab)) < tolerance<tl::CudaF32>);
}

TEST_CASE("cuda: sessions fork, undo, and are saved for their own kind of device") {
  if (no_card()) return;
  Golden<tl::Cuda> g{golden_folder<golden_gqa>(), golden_gqa::vocab};
  const auto copy = [](std::span<const float> l) { return std::vector<float>(l.begin(), l.end()); };
  const TempFolder folder;
  auto a = g.model.start();
  a.prefill(std::span<const std::int32_t>(g.ids).first(90));
  auto b = a;
  CHECK(a.cache().pages()[1] == b.cache().pages()[1]);
  a.save(folder / "cache");
  const auto next = copy(a.decode(5));
  CHECK(a.cache().pages()[0] == b.cache().pages()[0]);
  CHECK(a.cache().pages()[1] != b.cache().pages()[1]);
  b.decode(6);
  b.truncate(90);
  CHECK(copy(b.decode(5)) == next);
  auto c = g.model.start();
  c.restore(folder / "cache");
  CHECK(copy(c.decode(5)) == next);
  tl::Cpu cpu({.threads = 1});
  auto other = tl::load<tl::any_llama>(cpu, g.folder, {.cache = tl::Format::bf16}).start();
  CHECK_THROWS_WITH_AS(other.restore(folder / "cache"), doctest::Contains("in CUDA's order"), tl::Error);
}

TEST_CASE_TEMPLATE("cuda: a model whose tokens the persistent kernel decodes", D, tl::CudaF32, tl::Cuda) {
  if (no_card()) return;
  tl::any_llama c;
  c.layers = 3, c.hidden = 256, c.heads = 4, c.kv_heads = 2, c.ffn = 704, c.vocab = 331, c.context = 400;
  const TempFolder folder;
  SmallModel(c).write(folder.path());
  std::vector<std::int32_t> ids;
  for (int i = 0; i < 200; ++i) ids.push_back((i * 7919 + 13) % c.vocab);
  tl::Cpu cpu({.threads = 2});
  auto reference = tl::load<tl::any_llama>(cpu, folder.path(), exact()).start();
  const auto expected = reference.logits_of(ids);
  D dev;
  const auto model = tl::load<tl::any_llama>(dev, folder.path(), options<D>());
  CHECK((dev.capability() < 90 || model.weights().prepared.decode != nullptr));
  auto whole = model.start(), steps = model.start();
  CHECK(relative_error(whole.logits_of(ids).span(), expected.span()) < tolerance<D>);
  const std::span<const std::int32_t> all(ids);
  steps.prefill(all.first(130), {.logits = tl::Logits::none});
  for (std::size_t t = 130; t < 200; ++t) REQUIRE(relative_error(steps.decode(ids[t]), tl::row(expected, static_cast<tl::index_t>(t)).span()) < tolerance<D>);
  // Many tokens in one launch: the same ones, and the same bits of the last logits.
  auto a = steps, b = steps;
  std::vector<std::int32_t> one{5};
  std::vector<float> last;
  for (int i = 0; i < 90; ++i) {
    const auto l = a.decode(one.back());
    last.assign(l.begin(), l.end());
    one.push_back(static_cast<std::int32_t>(std::max_element(l.begin(), l.end()) - l.begin()));
  }
  one.erase(one.begin());
  CHECK(b.decode_greedy(5, 90) == one);
  CHECK(b.length() == a.length());
  CHECK(std::equal(last.begin(), last.end(), b.logits().begin(), b.logits().end()));
}

// The CPU computes with the same weights, expanded, and unrounded activations.
TEST_CASE("cuda: weights and caches of 8-bit floats") {
  if (no_card()) return;
  tl::any_llama c;
  c.layers = 3, c.hidden = 256, c.heads = 4, c.kv_heads = 2, c.ffn = 704, c.vocab = 331, c.context = 400;
  const TempFolder folder;
  SmallModel(c).write(folder / "f32");
  tl::save_safetensors(tl::open_checkpoint(folder / "f32"), folder / "e4m3", {.format = tl::Format::f8_e4m3});
  std::vector<std::int32_t> ids;
  for (int i = 0; i < 200; ++i) ids.push_back((i * 7919 + 13) % c.vocab);
  tl::Cpu cpu({.threads = 2});
  auto reference = tl::load<tl::any_llama>(cpu, folder / "e4m3", exact()).start();
  const auto expected = reference.logits_of(ids);
  const auto last = [&](std::size_t t) { return tl::row(expected, static_cast<tl::index_t>(t)).span(); };
  {
    tl::CudaF32 dev;
    CHECK(relative_error(tl::load<tl::any_llama>(dev, folder / "e4m3", exact()).start().logits_of(ids).span(), expected.span()) < 5e-3);
  }
  tl::Cuda dev;
  for (const tl::Format cache : {tl::Format::bf16, tl::Format::f8_e4m3}) {
    CAPTURE(std::string(tl::name(cache)));
    const double exact_weights = cache == tl::Format::bf16 ? 1e-2 : 4e-2, all = 6e-2;
    const auto model = tl::load<tl::any_llama>(dev, folder / "e4m3", {.cache = cache});
    CHECK((dev.capability() < 90 || model.weights().prepared.decode != nullptr));
    auto whole = model.start(), steps = model.start();
    const double of_prefill = relative_error(whole.logits_of(ids).span(), expected.span());
    CHECK(of_prefill < all);
    double of_steps = 0;
    for (std::size_t t = 0; t < 200; ++t) of_steps = std::max(of_steps, relative_error(steps.decode(ids[t]), last(t)));
    CHECK(of_steps < exact_weights);
    MESSAGE("relative error: prefill " << of_prefill << ", steps " << of_steps);
    // Many tokens in one launch, and batches.
    auto a = steps, b = steps;
    std::vector<std::int32_t> one{5};
    for (int i = 0; i < 90; ++i) {
      const auto l = a.decode(one.back());
      one.push_back(static_cast<std::int32_t>(std::max_element(l.begin(), l.end()) - l.begin()));
    }
    one.erase(one.begin());
    CHECK(b.decode_greedy(5, 90) == one);
    auto u = model.start(), v = model.start();
    u.prefill(std::span<const std::int32_t>(ids).first(150)), v.prefill(std::span<const std::int32_t>(ids).first(70));
    std::vector<tl::Session<tl::any_llama, tl::Cuda>*> both{&u, &v};
    for (std::size_t t = 0; t < 5; ++t) {
      const std::int32_t next[] = {ids[150 + t], ids[70 + t]};
      const auto l = tl::decode_batch<tl::any_llama, tl::Cuda>(both, next);
      CHECK(relative_error(tl::row(l, 0).span(), last(150 + t)) < all);
      CHECK(relative_error(tl::row(l, 1).span(), last(70 + t)) < all);
    }
  }
}

TEST_CASE_TEMPLATE("cuda: batches of changing sizes, step by step and without the host, are the single sequences", D, tl::CudaF32, tl::Cuda) {
  if (no_card()) return;
  tl::any_llama c;
  c.layers = 3, c.hidden = 256, c.heads = 4, c.kv_heads = 2, c.ffn = 704, c.vocab = 331, c.context = 400;
  const TempFolder folder;
  SmallModel(c).write(folder.path());
  D dev;
  const auto model = tl::load<tl::any_llama>(dev, folder.path(), options<D>());
  constexpr int S = 5;
  const tl::index_t lengths[S] = {1, 62, 63, 130, 200};
  std::vector<tl::Session<tl::any_llama, D>> single, batch;
  for (int i = 0; i < S; ++i) {
    single.push_back(model.start());
    std::vector<std::int32_t> ids;
    for (tl::index_t t = 0; t < lengths[i]; ++t) ids.push_back(static_cast<std::int32_t>((t * 7919 + 13 * i) % c.vocab));
    single.back().prefill(ids);
    batch.push_back(single.back());
  }
  std::vector<tl::Session<tl::any_llama, D>*> each;
  std::vector<std::int32_t> ids;
  int step = 0;
  // Sequences join and leave: a graph of one size must not be taken for another, and pages fill up on the way.
  for (const int n : {5, 5, 5, 5, 3, 3, 3, 5, 2, 2, 2, 5, 5}) {
    each.clear(), ids.clear();
    for (int i = 0; i < n; ++i) each.push_back(&batch[static_cast<std::size_t>(i)]), ids.push_back(static_cast<std::int32_t>((step * 31 + i) % c.vocab));
    ++step;
    const auto l = tl::decode_batch<tl::any_llama, D>(each, ids);
    for (int i = 0; i < n; ++i) {
      CAPTURE(step);
      CAPTURE(i);
      REQUIRE(relative_error(tl::row(l, i).span(), single[static_cast<std::size_t>(i)].decode(ids[static_cast<std::size_t>(i)])) < tolerance<D>);
    }
  }
  each.clear();
  for (auto& s : batch) each.push_back(&s);
  ids.assign({1, 2, 3, 4, 5});
  const auto found = tl::decode_batch_greedy<tl::any_llama, D>(each, ids, 70);
  for (int i = 0; i < S; ++i) {
    CAPTURE(i);
    auto& s = batch[static_cast<std::size_t>(i)];
    REQUIRE(s.length() == single[static_cast<std::size_t>(i)].length() + 70);
    // What the host computes from the tokens that came out: each was the best, or as good as it.
    auto check = single[static_cast<std::size_t>(i)];
    std::vector<std::int32_t> all{ids[static_cast<std::size_t>(i)]};
    all.insert(all.end(), found[static_cast<std::size_t>(i)].begin(), found[static_cast<std::size_t>(i)].end() - 1);
    const auto l = check.logits_of(all);
    for (tl::index_t t = 0; t < 70; ++t) {
      const auto row = tl::row(l, t).span();
      const float best = *std::max_element(row.begin(), row.end()), taken = row[static_cast<std::size_t>(found[static_cast<std::size_t>(i)][static_cast<std::size_t>(t)])];
      REQUIRE(taken >= best - 4 * static_cast<float>(tolerance<D>) * std::max(1.0f, std::abs(best)));
    }
    CHECK(relative_error(s.logits(), tl::row(l, 69).span()) < 2 * tolerance<D>);
  }
}

TEST_CASE("cuda: two models on two devices, in turns") {
  if (no_card()) return;
  Golden<tl::CudaF32> g{golden_folder<golden_gqa>(), golden_gqa::vocab}, t{golden_folder<golden_tied>(), golden_tied::vocab};
  auto a = g.model.start(), b = t.model.start();
  for (tl::index_t i = 0; i < 12; ++i) {
    CHECK(relative_error(a.decode(g.row(0)[static_cast<std::size_t>(i)]), g.last(0, i)) < tolerance<tl::CudaF32>);
    CHECK(relative_error(b.decode(t.row(0)[static_cast<std::size_t>(i)]), t.last(0, i)) < tolerance<tl::CudaF32>);
  }
}

TEST_CASE_TEMPLATE("cuda: stories260K writes what llama2.c writes", D, tl::CudaF32, tl::Cuda) {
  if (no_card()) return;
  const auto gguf = test_data("models/stories260K/stories260K.gguf"), expected = test_data("models/stories260K/greedy.txt");
  if (!gguf || !expected) {
    MESSAGE("skipped: no stories260K");
    return;
  }
  std::string text = read_file(*expected);
  while (text.ends_with('\n')) text.pop_back();
  D dev;
  const auto model = tl::load<tl::any_llama>(dev, *gguf, options<D>());
  for (const std::string prompt : {"", "Once upon a time"}) {
    auto s = model.start();
    std::string all = prompt;
    for (std::string_view piece : tl::generate(s, prompt, {.max_tokens = 256, .temperature = 0.0f})) all += piece;
    const std::size_t same = static_cast<std::size_t>(std::mismatch(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(std::min(all.size(), text.size())), text.begin()).first - all.begin());
    MESSAGE("the same for " << same << " of " << text.size() << " characters");
    if (std::is_same_v<D, tl::CudaF32>) CHECK(all.substr(0, text.size()) == text);
    else CHECK(same > 100);  // bf16 may take the other of two equally good words
  }
  // Drawn on the card, and on the host where log-probabilities are asked for: the same words.
  const auto story = [&](int log_probabilities) {
    auto s = model.start();
    return tl::generate(s, std::string_view("Once upon a time"), {.max_tokens = 100, .temperature = 0.9f, .seed = 7, .log_probabilities = log_probabilities}).text();
  };
  CHECK(story(-1) == story(0));
}
