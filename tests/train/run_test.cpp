// TrainingRun: resumed anywhere it goes on bit by bit, it refuses another run's checkpoint by name, and validation is the mean loss and nothing else.
#include "tinyllama/train/run.hpp"

#include <doctest/doctest.h>

#include <memory>
#include <random>

#include "tests/support.hpp"

namespace {

using namespace tinyllama;
using namespace tinyllama::test;

struct tiny : llama_defaults {
  static constexpr int layers = 2, hidden = 32, heads = 2, kv_heads = 1, ffn = 64, vocab = 64, context = 16;
};
constexpr index_t T = 16;

void write_data(const std::filesystem::path& folder, const std::string& prefix, int blocks, std::uint32_t seed) {
  std::mt19937 random(seed);
  PackedWriter writer(folder, prefix, tiny::vocab, {.block = T + 1});
  std::vector<std::int32_t> ids(static_cast<std::size_t>(blocks) * (T + 1));
  for (auto& id : ids) id = static_cast<std::int32_t>(random() % tiny::vocab);
  writer.add(ids);
  writer.finish();
}

/// All that a process holds.
struct Process {
  Cpu dev{{.threads = 1, .kernels = nullptr}};
  DataLoader data, validation;
  Trainer<tiny> trainer;
  TrainingRun<tiny> run;

  static TrainerOptions learning() {
    const Schedule rates{.decay = Decay::wsd_linear, .peak = 1e-3, .minimum = 0, .warmup = 3, .steps = 20, .decay_steps = 5};
    return {.schedule = StagedSchedule{rates}, .tokens = T, .micro_rows = 2};
  }
  Process(const TempFolder& tmp, TrainerOptions o = learning(), std::int64_t rows = 3, std::int64_t steps = 20)
      : data(DataSource{packed_files(tmp / "data", "train")}, rows, {.tokens = T, .seed = o.seed, .vocab = tiny::vocab}),
        validation(DataSource{packed_files(tmp / "data", "validation")}, 1, {.tokens = T}), trainer(dev, o),
        run(trainer, data, &validation, {.folder = tmp / "out", .steps = steps, .save_every = 7, .validate_every = 4}) {}
};

struct Data : TempFolder {
  Data() { write_data(*this / "data", "train", 10, 1), write_data(*this / "data", "validation", 5, 2); }
};

/// Subject, expected and found of what resume() throws.
std::string refusal(Process&& p) {
  try {
    p.run.resume();
  } catch (const Error& e) {
    return e.subject() + ": " + e.expected() + " / " + e.found();
  }
  return "none";
}

}  // namespace

TEST_CASE("run: the losses, and what is due when, are the same whether it is one process or many") {
  const Data whole, parts;
  std::vector<float> expected;
  std::vector<double> validated;
  std::string due;
  Process one(whole);
  CHECK(!one.run.resume());
  while (!one.run.done()) {
    expected.push_back(one.run.step().loss);
    if (one.run.validation_due()) due += " v" + std::to_string(one.run.steps()), validated.push_back(one.run.validate());
    if (one.run.save_due()) due += " s" + std::to_string(one.run.steps()), one.run.save();
  }
  CHECK(due == " v4 s7 v8 v12 s14 v16 v20 s20");
  CHECK(one.run.tokens() == 20 * 3 * T);

  std::size_t at = 0, validations = 0;
  for (int processes = 0; at < 20; ++processes) {
    REQUIRE(processes < 20);
    Process p(parts);
    CHECK(p.run.resume() == (processes > 0));
    REQUIRE(p.run.steps() == static_cast<std::int64_t>(at));
    CHECK(!p.run.save_due());
    for (int n = 0; n < 3 && !p.run.done(); ++n) {
      CHECK(p.run.step().loss == expected[at++]);
      if (p.run.validation_due()) CHECK(p.run.validate() == validated[validations++]);
    }
    if (!p.run.saved()) p.run.save();
  }
  CHECK(Process(parts).run.resume());
}

TEST_CASE("run: validation is the mean over the blocks, each once, and does not touch what is learned") {
  const Data tmp;
  Process p(tmp);
  p.run.step();
  double sum = 0;
  std::vector<std::int32_t> inputs(T), targets(T);
  for (int b = 0; b < 5; ++b) {
    p.validation.batch(b, inputs, targets);
    sum += static_cast<double>(p.trainer.evaluate(inputs, targets));
  }
  CHECK(p.run.validate() == doctest::Approx(sum / 5).epsilon(1e-6));  // another grouping of f32 sums
  const float next = p.run.step().loss;
  Process q(tmp);
  q.run.step();
  CHECK(q.run.step().loss == next);
}

TEST_CASE("run: a checkpoint of another run is refused, naming both; what only concerns steps to come may differ") {
  const Data tmp;
  {
    Process p(tmp);
    for (int i = 0; i < 7; ++i) p.run.step();
    p.run.save();
  }
  const auto changed = [&](auto change) {
    TrainerOptions o = Process::learning();
    change(o);
    return refusal(Process(tmp, o));
  };
  CHECK(changed([](auto& o) { o.seed = 9; }) == "seed: 9, as this run has it / 1");
  CHECK(changed([](auto& o) { o.precision = Precision::f32; }) == "precision: \"f32\", as this run has it / \"bf16\"");
  CHECK(changed([](auto& o) { o.weight_decay = 0; }).starts_with("weight_decay: 0"));
  CHECK(changed([](auto& o) { o.decay = WeightDecay::all; }).starts_with("decay: "));
  CHECK(changed([](auto& o) { o.beta2 = 0.5f; }).starts_with("beta2: 0.5"));
  CHECK(changed([](auto& o) { o.clip = 0.5f; }).starts_with("clip: 0.5"));
  CHECK(changed([](auto& o) { o.micro_rows = 1; }) == "micro_rows: 1, as this run has it / 2");
  CHECK(changed([](auto& o) { o.schedule->schedule.warmup = 4; }) ==
        "schedule: a learning rate of 0.00025 at step 1, as this run has it / 0.00033333333");
  CHECK(changed([](auto& o) { o.schedule->schedule.decay_steps = 14; }).starts_with("schedule: a learning rate of "));
  CHECK(changed([](auto& o) { o.schedule->schedule.decay_steps = 3; }) == "none");
  CHECK(changed([](auto& o) { o.checkpointing = Checkpointing::layer; }) == "none");
  CHECK(refusal(Process(tmp, Process::learning(), 4)).starts_with("rows: 4"));
  CHECK(refusal(Process(tmp, Process::learning(), 3, 6)) == "step: 0 to the run's 6 / 7");
  auto longer = Process::learning();
  longer.schedule->schedule.steps = 40;
  CHECK(refusal(Process(tmp, longer, 3, 40)) == "none");
  write_data(tmp / "data", "train_more", 3, 1);  // the prefix finds it too
  CHECK(refusal(Process(tmp)).starts_with("order of the data: "));
}

TEST_CASE("run: loaders that do not fit the trainer are an Error") {
  const Data tmp;
  Process p(tmp);
  const auto make = [&](const DataLoader& data, const DataLoader* validation, std::int64_t steps) {
    TrainingRun<tiny> run(p.trainer, data, validation, {.steps = steps});
  };
  CHECK_NOTHROW(make(p.data, nullptr, 5));
  CHECK_THROWS_WITH_AS(make(p.data, nullptr, 0), doctest::Contains("steps"), Error);  // the data has no end either
  CHECK_THROWS_WITH_AS(make(p.data, &p.data, 5), doctest::Contains("one row a step"), Error);
  write_data(tmp / "data", "none", 2, 1);
  const DataLoader shorter(DataSource{packed_files(tmp / "data", "none")}, 1, {.tokens = 1});
  CHECK_THROWS_WITH_AS(make(shorter, nullptr, 5), doctest::Contains("16 tokens, found 1"), Error);
  const DataLoader ended(std::vector<DataSource>{{packed_files(tmp / "data", "none")}}, std::vector<DataStage>{{.steps = 4}}, {.tokens = T});
  CHECK_THROWS_WITH_AS(make(ended, nullptr, 5), doctest::Contains("4, found 5"), Error);
  CHECK_NOTHROW(make(ended, nullptr, 0));
}
