// Learning rates: what each step of a run is given, in one stage or in several.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <numbers>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "tinyllama/tensor/dtype.hpp"

namespace tinyllama {

/// After the warm-up, on the way from `peak` (at step `warmup`) to `minimum` (at step `steps`, and from there on):
///   constant     peak throughout, `steps` is not looked at
///   linear       a straight line
///   cosine       half a cosine (the paper's)
///   wsd_linear   peak until `steps - decay_steps`, then a straight line (warm-up, stable, decay)
///   wsd_sqrt     the same with 1 - sqrt(progress), which falls faster at first (arXiv 2405.18392)
enum class Decay : std::uint8_t { constant, linear, cosine, wsd_linear, wsd_sqrt };

namespace detail {
inline constexpr std::array<std::pair<std::string_view, Decay>, 5> decays{{{"constant", Decay::constant},
                                                                           {"linear", Decay::linear},
                                                                           {"cosine", Decay::cosine},
                                                                           {"wsd_linear", Decay::wsd_linear},
                                                                           {"wsd_sqrt", Decay::wsd_sqrt}}};
}  // namespace detail

constexpr std::string_view name(Decay d) { return detail::decays[static_cast<std::size_t>(d)].first; }

/// The decay of that name, or an Error that lists the names.
inline Decay parse_decay(std::string_view text) {
  std::string known;
  for (const auto& [n, d] : detail::decays) {
    if (n == text) return d;
    known.append(known.empty() ? "" : ", ").append(n);
  }
  throw Error("schedule", "decay", "one of " + known, "'" + std::string(text) + "'");
}

/// Learning rate by step. The numbers are doubles, as in the scripts whose curves this has to meet.
struct Schedule {
  Decay decay = Decay::cosine;
  double peak = 4e-4, minimum = 4e-5;
  std::int64_t warmup = 0;       // steps of a straight line from 0 to the peak
  std::int64_t steps = 0;        // where the minimum is reached
  std::int64_t decay_steps = 0;  // wsd_*: length of the decay
  bool operator==(const Schedule&) const = default;

  /// The formula of lit-gpt's get_lr: 0 at step 0, `peak` at `warmup`. Steps before 0 count as 0. A loop that takes no step at rate 0 asks for
  /// at(n) at its n-th step, counted from 1; the paper's loop, which advances the rate with each of A micro-batches, ends at value(n - 1 / A).
  float at(std::int64_t step) const { return static_cast<float>(value(static_cast<double>(step))); }

  /// The same between steps.
  double value(double step) const {
    const double warm = static_cast<double>(warmup), end = static_cast<double>(steps);
    if (step < warm) return peak * std::max(step, 0.0) / warm;
    if (decay == Decay::constant) return peak;
    if (step >= end) return minimum;
    const bool wsd = decay == Decay::wsd_linear || decay == Decay::wsd_sqrt;
    const double begin = wsd ? std::max(warm, end - static_cast<double>(decay_steps)) : warm;
    if (step < begin) return peak;
    const double progress = (step - begin) / (end - begin);
    double share = 1 - progress;  // of the way from minimum to peak
    if (decay == Decay::cosine) share = 0.5 * (1 + std::cos(std::numbers::pi * progress));
    if (decay == Decay::wsd_sqrt) share = 1 - std::sqrt(progress);
    return minimum + share * (peak - minimum);
  }
};

/// The paper's: 2000 steps to 4e-4, a cosine to 4e-5 at step 1,430,512.
inline constexpr Schedule tinyllama_schedule{.decay = Decay::cosine, .peak = 4e-4, .minimum = 4e-5, .warmup = 2000, .steps = 1'430'512};

/// Throws Error for a schedule that makes no sense; `where` is a file or an operation.
inline void check(const Schedule& s, std::string_view where = "schedule") {
  const auto require = [&](bool ok, std::string_view subject, const std::string& expected, const std::string& found) {
    if (!ok) throw Error(where, subject, expected, found);
  };
  const bool constant = s.decay == Decay::constant, wsd = s.decay == Decay::wsd_linear || s.decay == Decay::wsd_sqrt;
  require(static_cast<std::size_t>(s.decay) < detail::decays.size(), "decay", "a known one", std::to_string(static_cast<int>(s.decay)));
  require(std::isfinite(s.peak) && s.peak >= 0, "peak", "0 or more", std::to_string(s.peak));
  require(constant || (s.minimum >= 0 && s.minimum <= s.peak), "minimum", "0 to the peak, " + std::to_string(s.peak), std::to_string(s.minimum));
  require(s.warmup >= 0, "warmup", "0 steps or more", std::to_string(s.warmup));
  require(constant || s.steps > s.warmup, "steps", "more than the warm-up's " + std::to_string(s.warmup), std::to_string(s.steps));
  require(!wsd || (s.decay_steps >= 1 && s.decay_steps <= s.steps - s.warmup), "decay_steps",
          "1 to " + std::to_string(s.steps - s.warmup) + ", after the warm-up", std::to_string(s.decay_steps));
}

/// One stage of a run, as in v1.1: basic, continual, cool-down. Batch and data are the loader's; they stand here so that a run is one list.
struct StageSchedule {
  std::string name = {};
  std::int64_t steps = 0;
  double multiplier = 1;                     // of the learning rate
  double pace = 1;                           // of the run's schedule: 4 keeps a cosine in tokens where the batch is 4 times as big
  std::optional<Schedule> schedule = {};     // of its own, from step 0 at the stage's begin; without, the run's schedule goes on
  index_t rows = 0;                          // sequences of a batch; 0: as before
  std::vector<double> weights = {};          // of the data's sources; empty: as before
  std::int64_t ramp_steps = 0;               // over which they move there
  bool operator==(const StageSchedule&) const = default;
};

/// A run of several stages. Without stages it is `schedule` alone.
struct StagedSchedule {
  Schedule schedule;
  std::vector<StageSchedule> stages = {};
  bool operator==(const StagedSchedule&) const = default;

  /// Steps of all stages; of the schedule where there are none.
  std::int64_t steps() const { return stages.empty() ? schedule.steps : begins(stages.size()); }

  /// First step of stage `i`; of the number of stages: the step after the last.
  std::int64_t begins(std::size_t i) const {
    std::int64_t step = 0;
    for (const StageSchedule& s : std::span(stages).first(std::min(i, stages.size()))) step += s.steps;
    return step;
  }

  /// The stage that `step` belongs to: the last one from the end on.
  std::size_t stage_at(std::int64_t step) const {
    std::size_t i = 0;
    for (std::int64_t end = 0; i + 1 < stages.size() && step >= (end += stages[i].steps);) ++i;
    return i;
  }

  float at(std::int64_t step) const {
    if (stages.empty()) return schedule.at(step);
    const std::size_t i = stage_at(step);
    const StageSchedule& stage = stages[i];
    const auto inside = static_cast<double>(step - begins(i));
    double clock = inside * stage.pace;
    for (const StageSchedule& s : std::span(stages).first(i)) clock += static_cast<double>(s.steps) * s.pace;
    return static_cast<float>(stage.multiplier * (stage.schedule ? stage.schedule->value(inside) : schedule.value(clock)));
  }
};

/// Throws Error naming the stage that makes no sense.
inline void check(const StagedSchedule& s, std::string_view where = "schedule") {
  check(s.schedule, where);
  std::int64_t total = 0;
  for (std::size_t i = 0; i < s.stages.size(); ++i) {
    const StageSchedule& stage = s.stages[i];
    const std::string here = "stage " + (stage.name.empty() ? std::to_string(i) : stage.name) + ", ";
    if (stage.steps < 1 || __builtin_add_overflow(total, stage.steps, &total))
      throw Error(where, here + "steps", "1 or more, below 2^63 in all", std::to_string(stage.steps));
    if (!(stage.multiplier >= 0 && std::isfinite(stage.multiplier)))
      throw Error(where, here + "multiplier", "0 or more", std::to_string(stage.multiplier));
    if (!(stage.pace >= 0 && std::isfinite(stage.pace))) throw Error(where, here + "pace", "0 or more", std::to_string(stage.pace));
    if (stage.rows < 0) throw Error(where, here + "rows", "0 or more", std::to_string(stage.rows));
    if (stage.ramp_steps < 0) throw Error(where, here + "ramp_steps", "0 or more", std::to_string(stage.ramp_steps));
    for (const double w : stage.weights)
      if (!(w >= 0 && std::isfinite(w))) throw Error(where, here + "weights", "0 or more", std::to_string(w));
    if (stage.schedule) check(*stage.schedule, where);
  }
}

// nlohmann-json's hooks: `json j = schedule` and `j.get<Schedule>()` work where a unit includes nlohmann/json.hpp; this header does not, for
// its 2 s. Keys that are missing keep their defaults; a key that is unknown or of the wrong type, and a schedule that check() refuses, is an Error.
namespace detail {

/// Takes the members of an object one by one, then says what was left over.
template <class Json>
class ScheduleReader {
 public:
  ScheduleReader(const Json& j, std::string_view what) : j_(j), what_(what) {
    if (!j.is_object()) throw Error(what_, "JSON", "an object", std::string(j.type_name()));
  }
  template <class T>
  void operator()(const char* key, T& to) {
    const auto it = j_.find(key);
    if (it == j_.end()) return;
    ++taken_;
    const bool fits = std::is_integral_v<T> ? it->is_number_integer() : std::is_floating_point_v<T> ? it->is_number() : true;
    if (!fits) throw Error(what_, key, std::is_integral_v<T> ? "an integer" : "a number", std::string(it->type_name()));
    try {
      it->get_to(to);
    } catch (const typename Json::exception&) {
      throw Error(what_, key, "a value of its type", std::string(it->type_name()));
    }
  }
  const Json* optional(const char* key) {
    const auto it = j_.find(key);
    if (it == j_.end()) return nullptr;
    ++taken_;
    return it->is_null() ? nullptr : &*it;
  }
  void done(std::span<const std::string_view> keys) const {
    if (taken_ == j_.size()) return;
    for (const auto& item : j_.items())
      if (std::find(keys.begin(), keys.end(), item.key()) == keys.end()) throw Error(what_, item.key(), "a key that is known", "this one");
  }

 private:
  const Json& j_;
  std::string_view what_;
  std::size_t taken_ = 0;
};

}  // namespace detail

template <class Json>
void to_json(Json& j, const Schedule& s) {
  j = Json{{"decay", name(s.decay)}, {"peak", s.peak},   {"minimum", s.minimum},
           {"warmup", s.warmup},     {"steps", s.steps}, {"decay_steps", s.decay_steps}};
}
template <class Json>
void from_json(const Json& j, Schedule& s) {
  s = {};
  std::string decay(name(s.decay));
  detail::ScheduleReader<Json> read(j, "schedule");
  read("decay", decay), read("peak", s.peak), read("minimum", s.minimum);
  read("warmup", s.warmup), read("steps", s.steps), read("decay_steps", s.decay_steps);
  read.done(std::array<std::string_view, 6>{"decay", "peak", "minimum", "warmup", "steps", "decay_steps"});
  s.decay = parse_decay(decay);
  check(s);
}

template <class Json>
void to_json(Json& j, const StageSchedule& s) {
  j = Json{{"name", s.name}, {"steps", s.steps},     {"multiplier", s.multiplier}, {"pace", s.pace},
           {"rows", s.rows}, {"weights", s.weights}, {"ramp_steps", s.ramp_steps}};
  if (s.schedule) to_json(j["schedule"], *s.schedule);
}
template <class Json>
void from_json(const Json& j, StageSchedule& s) {
  s = {};
  detail::ScheduleReader<Json> read(j, "schedule stage");
  read("name", s.name), read("steps", s.steps), read("multiplier", s.multiplier), read("pace", s.pace);
  read("rows", s.rows), read("weights", s.weights), read("ramp_steps", s.ramp_steps);
  if (const Json* own = read.optional("schedule")) from_json(*own, s.schedule.emplace());
  read.done(std::array<std::string_view, 8>{"name", "steps", "multiplier", "pace", "rows", "weights", "ramp_steps", "schedule"});
}

template <class Json>
void to_json(Json& j, const StagedSchedule& s) {
  to_json(j["schedule"], s.schedule);
  j["stages"] = s.stages;
}
template <class Json>
void from_json(const Json& j, StagedSchedule& s) {
  s = {};
  detail::ScheduleReader<Json> read(j, "staged schedule");
  if (const Json* own = read.optional("schedule")) from_json(*own, s.schedule);
  read("stages", s.stages);
  read.done(std::array<std::string_view, 2>{"schedule", "stages"});
  check(s);
}

}  // namespace tinyllama
