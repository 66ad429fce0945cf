// Trainer against Hugging Face's float64 losses, gradients and AdamW steps; and what must not change a result: threads, micro-batches, what is saved.
#include "tinyllama/train/trainer.hpp"

#include <doctest/doctest.h>

#include <map>

#include "tests/train/golden.hpp"

namespace tl = tinyllama;
using namespace tinyllama::test;

namespace {

constexpr tl::index_t T = golden_tokens;

/// As the goldens were made; logits in chunks that do not divide the rows.
tl::TrainerOptions as_golden(tl::Precision precision) { return {.peak_lr = 1e-3f, .precision = precision, .tokens = T, .logits_rows = 40}; }

std::vector<float> copy(std::span<const float> v) { return {v.begin(), v.end()}; }

/// Weights behind two steps on the golden batch.
template <class C>
std::vector<float> two_steps(const tl::TrainerOptions& options, int threads = 2) {
  const Golden<C> g;
  tl::Cpu dev({.threads = threads, .kernels = nullptr});
  tl::Trainer<C> t(dev, g.file, options);
  for (int i = 0; i < 2; ++i) t.step(g.inputs, g.targets);
  return copy(t.weights());
}

}  // namespace

TEST_CASE_TEMPLATE("trainer: f32 against float64: losses, every gradient, their norm, and the weights behind three steps", C, golden_gqa, golden_tied) {
  const Golden<C> g;
  tl::Cpu dev({.threads = 2, .kernels = nullptr});
  tl::Trainer<C> t(dev, g.file, as_golden(tl::Precision::f32));
  const auto losses = g.reference.template values<float>("step_losses");
  for (std::size_t i = 0; i < 3; ++i) {
    // An f32 loss of 6 is rounded to 2.4e-7; some 90 terms, and logits at 5e-7, are behind it.
    CHECK(std::fabs(t.step(g.inputs, g.targets) - losses[i]) < 2e-6 * losses[i]);
    if (i > 0) continue;
    CHECK(std::fabs(t.report().gradient_norm / g.reference.template values<float>("grad_norm")[0] - 1) < 1e-6);
    // An independent f32 implementation is at 1.2e-6 with its worst gradient, at 8e-6 with its worst weights.
    CHECK(worst<C>(g.reference, "grad.", t.gradients()) < 3e-6);
  }
  CHECK(worst<C>(g.reference, "after3.", t.weights()) < 1e-5);
}

TEST_CASE_TEMPLATE("trainer: bf16 products stay within what their rounding shows", C, golden_gqa, golden_tied) {
  const Golden<C> g;
  tl::Cpu dev({.threads = 2, .kernels = nullptr});
  if (!tl::training_kernels(dev).bf16_dot) {
    MESSAGE("skipped: this CPU has no bf16 dot product");
    return;
  }
  tl::Trainer<C> t(dev, g.file, as_golden(tl::Precision::bf16));
  const auto losses = g.reference.template values<float>("step_losses");
  for (std::size_t i = 0; i < 3; ++i) {
    CHECK(std::fabs(t.step(g.inputs, g.targets) / losses[i] - 1) < 1e-3);
    if (i > 0) continue;
    CHECK(std::fabs(t.report().gradient_norm / g.reference.template values<float>("grad_norm")[0] - 1) < 5e-3);
    const double error = worst<C>(g.reference, "grad.", t.gradients());
    CHECK(error < 0.02);
    CHECK(error > 1e-4);  // it did round
  }
  CHECK(worst<C>(g.reference, "after3.", t.weights()) < 0.005);
}

TEST_CASE("trainer: the reference kernels train too") {
  const Golden<golden_gqa> g;
  tl::Cpu dev({.threads = 1, .kernels = &tl::reference::kernels});
  tl::Trainer<golden_gqa> t(dev, g.file, as_golden(tl::Precision::f32));
  t.step(g.inputs, g.targets);
  CHECK(worst<golden_gqa>(g.reference, "grad.", t.gradients()) < 3e-6);
}

TEST_CASE("trainer: the same bits for any number of threads, and for whatever is saved or computed again") {
  for (const tl::Precision precision : {tl::Precision::f32, tl::Precision::bf16}) {
    const tl::TrainerOptions options = as_golden(precision);
    const auto expected = two_steps<golden_tied>(options);
    CHECK(two_steps<golden_tied>(options, 1) == expected);
    CHECK(two_steps<golden_tied>(options, 5) == expected);
    for (const tl::Checkpointing how : {tl::Checkpointing::none, tl::Checkpointing::layer}) {
      tl::TrainerOptions other = options;
      other.checkpointing = how;
      CHECK(two_steps<golden_tied>(other) == expected);
    }
  }
}

TEST_CASE_TEMPLATE("trainer: micro-batches and chunks of logits sum up to the batch", C, golden_gqa, golden_tied) {
  tl::TrainerOptions options = as_golden(tl::Precision::f32);
  const auto expected = two_steps<C>(options);
  options.micro_rows = 1;
  CHECK(relative_error(two_steps<C>(options), expected) < 1e-6);
  options.logits_rows = 7;
  CHECK(relative_error(two_steps<C>(options), expected) < 1e-6);
}

TEST_CASE("trainer: samples packed into one row do not see each other") {
  const Golden<golden_gqa> g;
  tl::Cpu dev({.threads = 2, .kernels = nullptr});
  tl::Trainer<golden_gqa> t(dev, g.file, as_golden(tl::Precision::f32));
  const auto apart = copy(t.losses(g.inputs, g.targets));
  const std::vector<tl::Sequence> whole{{0, T, 0, nullptr}, {T, 20, 0, nullptr}, {T + 20, 28, 0, nullptr}};
  const auto packed = copy(t.losses(g.inputs, g.targets, whole));
  for (std::size_t i = 0; i < packed.size(); ++i) {
    if (i < T + 20) REQUIRE(packed[i] == apart[i]);
  }
  // The last 28 stand as if they were alone, from position 0.
  const std::span<const std::int32_t> inputs(g.inputs), targets(g.targets);
  const std::vector<tl::Sequence> alone{{0, 28, 0, nullptr}};
  const auto last = copy(t.losses(inputs.last(28), targets.last(28), alone));
  for (std::size_t i = 0; i < last.size(); ++i) REQUIRE(packed[T + 20 + i] == last[i]);
  CHECK(std::vector<float>(apart.end() - 28, apart.end()) != last);
}

TEST_CASE("trainer: decay of gains is an option, and clipping scales the gradient") {
  const Golden<golden_gqa> g;
  tl::Cpu dev({.threads = 2, .kernels = nullptr});
  const auto behind = [&](tl::TrainerOptions o) {
    tl::Trainer<golden_gqa> t(dev, g.file, o);
    t.step(g.inputs, g.targets);
    return std::pair{copy(t.weights()), copy(t.first_moment())};
  };
  tl::TrainerOptions options = as_golden(tl::Precision::f32);
  options.peak_lr = 0.1f;
  const std::pair clipped = behind(options);
  const std::vector<float>& spared = clipped.first;
  options.decay = tl::WeightDecay::all;
  const auto decayed = behind(options).first;
  tl::Trainer<golden_gqa> before(dev, g.file, options);
  std::size_t at = 0;
  tl::for_each_parameter(golden_gqa{}, [&](const tl::Parameter& p) {
    for (tl::index_t i = 0; i < p.size(); ++i, ++at) {
      const double difference = p.role == tl::Role::gain ? 0.1 * 0.1 * before.weights()[at] : 0.0;
      if (std::fabs(static_cast<double>(spared[at]) - decayed[at] - difference) > 1e-6) FAIL("at " << p.hf_name());
    }
  });
  options.clip = 0;
  const auto free = behind(options).second;
  const double ratio = g.reference.values<float>("grad_norm")[0];  // the clip is 1
  std::vector<float> scaled = clipped.second;
  for (float& m : scaled) m *= static_cast<float>(ratio);
  CHECK(relative_error(scaled, free) < 1e-5);
}

TEST_CASE("trainer: adapters' gradients are the matrix's, multiplied out") {
  const Golden<golden_gqa> g;
  tl::Cpu dev({.threads = 2, .kernels = nullptr});
  tl::TrainerOptions options = as_golden(tl::Precision::f32);
  options.lora = tl::LoraOptions{.rank = 3, .alpha = 5, .slots = tl::AdapterSlots::every(), .seed = 4};
  tl::Trainer<golden_gqa> adapted(dev, g.file, options);
  for (std::size_t i = 0; i < adapted.adapters().size(); ++i)  // B is 0 at the beginning
    adapted.adapters()[i] += 0.05f * static_cast<float>(std::sin(static_cast<double>(i)));
  // The same model with the adapters merged, all of it learned.
  tl::TrainerOptions full = options;
  full.lora.reset();
  tl::Trainer<golden_gqa> merged(dev, g.file, full);
  tl::merge_adapters(dev, golden_gqa{}, *options.lora, merged.weights(), adapted.adapters());
  const std::vector<float> base = copy(adapted.weights());
  adapted.begin_step(), merged.begin_step();
  adapted.accumulate(g.inputs, g.targets, 1.0f / 90);
  merged.accumulate(g.inputs, g.targets, 1.0f / 90);
  CHECK(relative_error(copy(adapted.losses(g.inputs, g.targets)), copy(merged.losses(g.inputs, g.targets))) < 1e-6);
  std::map<std::pair<int, tl::Slot>, const float*> dense;
  const float* at = merged.gradients().data();
  tl::for_each_parameter(golden_gqa{}, [&](const tl::Parameter& p) { dense[{p.layer, p.slot}] = at, at += p.size(); });
  const double scale = options.lora->scale();
  tl::for_each_adapter(golden_gqa{}, *options.lora, [&](const tl::Adapter& a) {
    const float *w = dense.at({a.target.layer, a.target.slot}), *A = adapted.adapters().data() + a.a, *B = adapted.adapters().data() + a.b;
    const tl::index_t N = a.target.rows, K = a.target.columns, r = a.rank;
    std::vector<float> dA(static_cast<std::size_t>(r * K)), dB(static_cast<std::size_t>(N * r));
    for (tl::index_t j = 0; j < r; ++j) {
      for (tl::index_t k = 0; k < K; ++k) {
        double sum = 0;
        for (tl::index_t n = 0; n < N; ++n) sum += static_cast<double>(B[n * r + j]) * w[n * K + k];
        dA[static_cast<std::size_t>(j * K + k)] = static_cast<float>(scale * sum);
      }
      for (tl::index_t n = 0; n < N; ++n) {
        double sum = 0;
        for (tl::index_t k = 0; k < K; ++k) sum += static_cast<double>(A[j * K + k]) * w[n * K + k];
        dB[static_cast<std::size_t>(n * r + j)] = static_cast<float>(scale * sum);
      }
    }
    CAPTURE(a.target.hf_name());
    const std::span<const float> found(adapted.gradients());
    CHECK(relative_error(found.subspan(static_cast<std::size_t>(a.a), dA.size()), dA) < 1e-5);
    CHECK(relative_error(found.subspan(static_cast<std::size_t>(a.b), dB.size()), dB) < 1e-5);
  });
  adapted.end_step(90);
  CHECK(copy(adapted.weights()) == base);  // only the adapters learn
}

TEST_CASE("trainer: dropout of adapters drops its share, alike forward and backward, and not in evaluation") {
  tl::Cpu dev({.threads = 2, .kernels = nullptr});
  std::vector<float> x(64 * 100, 1.0f), y(x.size()), z(x.size());
  const tl::View<float, tl::dyn, tl::dyn> in(x.data(), {64, 100}), out(y.data(), {64, 100}), again(z.data(), {64, 100});
  tl::dropout(dev, out, in, 0.25f, 7);
  tl::dropout(dev, again, in, 0.25f, 7);
  CHECK(y == z);
  tl::dropout(dev, again, in, 0.25f, 8);
  CHECK(y != z);
  const auto dropped = std::count(y.begin(), y.end(), 0.0f);
  CHECK(dropped > 1400);  // of 6400 a quarter, 1600, give or take 6 times its deviation of 35
  CHECK(dropped < 1810);
  CHECK(std::count(y.begin(), y.end(), 1.0f / 0.75f) == 6400 - dropped);

  const Golden<golden_gqa> g;
  tl::TrainerOptions options = as_golden(tl::Precision::f32);
  options.lora = tl::LoraOptions{.rank = 4, .dropout = 0.5f};
  tl::Trainer<golden_gqa> a(dev, g.file, options), b(dev, g.file, options);
  for (int i = 0; i < 3; ++i) CHECK(a.step(g.inputs, g.targets) == b.step(g.inputs, g.targets));
  CHECK(copy(a.losses(g.inputs, g.targets)) == copy(b.losses(g.inputs, g.targets)));
  options.lora->dropout = 0;
  tl::Trainer<golden_gqa> sure(dev, g.file, options);
  std::copy(a.adapters().begin(), a.adapters().end(), sure.adapters().begin());
  CHECK(copy(a.losses(g.inputs, g.targets)) == copy(sure.losses(g.inputs, g.targets)));
}

TEST_CASE("trainer: its model generates what a model of the same weights does") {
  const Golden<golden_gqa> g;
  tl::Cpu dev({.threads = 2, .kernels = nullptr});
  tl::Trainer<golden_gqa> t(dev, g.file, as_golden(tl::Precision::f32));
  const auto model = t.model(std::nullopt, exact());
  auto session = model.start();
  const auto expected = g.reference.ids("greedy");
  CHECK(greedy(session, std::span<const std::int32_t>(g.inputs).first(8), static_cast<int>(expected.size())) == expected);
}

TEST_CASE("trainer: a gradient that is not finite leaves everything as it was") {
  const Golden<golden_gqa> g;
  tl::Cpu dev({.threads = 2, .kernels = nullptr});
  tl::Trainer<golden_gqa> t(dev, g.file, as_golden(tl::Precision::f32));
  t.weights()[5] = std::numeric_limits<float>::infinity();
  const auto before = copy(t.weights());
  std::vector<std::int32_t> inputs = g.inputs;
  inputs[0] = 0;
  t.step(inputs, g.targets);
  CHECK(t.report().skipped);
  CHECK(copy(t.weights()) == before);
}

TEST_CASE("trainer: bad input") {
  const Golden<golden_gqa> g;
  tl::Cpu dev({.threads = 2, .kernels = nullptr});
  tl::Trainer<golden_gqa> t(dev, g.file, as_golden(tl::Precision::f32));
  auto inputs = g.inputs, targets = g.targets;
  targets[3] = 512;
  CHECK_THROWS_WITH_AS(t.step(inputs, targets), "trainer: target at 3: expected an id below 512, found 512", tl::Error);
  inputs[4] = -1;
  CHECK_THROWS_WITH_AS(t.step(inputs, g.targets), "trainer: input at 4: expected an id below 512, found -1", tl::Error);
  targets.assign(targets.size(), -100);
  CHECK_THROWS_WITH_AS(t.step(g.inputs, targets), "trainer: targets: expected at least one that counts, found only such as do not", tl::Error);
  targets.pop_back();
  CHECK_THROWS_WITH_AS(t.step(g.inputs, targets), "trainer: targets: expected 96, as inputs, found 95", tl::Error);
  CHECK_THROWS_AS(t.step({}, {}), tl::Error);
  CHECK_THROWS_WITH_AS(t.step(std::span<const std::int32_t>(g.inputs).first(50), std::span<const std::int32_t>(g.targets).first(50)),
                       "trainer: inputs: expected rows of 48 tokens, found 50", tl::Error);
  CHECK_THROWS_AS((tl::Trainer<golden_tied>(dev, g.file)), tl::Error);
  CHECK_THROWS_AS((tl::Trainer<golden_gqa>(dev, tl::TrainerOptions{.beta2 = 1.0f})), tl::Error);
  // The first good step after all of these is that of the reference.
  CHECK(std::fabs(t.step(g.inputs, g.targets) / g.reference.values<float>("step_losses")[0] - 1) < 1e-6);
}

TEST_CASE("trainer: initial weights are the paper's") {
  tl::Cpu dev({.threads = 2, .kernels = nullptr});
  tl::Trainer<tl::stories_15m> t(dev, {.seed = 9});
  const float* at = t.weights().data();
  tl::for_each_parameter(tl::stories_15m{}, [&](const tl::Parameter& p) {
    double sum = 0, squares = 0;
    for (tl::index_t i = 0; i < p.size(); ++i) sum += at[i], squares += static_cast<double>(at[i]) * at[i];
    const double n = static_cast<double>(p.size()), mean = sum / n, deviation = std::sqrt(squares / n - mean * mean);
    CAPTURE(p.hf_name());
    if (p.role == tl::Role::gain) {
      CHECK(mean == 1.0);
    } else {
      const double expected = p.slot == tl::Slot::o || p.slot == tl::Slot::down ? 1 / (std::sqrt(288.0) * 6) : std::sqrt(2.0 / (5 * 288.0));
      CHECK(std::fabs(mean) < 5 * expected / std::sqrt(n));
      CHECK(std::fabs(deviation / expected - 1) < 5 / std::sqrt(2 * n));
    }
    at += p.size();
  });
  CHECK(copy(t.weights()) == copy(tl::Trainer<tl::stories_15m>(dev, {.seed = 9}).weights()));
  CHECK(copy(t.weights()) != copy(tl::Trainer<tl::stories_15m>(dev, {.seed = 10}).weights()));
}

TEST_CASE("training plan: what a trainer takes") {
  const Golden<golden_gqa> g;
  tl::Cpu dev({.threads = 2, .kernels = nullptr});
  for (const tl::Checkpointing how : {tl::Checkpointing::none, tl::Checkpointing::selective, tl::Checkpointing::layer}) {
    tl::TrainerOptions options = as_golden(tl::Precision::bf16);
    options.checkpointing = how;
    tl::Trainer<golden_gqa> t(dev, g.file, options);
    t.step(g.inputs, g.targets);
    const auto plan = tl::training_plan<golden_gqa>({.batch = 2, .tokens = T, .checkpointing = how, .precision = tl::Precision::bf16, .logits_rows = 40, .threads = 2});
    CHECK(t.bytes() == plan.total() - plan.scratch);
  }
  constexpr auto none = tl::training_plan<tl::tinyllama_1b>({.checkpointing = tl::Checkpointing::none});
  constexpr auto layer = tl::training_plan<tl::tinyllama_1b>({.checkpointing = tl::Checkpointing::layer});
  static_assert(none.weights == std::size_t{4} * 1'100'048'384 && none.moments == 2 * none.weights);
  static_assert(layer.activations * 4 < none.activations);
}
