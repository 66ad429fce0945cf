// Parallel: any number of ranks, however the rows fall to them and whatever they shard, learn what one process learns; and a rank has the memory of the plan.
#include "tinyllama/distributed/parallel.hpp"

#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <random>

#include "tests/distributed/rows.hpp"
#include "tests/distributed/thread_ranks.hpp"
#include "tests/support.hpp"
#include "tinyllama/train/dpo.hpp"
#include "tinyllama/train/trainer.hpp"

namespace {

using namespace tinyllama;
using namespace tinyllama::test;

struct small : llama_defaults {
  static constexpr int layers = 3, hidden = 48, heads = 4, kv_heads = 2, ffn = 80, vocab = 100, context = 16;
};
struct small_tied : small {
  static constexpr bool tied = true;
};
constexpr index_t T = 12;
static_assert(Communicator<Single<Cpu>>);

using Batch = Rows<small, T>;
TrainerOptions how() { return {.peak_lr = 3e-3f, .clip = 0.5f, .precision = Precision::f32, .tokens = T, .micro_rows = 1, .logits_rows = 7, .seed = 5}; }

/// What is to be the same.
struct Outcome {
  std::vector<float> losses, norms, gradients, weights, moment;  // the gradients of the last step, and what it left
  float evaluation = 0;
};

template <class C>
Outcome learn(Trainer<C>& t, const Batch& batch, int rank, int ranks, int steps) {
  const auto [inputs, targets] = batch.share(rank, ranks);
  Outcome o;
  for (int i = 0; i < steps; ++i) {
    o.losses.push_back(t.step(inputs, targets));
    o.norms.push_back(t.report().gradient_norm);
    if (i == 1) o.evaluation = t.evaluate(inputs, targets);  // between two steps
  }
  o.gradients = t.whole_gradients();
  if (t.options().lora) o.weights = t.whole(t.adapters());
  else o.weights = t.whole(t.weights());
  o.moment = t.whole(t.second_moment());
  return o;
}

template <class C>
Outcome alone(const Batch& batch, const TrainerOptions& options, int steps = 6) {
  Cpu dev({.threads = 1, .kernels = nullptr});
  Trainer<C> t(dev, options);
  return learn(t, batch, 0, 1, steps);
}

double difference(const std::vector<float>& a, const std::vector<float>& b) {
  REQUIRE(a.size() == b.size());
  double squares = 0, size = 0;
  for (std::size_t i = 0; i < a.size(); ++i) squares += std::pow(static_cast<double>(a[i]) - b[i], 2), size += std::pow(static_cast<double>(b[i]), 2);
  return std::sqrt(squares / size);
}

/// All ranks' outcomes against that of one: sums of 24-bit numbers in another order, over six steps.
void check_same(const std::vector<Outcome>& found, const Outcome& expected) {
  for (const Outcome& o : found) {
    CHECK(difference(o.losses, expected.losses) < 1e-6);
    CHECK(difference(o.norms, expected.norms) < 1e-5);
    CHECK(std::fabs(o.evaluation / expected.evaluation - 1) < 1e-6);
    CHECK(difference(o.gradients, expected.gradients) < 1e-5);
    CHECK(difference(o.moment, expected.moment) < 1e-5);
    CHECK(difference(o.weights, expected.weights) < 2e-5);
    CHECK(o.weights == found.front().weights);  // the ranks among each other: the same bits
  }
}

template <class C>
std::vector<Outcome> together(const Batch& batch, const TrainerOptions& options, int ranks, Sharding sharding, std::size_t bucket_bytes = 20000, int steps = 6) {
  std::vector<Outcome> all(static_cast<std::size_t>(ranks));
  on_ranks(ranks, [&](ThreadRank& m) {
    Cpu dev({.threads = 1, .kernels = nullptr});
    Parallel<Cpu, ThreadRank> peers(m, {.sharding = sharding, .bucket_bytes = bucket_bytes});
    Trainer<C> t(dev, options, {}, &peers);
    all[static_cast<std::size_t>(m.rank())] = learn(t, batch, m.rank(), ranks, steps);
  });
  return all;
}

constexpr Sharding shardings[] = {Sharding::ddp, Sharding::zero1, Sharding::fsdp};

}  // namespace

TEST_CASE_TEMPLATE("parallel: losses, norms, gradients, weights and moments of 1 to 5 ranks are those of one process", C, small, small_tied) {
  const Batch batch(7);  // comes out even for no number of ranks
  const Outcome expected = alone<C>(batch, how());
  for (const Sharding s : shardings)
    for (const int ranks : {1, 2, 3, 5}) {
      CAPTURE(static_cast<int>(s));
      CAPTURE(ranks);
      check_same(together<C>(batch, how(), ranks, s), expected);
    }
}

namespace {
/// Sums that travel in bf16, one after the other, as Nccl does it.
class NarrowRank : public ThreadRank {
 public:
  using ThreadRank::ThreadRank, ThreadRank::start_all_reduce, ThreadRank::start_reduce_scatter;
  explicit NarrowRank(const ThreadRank& rank) : ThreadRank(rank) {}
  Request start_all_reduce(float* out, index_t n, const Wire& wire, std::string_view what) {
    auto* const room = narrow(wire, out, n);
    Request r = start_all_reduce(room, n, wire.format, Reduction::sum, what);
    wait(r);
    widen(room, n, out);
    return {};
  }
  Request start_reduce_scatter(float* out, const float* in, const Shards& s, const Wire& wire, std::string_view what) {
    const bf16* const room = narrow(wire, in, s.n);
    std::vector<bf16> sum(static_cast<std::size_t>(s.of(rank()).size()));
    Request r = start_reduce_scatter(sum.data(), room, s, wire.format, Reduction::sum, what);
    wait(r);
    widen(sum.data(), static_cast<index_t>(sum.size()), out);
    return {};
  }

 private:
  static void widen(const bf16* x, index_t n, float* out) {
    std::transform(x, x + n, out, [](bf16 value) { return static_cast<float>(value); });
  }
  static bf16* narrow(const Wire& wire, const float* x, index_t n) {
    auto* const room = static_cast<bf16*>(wire.room);
    std::transform(x, x + n, room, [](float value) { return bf16(value); });
    return room;
  }
};
static_assert(Communicator<NarrowRank>);
}  // namespace

TEST_CASE_TEMPLATE("parallel: gradients in bf16 on the wire", C, small, small_tied) {
  const Batch batch(7);
  const Outcome first = alone<C>(batch, how(), 1), expected = alone<C>(batch, how());
  for (const Sharding s : shardings)
    for (const int ranks : {1, 2, 3}) {
      CAPTURE(static_cast<int>(s)); CAPTURE(ranks);
      std::size_t bytes[2] = {}, sent[2] = {};
      const auto run = [&](Format wire, int steps) {
        std::vector<Outcome> all(static_cast<std::size_t>(ranks));
        on_ranks(ranks, [&](ThreadRank& thread) {
          Cpu dev({.threads = 1, .kernels = nullptr});
          NarrowRank m(thread);
          Parallel<Cpu, NarrowRank> peers(m, {.sharding = s, .bucket_bytes = 20000, .wire = wire});
          Trainer<C> t(dev, how(), {}, &peers);
          all[static_cast<std::size_t>(m.rank())] = learn(t, batch, m.rank(), ranks, steps);
          if (m.rank() == 0) bytes[wire == Format::f32] = t.bytes(), sent[wire == Format::f32] = m.sent();
        });
        return all;
      };
      // Each rank's gradient and each sum of two is rounded, by 2^-9 at most; those of later steps belong to other weights.
      for (const Outcome& o : run(Format::bf16, 1)) {
        const double error = difference(o.gradients, first.gradients);
        CHECK(error < 4e-3);
        CHECK(error > 5e-4);
      }
      const std::vector<Outcome> all = run(Format::bf16, 6);
      for (const Outcome& o : all) {
        CHECK(difference(o.losses, expected.losses) < 1e-3);
        CHECK(o.weights == all.front().weights);
      }
      check_same(run(Format::f32, 6), expected);
      CHECK(bytes[0] - bytes[1] == wire_bytes(Format::bf16, s, partition_sizes(C{}, ranks).largest_part, 20000));
      CHECK(sent[0] < sent[1]);
    }
}

namespace {
// As in tests/train/parity_test.cpp: English text, a small model, 50 steps of its schedule.
struct parity_config : llama_defaults {
  static constexpr int layers = 4, hidden = 128, heads = 4, kv_heads = 2, ffn = 352, vocab = 512, context = 64;
};
std::vector<float> losses_of_50_steps(int ranks, Format wire) {
  constexpr std::size_t rows = 8, tokens = 64;
  const MappedFile file(fixture("train/tokens.u16"));
  std::vector<std::uint16_t> ids(file.bytes().size() / 2);
  std::memcpy(ids.data(), file.bytes().data(), ids.size() * 2);
  std::vector<float> losses;
  on_ranks(ranks, [&](ThreadRank& thread) {
    Cpu dev({.threads = 1, .kernels = nullptr});
    NarrowRank m(thread);
    Parallel<Cpu, NarrowRank> peers(m, {.sharding = Sharding::zero1, .wire = wire});
    const StagedSchedule schedule{Schedule{.decay = Decay::cosine, .peak = 1e-3, .minimum = 1e-4, .warmup = 20, .steps = 200}};
    Trainer<parity_config> t(dev, {.schedule = schedule, .precision = Precision::f32, .tokens = tokens, .seed = 1}, {}, &peers);
    const std::size_t mine = rows / static_cast<std::size_t>(ranks);
    std::vector<std::int32_t> inputs, targets;
    for (std::size_t step = 0; step < 50; ++step) {
      inputs.clear(), targets.clear();
      for (std::size_t r = 0; r < mine; ++r) {
        const std::size_t start = (step * rows + static_cast<std::size_t>(m.rank()) * mine + r) * tokens % (ids.size() - tokens);
        inputs.insert(inputs.end(), ids.begin() + static_cast<std::ptrdiff_t>(start), ids.begin() + static_cast<std::ptrdiff_t>(start + tokens));
        targets.insert(targets.end(), ids.begin() + static_cast<std::ptrdiff_t>(start) + 1, ids.begin() + static_cast<std::ptrdiff_t>(start + tokens) + 1);
      }
      const float loss = t.step(inputs, targets);
      if (m.rank() == 0) losses.push_back(loss);
    }
  });
  return losses;
}
}  // namespace

TEST_CASE("parallel: 50 steps with gradients in bf16 on the wire lose what they lose in f32") {
  const std::vector<float> expected = losses_of_50_steps(1, Format::f32);
  for (const int ranks : {2, 4}) {
    const std::vector<float> f32 = losses_of_50_steps(ranks, Format::f32), bf16 = losses_of_50_steps(ranks, Format::bf16);
    const auto worst = [&](const std::vector<float>& a) {
      double most = 0;
      for (std::size_t i = 0; i < a.size(); ++i) most = std::max(most, std::fabs(static_cast<double>(a[i]) / expected[i] - 1));
      return most;
    };
    MESSAGE(ranks << " ranks: the worst step of 50 differs by " << worst(f32) << ", in bf16 by " << worst(bf16) << "; the last loss is " << expected.back() << ", " << f32.back() << ", " << bf16.back());
    CHECK(worst(f32) < 1e-5);
    CHECK(worst(bf16) < 5e-5);
    CHECK(worst(bf16) > 1e-7);
  }
}

TEST_CASE("parallel: a wire in bf16 over a communicator that does not narrow is an Error, and so is one of a format that is none") {
  const auto make = [](Format wire) {
    on_ranks(2, [&](ThreadRank& m) { Parallel<Cpu, ThreadRank>(m, {.wire = wire}); });
  };
  CHECK_THROWS_WITH_AS(make(Format::bf16), doctest::Contains("wire"), Error);
  CHECK_THROWS_WITH_AS(make(Format::q8_0), doctest::Contains("f32 or bf16"), Error);
  make(Format::f32);
}

TEST_CASE("parallel: more ranks than rows, one micro-batch, and buckets of all sizes") {
  const Batch batch(3);
  TrainerOptions options = how();
  const Outcome expected = alone<small>(batch, options);
  for (const Sharding s : shardings) check_same(together<small>(batch, options, 5, s), expected);
  options.micro_rows = 0;
  for (const Sharding s : shardings) check_same(together<small>(batch, options, 2, s), expected);
  for (const std::size_t bytes : {std::size_t{1}, std::size_t{1} << 30}) check_same(together<small>(batch, options, 2, Sharding::ddp, bytes), expected);
}

// Without clipping, whose norm is summed in another order, and with one pass a step nothing is left that may differ.
TEST_CASE("parallel: moments in fewer bits are rounded alike, whoever has which shard") {
  const Batch batch(6);
  for (const MomentFormat& f : moment_formats) {
    CAPTURE(std::string(f.name));
    TrainerOptions options = how();
    options.clip = 0, options.micro_rows = 0, options.moments = f.moments;
    for (const int ranks : {2, 3}) {
      const Outcome expected = together<small>(batch, options, ranks, Sharding::ddp).front();
      for (const Sharding s : {Sharding::zero1, Sharding::fsdp}) {
        const Outcome found = together<small>(batch, options, ranks, s).back();
        CHECK(found.weights == expected.weights);
        CHECK(found.moment == expected.moment);
        CHECK(found.losses == expected.losses);
      }
    }
  }
  TrainerOptions options = how();
  options.moments = Moments::int8, options.lora = LoraOptions{.rank = 3, .slots = AdapterSlots::every(), .seed = 2};
  options.clip = 0, options.micro_rows = 0;
  CHECK(together<small>(batch, options, 3, Sharding::zero1).back().weights == together<small>(batch, options, 3, Sharding::ddp).front().weights);
}

TEST_CASE("parallel: adapters too") {
  const Batch batch(4);
  TrainerOptions options = how();
  options.lora = LoraOptions{.rank = 3, .slots = AdapterSlots::every(), .seed = 2};
  const Outcome expected = alone<small>(batch, options);
  for (const Sharding s : {Sharding::ddp, Sharding::zero1}) check_same(together<small>(batch, options, 3, s), expected);
  CHECK_THROWS_WITH_AS(together<small>(batch, options, 2, Sharding::fsdp), "trainer: sharding: expected ddp or zero1 for adapters, found fsdp", Error);
}

TEST_CASE("parallel: without knowing the number of passes the gradients leave at the end; fsdp has to know it") {
  const Batch batch(4);
  const Outcome expected = alone<small>(batch, how(), 1);
  for (const Sharding s : {Sharding::ddp, Sharding::zero1})
    on_ranks(2, [&](ThreadRank& m) {
      Cpu dev({.threads = 1, .kernels = nullptr});
      Parallel<Cpu, ThreadRank> peers(m, {.sharding = s});
      Trainer<small> t(dev, how(), {}, &peers);
      const auto [inputs, targets] = batch.share(m.rank(), 2);
      const std::int64_t count = t.total(std::count_if(targets.begin(), targets.end(), [](std::int32_t x) { return x >= 0; }));
      t.begin_step();
      t.accumulate(inputs, targets, 1.0f / static_cast<float>(count));
      if (!(std::fabs(t.end_step(count) / expected.losses[0] - 1) < 1e-6 && difference(t.whole_gradients(), expected.gradients) < 1e-5)) throw Error("another outcome");
    });
  CHECK_THROWS_WITH_AS(on_ranks(2,
                                [&](ThreadRank& m) {
                                  Cpu dev({.threads = 1, .kernels = nullptr});
                                  Parallel<Cpu, ThreadRank> peers(m, {.sharding = Sharding::fsdp});
                                  Trainer<small> t(dev, how(), {}, &peers);
                                  t.begin_step();
                                  t.accumulate(batch.inputs, batch.targets, 1.0f);
                                }),
                       "trainer: begin_step: expected the number of passes, for fsdp, found none given", Error);
}

TEST_CASE("parallel: accumulation at home sends nothing, but for fsdp") {
  const Batch batch(8);
  const auto sent = [&](Sharding s, index_t micro_rows) {
    std::size_t bytes = 0;
    on_ranks(2, [&](ThreadRank& m) {
      Cpu dev({.threads = 1, .kernels = nullptr});
      Parallel<Cpu, ThreadRank> peers(m, {.sharding = s});
      TrainerOptions options = how();
      options.micro_rows = micro_rows;
      Trainer<small> t(dev, options, {}, &peers);
      const auto [inputs, targets] = batch.share(m.rank(), 2);
      t.step(inputs, targets);
      if (m.rank() == 0) bytes = m.sent();
    });
    return bytes;
  };
  constexpr auto all = static_cast<std::size_t>(parameter_count<small>()) * sizeof(float);
  CHECK(sent(Sharding::ddp, 4) == all);
  CHECK(sent(Sharding::ddp, 1) == all);
  CHECK(sent(Sharding::zero1, 1) == sent(Sharding::zero1, 4));
  // Own shards of the weights forward and, but for head, last block and embedding, backward; and all gradients.
  CHECK(sent(Sharding::fsdp, 4) < 2 * all);
  CHECK(sent(Sharding::fsdp, 1) > 3 * sent(Sharding::fsdp, 4));
}

TEST_CASE("parallel: preferences, whose pairs the ranks share") {
  const Batch batch(6);
  std::vector<PreferencePair> pairs;
  for (std::size_t i = 0; i < 3; ++i) {
    const auto sample = [&](std::size_t row) {
      Sample s;
      s.ids.assign(batch.inputs.begin() + static_cast<std::ptrdiff_t>(row * T), batch.inputs.begin() + static_cast<std::ptrdiff_t>((row + 1) * T));
      s.targets.assign(batch.targets.begin() + 2 * T, batch.targets.begin() + 3 * T);
      return s;
    };
    pairs.push_back({sample(2 * i), sample(2 * i + 1)});  // what is in two pairs would cancel to rounding, whose sign AdamW learns
  }
  const auto run = [&](Peers<Cpu>* peers) {
    Cpu dev({.threads = 1, .kernels = nullptr});
    Trainer<small> t(dev, how(), {}, peers);
    std::vector<PairLogProbabilities> reference;
    for (const auto& p : pairs) reference.push_back(log_probabilities(t, p));
    std::vector<float> found;
    for (int i = 0; i < 3; ++i) {
      const DpoReport r = dpo_step(t, std::span<const PreferencePair>(pairs), std::span<const PairLogProbabilities>(reference), 0.5f);
      found.insert(found.end(), {r.loss, r.margin, r.accuracy, t.report().gradient_norm});
    }
    return found;
  };
  const auto expected = run(nullptr);
  for (const Sharding s : {Sharding::ddp, Sharding::zero1})
    for (const int ranks : {2, 5})
      on_ranks(ranks, [&](ThreadRank& m) {
        Parallel<Cpu, ThreadRank> peers(m, {.sharding = s});
        if (!(difference(run(&peers), expected) < 1e-5)) throw Error("another outcome");
      });
}

TEST_CASE_TEMPLATE("parallel: a rank's bytes are those of the plan, and fall with the number of ranks", C, small, small_tied) {
  const Batch batch(4);
  for (const Sharding s : shardings) {
    std::size_t before = static_cast<std::size_t>(-1);
    for (const int ranks : {1, 2, 4}) {
      const auto planned = [&](Moments moments) {
        const TrainingPlan plan = training_plan(C{}, {.batch = 1, .tokens = T, .precision = Precision::f32, .moments = moments, .logits_rows = 7, .sharding = s, .ranks = ranks});
        on_ranks(ranks, [&](ThreadRank& m) {
          Cpu dev({.threads = 1, .kernels = nullptr});
          Parallel<Cpu, ThreadRank> peers(m, {.sharding = s});
          TrainerOptions options = how();
          options.moments = moments;
          Trainer<C> t(dev, options, {}, &peers);
          const auto [inputs, targets] = batch.share(m.rank(), ranks);
          t.step(inputs, targets);
          if (t.bytes() != plan.total() - plan.scratch) throw Error("bytes", "", std::to_string(plan.total() - plan.scratch), std::to_string(t.bytes()));
        });
        return plan;
      };
      planned(Moments::bf16), planned(Moments::int8);
      const TrainingPlan plan = planned(Moments::f32);
      if (s == Sharding::ddp) CHECK((ranks == 1 || plan.total() == before));
      else CHECK(plan.total() < before);
      before = plan.total();
    }
  }
  // The 1.1B model: 16 bytes a weight on one card, 4 + 4 + 12/8 ... on 8.
  constexpr auto one = training_plan<tinyllama_1b>({.sharding = Sharding::ddp, .ranks = 8}), eight = training_plan<tinyllama_1b>({.sharding = Sharding::fsdp, .ranks = 8});
  CHECK(one.weights + one.gradients + one.moments == std::size_t{16} * 1'100'048'384);
  CHECK(eight.weights + eight.gradients + eight.moments == std::size_t{16} * 1'100'048'384 / 8);
}

TEST_CASE("parallel: a gradient that is not finite on one rank is skipped by all") {
  const Batch batch(2);
  for (const Sharding s : shardings)
    on_ranks(2, [&](ThreadRank& m) {
      Cpu dev({.threads = 1, .kernels = nullptr});
      Parallel<Cpu, ThreadRank> peers(m, {.sharding = s});
      Trainer<small> t(dev, how(), {}, &peers);
      const auto [inputs, targets] = batch.share(m.rank(), 2);
      const std::vector<float> before = t.whole(t.weights());
      t.begin_step(1);
      t.accumulate(inputs, targets, m.rank() == 1 ? 1.0f : std::numeric_limits<float>::infinity());
      t.end_step(1);
      if (!t.report().skipped || t.whole(t.weights()) != before) throw Error("not skipped");
    });
}

TEST_CASE("parallel: where nothing counts on any rank, and an id outside the vocabulary on one, are Errors") {
  Batch batch(2);
  batch.inputs[T + 3] = small::vocab;
  CHECK_THROWS_AS(together<small>(batch, how(), 2, Sharding::ddp), Error);
  batch.inputs[T + 3] = 1;
  std::fill(batch.targets.begin(), batch.targets.end(), -100);
  CHECK_THROWS_WITH_AS(together<small>(batch, how(), 2, Sharding::fsdp), doctest::Contains("only such as do not"), Error);
}
