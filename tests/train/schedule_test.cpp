// Learning rates against lit-gpt's formula, at the joints of stages, and through JSON.
#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include <nlohmann/json.hpp>

#include "tinyllama/train/schedule.hpp"

using namespace tinyllama;
using nlohmann::json;

namespace {

/// get_lr as the paper's script has it, written down once more.
double get_lr(double it, double warmup, double end, double peak, double least) {
  if (it < warmup) return peak * it / warmup;
  if (it > end) return least;
  const double ratio = (it - warmup) / (end - warmup);
  return least + 0.5 * (1.0 + std::cos(3.14159265358979323846 * ratio)) * (peak - least);
}

/// Equal to a float's rounding.
doctest::Approx near(double x) { return doctest::Approx(x).epsilon(6e-8); }

}  // namespace

TEST_CASE("schedule: the paper's cosine is get_lr at every step") {
  const Schedule& s = tinyllama_schedule;
  for (std::int64_t step = 0; step < 1'500'000; step += step < 3000 ? 1 : 997)
    REQUIRE(s.at(step) == near(get_lr(static_cast<double>(step), 2000, 1430512, 4e-4, 4e-5)));
  CHECK(s.at(0) == 0.0f);
  CHECK(s.at(-5) == 0.0f);
  CHECK(s.at(1000) == 2e-4f);
  CHECK(s.at(2000) == 4e-4f);
  CHECK(s.at(2000 + (1430512 - 2000) / 2) == near(2.2e-4));  // half way
  CHECK(s.at(1430512) == 4e-5f);
  CHECK(s.at(std::numeric_limits<std::int64_t>::max()) == 4e-5f);
  check(s);
}

TEST_CASE("schedule: the other shapes") {
  const Schedule constant{.decay = Decay::constant, .peak = 1e-5};
  CHECK(constant.at(0) == 1e-5f);
  CHECK(constant.at(1'000'000) == 1e-5f);
  const Schedule warm{.decay = Decay::constant, .peak = 1.0, .warmup = 4};
  CHECK(warm.at(1) == 0.25f);
  CHECK(warm.at(4) == 1.0f);

  const Schedule linear{.decay = Decay::linear, .peak = 1.0, .minimum = 0.2, .warmup = 10, .steps = 20};
  CHECK(linear.at(5) == 0.5f);
  CHECK(linear.at(10) == 1.0f);
  CHECK(linear.at(15) == near(0.6));
  CHECK(linear.at(20) == 0.2f);
  CHECK(linear.at(30) == 0.2f);

  const Schedule wsd{.decay = Decay::wsd_linear, .peak = 1.0, .minimum = 0.0, .warmup = 10, .steps = 110, .decay_steps = 20};
  CHECK(wsd.at(10) == 1.0f);
  CHECK(wsd.at(90) == 1.0f);
  CHECK(wsd.at(91) == near(0.95));
  CHECK(wsd.at(105) == near(0.25));
  CHECK(wsd.at(110) == 0.0f);
  Schedule root = wsd;
  root.decay = Decay::wsd_sqrt;
  CHECK(root.at(90) == 1.0f);
  CHECK(root.at(95) == near(0.5));  // a quarter of the way
  CHECK(root.at(110) == 0.0f);
  for (const Schedule& s : {constant, warm, linear, wsd, root}) CHECK_NOTHROW(check(s));
}

TEST_CASE("schedule: stages, where the cosine goes on while the batch grows") {
  const Schedule cosine{.peak = 1.0, .minimum = 0.1, .warmup = 10, .steps = 100};
  StagedSchedule run{.schedule = cosine,
                     .stages = {{.name = "basic", .steps = 60, .rows = 8, .weights = {1}},
                                {.name = "math", .steps = 20, .weights = {0.75, 0.25}, .ramp_steps = 5},
                                {.name = "cool-down", .steps = 5, .pace = 4, .rows = 32}}};
  check(run);
  CHECK(run.steps() == 85);
  CHECK(run.begins(0) == 0);
  CHECK(run.begins(2) == 80);
  CHECK(run.begins(3) == 85);
  CHECK(run.stage_at(0) == 0);
  CHECK(run.stage_at(59) == 0);
  CHECK(run.stage_at(60) == 1);
  CHECK(run.stage_at(80) == 2);
  CHECK(run.stage_at(1000) == 2);
  for (std::int64_t step = 0; step < 80; ++step) CHECK(run.at(step) == cosine.at(step));
  for (std::int64_t step = 80; step <= 85; ++step) CHECK(run.at(step) == cosine.at(80 + 4 * (step - 80)));
  CHECK(run.at(85) == 0.1f);  // as many tokens as the cosine was planned for

  StagedSchedule fast = run;  // what an earlier stage's pace did to the clock stays
  fast.stages[0].pace = 0.5;
  CHECK(fast.at(59) == static_cast<float>(cosine.value(29.5)));
  CHECK(fast.at(60) == cosine.at(30));
  CHECK(fast.at(81) == cosine.at(54));

  run.stages[1].multiplier = 0.5;
  CHECK(run.at(59) == cosine.at(59));
  CHECK(run.at(60) == near(0.5 * static_cast<double>(cosine.at(60))));
  run.stages[1].schedule = Schedule{.decay = Decay::linear, .peak = 2.0, .minimum = 0.0, .steps = 20};
  CHECK(run.at(60) == 1.0f);
  CHECK(run.at(70) == 0.5f);
  CHECK(run.at(80) == cosine.at(80));  // the stage's own schedule did not stop the run's clock

  const StagedSchedule plain{.schedule = cosine};
  CHECK(plain.steps() == 100);
  CHECK(plain.stage_at(7) == 0);
  CHECK(plain.at(7) == cosine.at(7));
}

TEST_CASE("schedule: through JSON and back") {
  const Schedule s{.decay = Decay::wsd_sqrt, .peak = 3e-4, .minimum = 1e-6, .warmup = 7, .steps = 1'000'000'007, .decay_steps = 12};
  CHECK(json::parse(json(s).dump()).get<Schedule>() == s);
  CHECK(json(s)["decay"] == "wsd_sqrt");
  StagedSchedule run{
      .schedule = tinyllama_schedule,
      .stages = {{.name = "a", .steps = 5, .multiplier = 0.5, .pace = 4, .schedule = s, .rows = 3, .weights = {0.25, 0.75}, .ramp_steps = 2},
                 {.steps = 6}}};
  CHECK(json::parse(json(run).dump()).get<StagedSchedule>() == run);
  run.stages.clear();
  CHECK(json::parse(json(run).dump()).get<StagedSchedule>() == run);
  for (const Decay d : {Decay::constant, Decay::linear, Decay::cosine, Decay::wsd_linear, Decay::wsd_sqrt}) CHECK(parse_decay(name(d)) == d);
}

TEST_CASE("schedule: what makes no sense") {
  const auto refuses = [](Schedule s, const char* what) { CHECK_THROWS_WITH_AS(check(s), doctest::Contains(what), Error); };
  refuses({.peak = -1, .steps = 10}, "peak");
  refuses({.peak = std::numeric_limits<double>::quiet_NaN(), .steps = 10}, "peak");
  refuses({.peak = 1, .minimum = 2, .steps = 10}, "minimum");
  refuses({.warmup = -1, .steps = 10}, "warmup");
  refuses({.warmup = 10, .steps = 10}, "steps");
  refuses({.decay = Decay::wsd_linear, .warmup = 5, .steps = 10, .decay_steps = 6}, "decay_steps");
  refuses({.decay = Decay::wsd_sqrt, .warmup = 5, .steps = 10}, "decay_steps");
  CHECK_THROWS_WITH_AS(parse_decay("step"), doctest::Contains("cosine"), Error);

  const auto stage = [](StageSchedule s, const char* what) {
    CHECK_THROWS_WITH_AS(check(StagedSchedule{.schedule = tinyllama_schedule, .stages = {{.steps = 1}, s}}), doctest::Contains(what), Error);
  };
  stage({.steps = 0}, "stage 1, steps");
  stage({.name = "late", .steps = std::numeric_limits<std::int64_t>::max()}, "stage late, steps");
  stage({.steps = 1, .multiplier = -1}, "multiplier");
  stage({.steps = 1, .pace = -1}, "pace");
  stage({.steps = 1, .rows = -1}, "rows");
  stage({.steps = 1, .weights = {-1}}, "weights");
  stage({.steps = 1, .ramp_steps = -1}, "ramp_steps");
  stage({.steps = 1, .schedule = Schedule{.steps = -3}}, "steps");

  const auto json_refuses = [](const char* text, const char* what) {
    INFO(text);
    CHECK_THROWS_WITH_AS(json::parse(text).get<StagedSchedule>(), doctest::Contains(what), Error);
  };
  json_refuses("[]", "an object");
  json_refuses(R"({"schedule": {"steps": 10, "peek": 1}})", "peek");
  json_refuses(R"({"schedule": {"steps": 10.5}})", "steps");
  json_refuses(R"({"schedule": {"steps": 10, "peak": "high"}})", "peak");
  json_refuses(R"({"schedule": {"steps": 10, "decay": "step"}})", "cosine");
  json_refuses(R"({"schedule": {"steps": 10, "decay": 3}})", "decay");
  json_refuses(R"({"schedule": {"steps": 10}, "stages": [{"steps": 1, "row": 2}]})", "row");
  json_refuses(R"({"schedule": {"steps": 10}, "stages": [{"steps": 0}]})", "stage 0, steps");
  json_refuses(R"({"schedule": {"steps": 10}, "stages": 5})", "stages");
  json_refuses(R"({})", "steps");  // a cosine needs them
}
