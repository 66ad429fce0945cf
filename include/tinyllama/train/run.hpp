// TrainingRun: a trainer on a loader's data, with validation, and checkpoints from which the run goes on bit by bit after any end.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tinyllama/train/checkpoint.hpp"
#include "tinyllama/train/loader.hpp"
#include "tinyllama/train/sharded_checkpoint.hpp"
#include "tinyllama/train/trainer.hpp"

namespace tinyllama {

/// Where a run keeps its checkpoints, and how often it does what. The last step is always followed by a validation and a checkpoint.
struct TrainingRunOptions {
  std::filesystem::path folder = {};   ///< root of the checkpoints; empty: none
  std::int64_t steps = 0;              ///< of the whole run; 0: those of the loader's stages
  std::int64_t save_every = 0;         ///< steps; 0: after the last only
  std::int64_t validate_every = 0;     ///< steps; 0: after the last only
  std::int64_t validation_blocks = 0;  ///< at most, of the validation set; 0: all
  SaveCheckpointOptions save = {};
};

/// Steps of a trainer that learns all weights. Trainer and loaders outlive it. A loop, whose order lets a log have a row before the checkpoint
/// behind it exists, so that no row is missing after a resume:
///     run.resume();
///     while (!run.done()) {
///       run.step();
///       if (run.validation_due()) ... = run.validate();
///       ...log...
///       if (run.save_due()) run.save();
///     }
/// A run that was killed anywhere in it, and begun again, has the losses of an undisturbed one to the last bit; on another number of ranks, to rounding. With
/// a trainer that has peers every rank makes the same calls, and the folder is one that all of them see.
template <Config C, TrainingDevice D = Cpu>
class TrainingRun {
 public:
  /// `validation` may be null; else it has one row a step, and its blocks are taken in its order. Throws Error where a loader's T is not the
  /// trainer's.
  TrainingRun(Trainer<C, D>& trainer, const DataLoader& data, const DataLoader* validation, TrainingRunOptions options)
      : trainer_(&trainer), data_(&data), validation_(validation), options_(std::move(options)) {
    if (options_.steps == 0) options_.steps = std::max<std::int64_t>(0, data.steps());
    if (options_.steps < 1 || (data.steps() >= 0 && options_.steps > data.steps()))
      throw Error("training run", "steps", "1 to the stages' " + (data.steps() < 0 ? "end, which they have not" : std::to_string(data.steps())),
                  std::to_string(options_.steps));
    const auto same_tokens = [&](const DataLoader& loader, std::string_view which) {
      if (loader.tokens() != trainer.options().tokens)
        throw Error("training run", which, "rows of the trainer's " + std::to_string(trainer.options().tokens) + " tokens",
                    std::to_string(loader.tokens()));
    };
    same_tokens(data, "data");
    const int ranks = trainer.peers() ? trainer.peers()->ranks() : 1;
    if (data.rows(0) * ranks != data.global_rows(0))
      throw Error("training run", "data", "that of " + std::to_string(ranks) + " ranks, as the trainer's peers are", "rows of " + std::to_string(data.global_rows(0) / data.rows(0)) + " ranks");
    if (validation_) same_tokens(*validation_, "validation data");
    if (validation_ && validation_->rows(0) != 1)
      throw Error("training run", "validation data", "one row a step", std::to_string(validation_->rows(0)));
    if (trainer.options().lora) throw Error("training run", "lora", "a trainer of all weights", "adapters");
  }

  /// Goes on from the newest checkpoint in the folder: true, or false where there is none. Throws Error where it is of another config, or of a run
  /// whose steps up to there would have been others: another seed, optimizer, order of the data, or learning rate. What only concerns steps
  /// to come may differ: a constant rate may go on for longer, a decay may begin later.
  bool resume() {
    const auto newest = agreed_checkpoint();
    if (!newest) return false;
    const std::string file = (*newest / detail::state_json_file).string();
    const detail::json whole = detail::read_json(file);
    const detail::json &state = detail::object_at(whole, "state", file), &run = detail::object_at(state, "run", file), ours = agreement();
    const auto agree = [&](const detail::json& found, const std::string& key, const detail::json& value) {
      const auto it = found.find(key);
      if (it == found.end() || *it != value)
        throw Error(file, key, detail::json_text(value) + ", as this run has it", it == found.end() ? "nothing" : detail::json_text(*it));
    };
    for (const auto& [key, value] : ours.items())
      if (key != "moments") agree(run, key, value);
    const std::string ours_in(name(trainer_->options().moments)), theirs_in = run.value("moments", "f32");  // older runs do not say
    if (ours_in != theirs_in) throw Error(file, "moments", ours_in + ", as this run has them", theirs_in);
    agree(state, "order of the data", data_order());  // last: it tells that seed, blocks, mix or stages differ, but not which
    const detail::JsonObject o(whole, file);
    const detail::json* const step = o.find("step");
    if (!step || !step->is_number_unsigned() || step->get<std::int64_t>() > options_.steps)
      throw o.wrong("step", "0 to the run's " + std::to_string(options_.steps));
    check_rates(state, step->get<std::int64_t>(), file);
    if (trainer_->peers() || whole.contains("shards")) {
      load_sharded_checkpoint(*newest, *trainer_);
      saved_ = trainer_->steps();
      return true;
    }
    const auto weights = trainer_->host(trainer_->weights()), first = trainer_->host(trainer_->first_moment()), second = trainer_->host(trainer_->second_moment());
    const std::vector<MutableNamedArray> arrays{{"first_moment", first.values}, {"second_moment", second.values}};
    trainer_->resume(load_checkpoint(*newest, describe(trainer_->config()), weights.values, arrays).step);
    trainer_->put(trainer_->weights(), weights.values), trainer_->put(trainer_->first_moment(), first.values), trainer_->put(trainer_->second_moment(), second.values);
    saved_ = trainer_->steps();
    return true;
  }

  bool done() const { return steps() >= options_.steps; }
  std::int64_t steps() const { return trainer_->steps(); }
  std::int64_t total_steps() const { return options_.steps; }
  /// Trained on so far.
  std::int64_t tokens() const { return data_->rows_before(steps()) * data_->tokens(); }
  /// Of the last step, or of the next where there was none.
  std::int64_t step_tokens() const { return data_->global_rows(last_step()) * data_->tokens(); }

  /// One optimizer step. Throws Error for an id outside the vocabulary, naming file and position.
  const StepReport& step() {
    const std::int64_t now = steps();
    const auto n = static_cast<std::size_t>(data_->rows(now) * data_->tokens());
    inputs_.resize(n), targets_.resize(n);
    data_->batch(now, inputs_, targets_);
    if (now + 1 < options_.steps) data_->prefetch(now + 1);
    trainer_->step(inputs_, targets_);
    return trainer_->report();
  }

  bool validation_due() const { return validation_ && (done() || due(options_.validate_every)); }
  bool save_due() const { return !options_.folder.empty() && !saved() && (done() || due(options_.save_every)); }
  /// Whether there is a checkpoint of this very step.
  bool saved() const { return saved_ == steps(); }

  /// Mean loss over the validation set, in micro-batches of the trainer's size. Changes nothing of the run.
  double validate() {
    std::int64_t blocks = 0;
    for (std::size_t s = 0; s < validation_->sources(); ++s) blocks += validation_->blocks(s);
    if (options_.validation_blocks > 0) blocks = std::min(blocks, options_.validation_blocks);
    const auto T = static_cast<std::size_t>(validation_->tokens());
    const std::int64_t micro = trainer_->options().micro_rows > 0 ? trainer_->options().micro_rows : data_->rows(last_step());
    const Peers<D>* const peers = trainer_->peers();
    const std::int64_t ranks = peers ? peers->ranks() : 1, mine = peers ? peers->rank() * micro : 0;
    double sum = 0;
    for (std::int64_t first = 0; first < blocks; first += micro * ranks) {
      const std::int64_t all = std::min(micro * ranks, blocks - first), rows = std::clamp<std::int64_t>(all - mine, 0, micro);  // of all ranks, and of this one
      inputs_.resize(static_cast<std::size_t>(rows) * T), targets_.resize(inputs_.size());
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::size_t at = static_cast<std::size_t>(r) * T;
        validation_->batch(first + mine + r, std::span(inputs_).subspan(at, T), std::span(targets_).subspan(at, T));
      }
      sum += static_cast<double>(trainer_->evaluate(inputs_, targets_)) * static_cast<double>(all);
    }
    return sum / static_cast<double>(blocks);
  }

  /// Writes a checkpoint of the step it stands at, and returns its folder. Throws Error; then the last one is still there.
  std::filesystem::path save() {
    detail::json state{{"run", agreement()}, {"order of the data", data_order()}, {"peak_lr", trainer_->options().peak_lr},
                       {"tokens_seen", tokens()}};
    if (trainer_->options().schedule) state["schedule"] = *trainer_->options().schedule;
    if (trainer_->peers()) {
      auto sharded = save_sharded_checkpoint(options_.folder, *trainer_, state.dump(), options_.save);
      saved_ = steps();
      return sharded;
    }
    const auto weights = trainer_->host(trainer_->weights()), first = trainer_->host(trainer_->first_moment()), second = trainer_->host(trainer_->second_moment());
    const std::vector<NamedArray> arrays{{"first_moment", first.values}, {"second_moment", second.values}};
    const any_llama config = describe(trainer_->config());
    auto folder = save_checkpoint(options_.folder, steps(), config, weights.values, arrays, state.dump(), options_.save);
    saved_ = steps();
    return folder;
  }

 private:
  std::int64_t last_step() const { return std::clamp<std::int64_t>(steps() - 1, 0, options_.steps - 1); }
  /// The newest checkpoint, as rank 0 sees it.
  std::optional<std::filesystem::path> agreed_checkpoint() const {
    auto all = list_checkpoints(options_.folder);
    Peers<D>* const peers = trainer_->peers();
    if (!peers) return all.empty() ? std::nullopt : std::optional(all.back().second);
    std::int64_t step = all.empty() ? -1 : all.back().first;
    peers->broadcast(std::as_writable_bytes(std::span(&step, 1)), 0);
    if (step < 0) return std::nullopt;
    const auto it = std::find_if(all.begin(), all.end(), [&](const auto& c) { return c.first == step; });
    if (it == all.end()) throw Error(options_.folder.string(), "checkpoint", "that of step " + std::to_string(step) + ", which rank 0 sees", "none on rank " + std::to_string(peers->rank()));
    return it->second;
  }
  bool due(std::int64_t every) const { return every > 0 && steps() > 0 && steps() % every == 0; }
  std::string data_order() const {
    char digits[16];
    return {digits, std::to_chars(digits, digits + sizeof digits, data_->fingerprint(), 16).ptr};
  }

  /// What changes the bits of a step that has been done, but for the learning rate. Threads and activation checkpointing do not.
  detail::json agreement() const {
    const TrainerOptions& o = trainer_->options();
    return {{"seed", o.seed}, {"tokens", o.tokens}, {"rows", data_->global_rows(0)}, {"micro_rows", o.micro_rows}, {"logits_rows", o.logits_rows},
            {"precision", o.precision == Precision::f32 ? "f32" : o.precision == Precision::bf16 ? "bf16" : "fp8"}, {"moments", name(o.moments)}, {"beta1", o.beta1}, {"beta2", o.beta2}, {"eps", o.eps},
            {"weight_decay", o.weight_decay}, {"decay", o.decay == WeightDecay::all ? "all" : "matrices"}, {"clip", o.clip}};
  }

  /// The checkpoint's learning rates are those of this run, for all steps done.
  void check_rates(const detail::json& state, std::int64_t step, const std::string& file) const {
    const TrainerOptions& o = trainer_->options();
    const detail::JsonObject read(state, file);
    const detail::json *peak = read.find("peak_lr"), *schedule = read.find("schedule");
    if (!peak || !peak->is_number()) throw read.wrong("peak_lr", "a number");
    std::optional<StagedSchedule> theirs;
    if (schedule) theirs = schedule->template get<StagedSchedule>();
    const auto rate = [](const std::optional<StagedSchedule>& s, float constant, std::int64_t n) { return s ? s->at(n) : constant; };
    const auto text = [](float x) {
      char digits[32];
      return std::string(digits, std::to_chars(digits, digits + sizeof digits, x).ptr);
    };
    for (std::int64_t n = 1; n <= step; ++n)
      if (const float ours = rate(o.schedule, o.peak_lr, n), other = rate(theirs, peak->template get<float>(), n); ours != other)
        throw Error(file, "schedule", "a learning rate of " + text(ours) + " at step " + std::to_string(n) + ", as this run has it",
                    text(other));
  }

  Trainer<C, D>* trainer_;
  const DataLoader *data_, *validation_;
  TrainingRunOptions options_;
  std::vector<std::int32_t> inputs_, targets_;  // [rows, T]
  std::int64_t saved_ = -1;
};

}  // namespace tinyllama
