// A trainer whose moments are bf16 or 8 bits: it learns what f32 learns, has the plan's memory, and nothing but the format changes a bit: threads, restarts, checkpoints.
#include <doctest/doctest.h>

#include <random>

#include "tests/model/golden.hpp"
#include "tests/support.hpp"
#include "tinyllama/train/run.hpp"
#include "tinyllama/train/sharded_checkpoint.hpp"

namespace {

using namespace tinyllama;
using namespace tinyllama::test;

constexpr index_t T = 48;
constexpr Moments rounded[] = {Moments::bf16, Moments::int8};

// No part of it is a multiple of a block, and gains end inside of blocks.
struct small : llama_defaults {
  static constexpr int layers = 2, hidden = 40, heads = 4, kv_heads = 2, ffn = 56, vocab = 30, context = T;
};

std::vector<std::int32_t> ids(std::uint32_t seed, index_t n = 4 * T) {
  std::mt19937 random(seed);
  std::vector<std::int32_t> all(static_cast<std::size_t>(n));
  for (auto& id : all) id = static_cast<std::int32_t>(random() % small::vocab);
  return all;
}
TrainerOptions how(Moments moments) { return {.peak_lr = 3e-3f, .precision = Precision::f32, .moments = moments, .tokens = T, .seed = 5}; }

struct State {
  std::vector<float> weights, first, second;
  bool operator==(const State&) const = default;
};
State state_of(Trainer<small>& t) { return {t.whole(t.weights()), t.whole(t.first_moment()), t.whole(t.second_moment())}; }

State behind(int steps, Moments moments, int threads) {
  Cpu dev({.threads = threads, .kernels = nullptr});
  Trainer<small> t(dev, how(moments));
  for (int i = 0; i < steps; ++i) t.step(ids(static_cast<std::uint32_t>(i)), ids(static_cast<std::uint32_t>(i + 1)));
  return state_of(t);
}

}  // namespace

TEST_CASE_TEMPLATE("moments: twenty steps learn what f32's do", C, golden_gqa, golden_tied) {
  const Reference reference{golden_folder<C>()};
  const Checkpoint file = open_checkpoint(golden_folder<C>());
  const auto inputs = reference.ids("input_ids"), targets = reference.ids("targets");
  Cpu dev({.threads = 2, .kernels = nullptr});
  const auto learn = [&](Moments moments) {
    Trainer<C> t(dev, file, {.peak_lr = 1e-3f, .precision = Precision::f32, .moments = moments, .tokens = T});
    const std::vector<float> before(t.weights().begin(), t.weights().end());
    std::vector<float> losses, moved;
    for (int i = 0; i < 20; ++i) losses.push_back(t.step(inputs, targets));
    for (std::size_t i = 0; i < before.size(); ++i) moved.push_back(t.weights()[i] - before[i]);
    return std::pair{losses, moved};
  };
  const auto [losses, moved] = learn(Moments::f32);
  for (const Moments moments : rounded) {
    CAPTURE(std::string(name(moments)));
    const auto [found, found_moved] = learn(moments);
    // A rounded number is 0.4 steps of its code off in the mean: m by 0.2% and 4%, the root of v by half of that.
    MESSAGE(name(moments) << ": loss " << found.back() << " of " << losses.back() << ", path " << relative_error(found_moved, moved));
    CHECK(relative_error(found, losses) < (moments == Moments::bf16 ? 2e-4 : 2e-3));
    CHECK(relative_error(found_moved, moved) < (moments == Moments::bf16 ? 5e-3 : 7e-2));
    CHECK(relative_error(found_moved, moved) > (moments == Moments::bf16 ? 1e-4 : 1e-3));  // it did round
  }
}

TEST_CASE("moments: the same bits for any number of threads") {
  for (const Moments moments : rounded) {
    const State expected = behind(3, moments, 1);
    CHECK(behind(3, moments, 2) == expected);
    CHECK(behind(3, moments, 5) == expected);
  }
}

// The first step's m and v reach the weights before they are rounded; gains do not decay, in whichever block they end.
TEST_CASE("moments: the first step is that of f32") {
  const auto weights = [](Moments moments, WeightDecay decay) {
    TrainerOptions options = how(moments);
    options.weight_decay = 10, options.decay = decay;
    Cpu dev({.threads = 2, .kernels = nullptr});
    Trainer<small> t(dev, options);
    t.step(ids(1), ids(2));
    return std::vector<float>(t.weights().begin(), t.weights().end());
  };
  for (const Moments moments : rounded)
    for (const WeightDecay decay : {WeightDecay::matrices, WeightDecay::all}) CHECK(relative_error(weights(moments, decay), weights(Moments::f32, decay)) < 1e-7);
}

TEST_CASE("moments: memory as planned, a half and a quarter of f32's") {
  Cpu dev({.threads = 1, .kernels = nullptr});
  for (const MomentFormat& f : moment_formats) {
    Trainer<small> t(dev, how(f.moments));
    t.step(ids(1), ids(2));
    const auto plan = training_plan<small>({.batch = 4, .tokens = T, .precision = Precision::f32, .moments = f.moments});
    CHECK(t.bytes() == plan.total() - plan.scratch);
  }
  constexpr auto f32 = training_plan<tinyllama_1b>(), bf16 = training_plan<tinyllama_1b>({.moments = Moments::bf16}), int8 = training_plan<tinyllama_1b>({.moments = Moments::int8});
  static_assert(f32.moments == std::size_t{8} * 1'100'048'384);
  static_assert(bf16.moments == f32.moments / 2);
  static_assert(int8.moments - (f32.moments / 4 + f32.moments / 256) < 128);  // and a scale for 256, in whole lines
  static_assert(int8.weights == f32.weights && int8.gradients == f32.gradients && int8.activations == f32.activations);
}

TEST_CASE("moments: a checkpoint gives them back bit by bit, and goes on so") {
  for (const MomentFormat& f : moment_formats) {
    CAPTURE(std::string(f.name));
    const TempFolder tmp;
    Cpu dev({.threads = 1, .kernels = nullptr});
    Trainer<small> t(dev, how(f.moments));
    for (std::uint32_t i = 0; i < 3; ++i) t.step(ids(i), ids(i + 1));
    const State expected = state_of(t);
    const auto first = t.host(t.first_moment()), second = t.host(t.second_moment());
    const std::vector<NamedArray> arrays{{"first_moment", first.values}, {"second_moment", second.values}};
    const auto folder = save_checkpoint(tmp.path(), 3, describe<small>(), t.weights(), arrays, "{}");
    Trainer<small> u(dev, how(f.moments));
    load_sharded_checkpoint(folder, u);
    CHECK(state_of(u) == expected);
    for (std::uint32_t i = 3; i < 5; ++i) t.step(ids(i), ids(i + 1)), u.step(ids(i), ids(i + 1));
    CHECK(state_of(u) == state_of(t));

    // In another format: rounded to the nearest.
    for (const MomentFormat& other : moment_formats) {
      Trainer<small> w(dev, how(other.moments));
      load_sharded_checkpoint(folder, w);
      const State found = state_of(w);
      CHECK(found.weights == expected.weights);
      const double bound = other.moments == Moments::int8 ? 0.05 : other.moments == Moments::bf16 ? 0.003 : 0;
      CHECK(relative_error(found.first, expected.first) <= bound);
      CHECK(relative_error(found.second, expected.second) <= bound);
    }
  }
}

TEST_CASE("moments: a run goes on bit by bit, and refuses one of another format") {
  const TempFolder tmp;
  PackedWriter writer(tmp / "data", "train", small::vocab, {.block = T + 1});
  writer.add(ids(9, 12 * (T + 1)));
  writer.finish();
  const auto run = [&](const char* out, Moments moments, std::int64_t until) {
    Cpu dev({.threads = 1, .kernels = nullptr});
    const DataLoader data(DataSource{packed_files(tmp / "data", "train")}, 2, {.tokens = T, .vocab = small::vocab});
    Trainer<small> t(dev, how(moments));
    TrainingRun<small> r(t, data, nullptr, {.folder = tmp / out, .steps = 6});
    r.resume();
    while (r.steps() < until) r.step();
    r.save();
    return state_of(t);
  };
  for (const Moments moments : rounded) {
    const std::string out(name(moments));
    const State expected = run((out + "-whole").c_str(), moments, 6);
    run(out.c_str(), moments, 2), run(out.c_str(), moments, 3);
    CHECK(run(out.c_str(), moments, 6) == expected);
  }
  try {
    run("bf16", Moments::int8, 6);
    FAIL("another format was taken");
  } catch (const Error& e) {
    CHECK(std::string(e.subject()) == "moments");
    CHECK(std::string(e.expected()) == "int8, as this run has them");
    CHECK(std::string(e.found()) == "bf16");
  }
}

TEST_CASE("moments: as they lie only in f32, and only formats of the list") {
  Cpu dev({.threads = 1, .kernels = nullptr});
  Trainer<small> t(dev, how(Moments::int8));
  CHECK_THROWS_WITH_AS([&] { const std::span<float> s = t.second_moment(); return s.size(); }(), "trainer: second moment: expected f32, to be read as it lies, found int8", Error);
  CHECK_THROWS_WITH_AS(t.put(t.first_moment(), std::vector<float>(3)), doctest::Contains("values: expected "), Error);
  CHECK_THROWS_WITH_AS(Trainer<small>(dev, how(static_cast<Moments>(7))), "trainer: moments: expected f32, bf16 or int8, found 7", Error);
}
