// Trainer: a model that learns. step() is one optimizer step; the pieces it is made of are public, to be used one by one.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "tinyllama/model/gradient.hpp"
#include "tinyllama/model/model.hpp"
#include "tinyllama/train/adapters.hpp"
#include "tinyllama/train/flat_model.hpp"
#include "tinyllama/train/initialise.hpp"
#include "tinyllama/train/merge.hpp"
#include "tinyllama/train/schedule.hpp"
#include "tinyllama/train/training_plan.hpp"

namespace tinyllama {

/// Which weights decay: all (the paper's repository), or the matrices but not the gains (the usual way).
enum class WeightDecay : std::uint8_t { matrices, all };

/// Training's options. Weights, gradients and moments are f32; `precision` is that of the products.
struct TrainerOptions {
  float peak_lr = 4e-4f;                         ///< the learning rate, where there is no schedule
  std::optional<StagedSchedule> schedule = {};   ///< step n, counted from 1, runs at schedule.at(n)
  float beta1 = 0.9f, beta2 = 0.95f, eps = 1e-8f;
  float weight_decay = 0.1f;
  WeightDecay decay = WeightDecay::matrices;
  float clip = 1.0f;                             ///< of the gradient's global 2-norm; 0: none
  Precision precision = Precision::bf16;
  Checkpointing checkpointing = Checkpointing::selective;
  index_t tokens = 0;                            ///< T of a row of the batch; 0: the context, or a shorter single row
  index_t micro_rows = 0;                        ///< rows of a micro-batch; 0: the whole batch at once
  index_t logits_rows = 512;                     ///< rows of logits at a time
  std::uint64_t seed = 1;                        ///< of the initial weights, and of dropout
  std::optional<LoraOptions> lora = {};          ///< learn adapters; the weights stay as they are
};

/// What a step did.
struct StepReport {
  float loss = 0;            ///< mean over the targets that count
  float gradient_norm = 0;   ///< before clipping
  float lr = 0;
  std::int64_t targets = 0;  ///< that counted
  bool skipped = false;      ///< the gradient was not finite: weights and moments are as before
};

/// The weights of config C, their gradients and AdamW's moments (arXiv 1711.05101) on a device, which outlives it. All arrays are flat, in the
/// order of for_each_parameter (with LoRA: of for_each_adapter). The same bits for any number of threads; no allocation after the first step
/// of a shape.
template <Config C, TrainingDevice D = Cpu>
class Trainer {
 public:
  /// Initial weights as in the paper (train/initialise.hpp).
  explicit Trainer(D& dev, const TrainerOptions& options = {}, const C& config = {}) : Trainer(dev, options, config, 0) {
    initialise(dev, config_, weights_data(), options_.seed);
  }
  /// The weights of a checkpoint, whose config must be C's. Throws Error.
  Trainer(D& dev, const Checkpoint& file, const TrainerOptions& options = {}, const C& config = {}) : Trainer(dev, options, config, 0) {
    if (!same_model(describe(config_), file.config))
      throw Error(file.path, "config", "that of the trainer", preset_name(file.config).empty() ? "another" : std::string(preset_name(file.config)));
    read_flat(file, weights());
  }

  /// One optimizer step on B rows of T tokens: `inputs` and `targets` [B, T], where a target is the next id, or below 0 where it does not
  /// count. Returns the mean loss. Throws Error for an id outside the vocabulary, or where no target counts.
  float step(std::span<const std::int32_t> inputs, std::span<const std::int32_t> targets) {
    check_batch(inputs, targets);
    begin_step();
    const std::int64_t count = counted(targets);
    each_micro(inputs, targets, [&](auto in, auto out) {
      if (counted(out) > 0) accumulate(in, out, 1.0f / static_cast<float>(count));
    });
    return end_step(count);
  }

  // ---- the pieces of a step ------------------------------------------------------------------------------------------------------------

  /// Begins a step: the next gradients replace those that are there.
  void begin_step() { fresh_ = true, loss_ = 0, micro_ = 0; }

  /// Adds a micro-batch: the gradient of weight x (sum of the losses), of rows of T tokens as in step(), or of any sequences.
  void accumulate(std::span<const std::int32_t> inputs, std::span<const std::int32_t> targets, float weight) {
    rows_as_sequences(inputs.size());
    accumulate(inputs, targets, std::span<const Sequence>(sequences_), weight);
  }
  void accumulate(std::span<const std::int32_t> inputs, std::span<const std::int32_t> targets, std::span<const Sequence> batch, float weight) {
    row_weights_.assign(inputs.size(), weight);
    accumulate(inputs, targets, batch, std::span<const float>(row_weights_));
  }
  /// The same with a weight for each row, [T]: what preference losses need.
  void accumulate(std::span<const std::int32_t> inputs, std::span<const std::int32_t> targets, std::span<const Sequence> batch, std::span<const float> weights) {
    check_batch(inputs, targets);
    start(inputs, batch, true);
    if (std::exchange(fresh_, false)) clear_small();
    const auto losses = pass_.backward(learned_, inputs, targets, weights, batch);
    for (std::size_t i = 0; i < losses.size(); ++i) loss_ += static_cast<double>(losses[i]) * weights[i];
    learned_.for_each_matrix([](LearnedMatrix& m) { m.how.accumulate = true; });
  }

  /// The global 2-norm of the gradient.
  float gradient_norm() { return static_cast<float>(std::sqrt(sum_of_squares(*dev_, gradients().data(), learned_size()))); }

  /// AdamW on all weights with the gradient times `scale`.
  void update(float lr, float scale) {
    const auto step = static_cast<float>(step_ + 1);
    AdamwTask t{learned_values(), first_moment().data(), second_moment().data(), gradients().data(), 0, lr, options_.beta1, options_.beta2, options_.eps, 0,
                1.0f - std::pow(options_.beta1, step), 1.0f - std::pow(options_.beta2, step), scale};
    const auto run = [&](index_t n, bool decays) {
      t.n = n, t.decay = decays ? options_.weight_decay : 0.0f;
      adamw(*dev_, t);
      t.p += n, t.m += n, t.v += n, t.gradient += n;
    };
    if (options_.lora) run(learned_size(), true);
    else for_each_parameter(config_, [&](const Parameter& p) { run(p.size(), p.role != Role::gain || options_.decay == WeightDecay::all); });
    ++step_;
  }

  /// Clips, updates and reports; `count` is the number of targets that counted.
  float end_step(std::int64_t count) {
    const float norm = gradient_norm(), lr = learning_rate();
    report_ = {static_cast<float>(loss_), norm, lr, count, !std::isfinite(norm)};
    if (report_.skipped) ++step_;
    else update(lr, options_.clip > 0 ? std::min(1.0f, options_.clip / (norm + 1e-6f)) : 1.0f);
    return report_.loss;
  }

  // ---- without learning ----------------------------------------------------------------------------------------------------------------

  /// The loss of each target, [B T]; 0 where it does not count. Valid until the next call.
  std::span<const float> losses(std::span<const std::int32_t> inputs, std::span<const std::int32_t> targets) {
    rows_as_sequences(inputs.size());
    return losses(inputs, targets, sequences_);
  }
  std::span<const float> losses(std::span<const std::int32_t> inputs, std::span<const std::int32_t> targets, std::span<const Sequence> batch) {
    check_batch(inputs, targets);
    start(inputs, batch, false);
    return pass_.losses(learned_, targets);
  }
  /// Mean loss over the targets that count.
  float evaluate(std::span<const std::int32_t> inputs, std::span<const std::int32_t> targets) {
    double sum = 0;
    const std::int64_t count = counted(targets);
    each_micro(inputs, targets, [&](auto in, auto out) {
      if (counted(out) == 0) return;
      for (const float l : losses(in, out)) sum += static_cast<double>(l);
    });
    return static_cast<float>(sum / static_cast<double>(std::max<std::int64_t>(1, count)));
  }

  /// The weights as they are now (adapters merged), packed to generate with; a copy.
  Model<C, D> model(std::optional<Tokenizer> tokenizer = {}, const LoadOptions& options = {}) {
    std::vector<float> merged;
    std::span<const float> now = weights();
    if (options_.lora) {
      merged.assign(now.begin(), now.end());
      merge_adapters(*dev_, config_, *options_.lora, merged, adapters());
      now = merged;
    }
    const FlatModel flat(describe(config_), now);
    return Model<C, D>(Weights<C, D>::from(*dev_, config_, FlatSource{flat}, options), std::move(tokenizer));
  }

  // ---- state ---------------------------------------------------------------------------------------------------------------------------

  const StepReport& report() const { return report_; }
  std::int64_t steps() const { return step_; }
  /// Of the next step.
  float learning_rate() const { return options_.schedule ? options_.schedule->at(step_ + 1) : options_.peak_lr; }
  const C& config() const { return config_; }
  D& device() const { return *dev_; }
  const TrainerOptions& options() const { return options_; }

  /// The model's weights, [parameter_count(C)].
  std::span<float> weights() { return {weights_data(), static_cast<std::size_t>(parameter_count(config_))}; }
  /// The adapters' weights, [adapter_parameter_count]; empty without LoRA.
  std::span<float> adapters() { return options_.lora ? array(0) : std::span<float>(); }
  /// Of what is learned, weights or adapters.
  std::span<float> gradients() { return array(1); }
  std::span<float> first_moment() { return array(2); }
  std::span<float> second_moment() { return array(3); }
  /// Goes on behind step n, whose arrays are in place.
  void resume(std::int64_t n) { step_ = n; }

  /// Bytes on the device, to be compared with training_plan().
  std::size_t bytes() const { return weights_.bytes() + state_.bytes() + pass_.bytes(); }

 private:
  Trainer(D& dev, const TrainerOptions& options, const C& config, int)
      : dev_(&dev), options_(options), config_(config), pass_(dev) {
    check(describe(config_), "config");
    if (head_stride(head_dim(config_)) > max_head_stride)
      throw Error("trainer", "head dimension", "at most " + std::to_string(max_head_stride), std::to_string(head_dim(config_)));
    if (options_.lora) check(*options_.lora, config_);
    if (options_.schedule) check(*options_.schedule);
    const auto positive = [](std::string_view what, bool ok, float found) {
      if (!ok) throw Error("trainer", what, "in its range", std::to_string(found));
    };
    positive("learning rate", options_.peak_lr >= 0 && std::isfinite(options_.peak_lr), options_.peak_lr);
    positive("beta1", options_.beta1 >= 0 && options_.beta1 < 1, options_.beta1);
    positive("beta2", options_.beta2 >= 0 && options_.beta2 < 1, options_.beta2);
    positive("eps", options_.eps > 0, options_.eps);
    positive("clip", options_.clip >= 0, options_.clip);
    positive("logits rows", options_.logits_rows > 0, static_cast<float>(options_.logits_rows));
    const std::size_t float_bytes = sizeof(float);
    if (options_.lora) weights_ = Memory<D>(dev, static_cast<std::size_t>(parameter_count(config_)) * float_bytes);
    state_ = Memory<D>(dev, 4 * static_cast<std::size_t>(learned_size()) * float_bytes);
    fill(dev, reinterpret_cast<float*>(state_.data()), 4 * learned_size(), 0.0f);
    if (options_.lora) {
      const std::vector<float> initial = initial_adapters(config_, *options_.lora);
      std::copy(initial.begin(), initial.end(), adapters().begin());
    }
    lay_out();
  }

  index_t learned_size() const {
    return static_cast<index_t>(options_.lora ? adapter_parameter_count(config_, *options_.lora) : parameter_count(config_));
  }
  std::span<float> array(int which) {
    const auto n = static_cast<std::size_t>(learned_size());
    return {reinterpret_cast<float*>(state_.data()) + static_cast<std::size_t>(which) * n, n};
  }
  float* weights_data() { return reinterpret_cast<float*>((options_.lora ? weights_ : state_).data()); }
  float* learned_values() { return array(0).data(); }

  /// Points learned_ at the arrays. Q, K and V lie one behind the other, and gate and up, so that they are one matrix each.
  void lay_out() {
    const bool frozen = options_.lora.has_value();
    float *at = weights_data(), *gradient = frozen ? nullptr : gradients().data();
    learned_.config = config_;
    learned_.layers.resize(static_cast<std::size_t>(config_.layers));
    learned_.frequencies = rope_frequencies(config_);
    const GemmOptions how{options_.precision == Precision::bf16, false};
    for_each_parameter(config_, [&](const Parameter& p) {
      const auto add = [&](LearnedMatrix& m) {
        if (m.rows == 0) m = {at, gradient, 0, p.columns, how};
        m.rows += p.rows;
      };
      const auto gain = [&](const float*& value, float*& d) { value = at, d = gradient; };
      LearnedLayer* l = p.layer < 0 ? nullptr : &learned_.layers[static_cast<std::size_t>(p.layer)];
      switch (p.slot) {
        case Slot::embedding: add(learned_.embedding); break;
        case Slot::attn_norm: gain(l->attn_norm, l->d_attn_norm); break;
        case Slot::q: case Slot::k: case Slot::v: add(l->qkv); break;
        case Slot::o: add(l->o); break;
        case Slot::ffn_norm: gain(l->ffn_norm, l->d_ffn_norm); break;
        case Slot::gate: case Slot::up: add(l->gate_up); break;
        case Slot::down: add(l->down); break;
        case Slot::final_norm: gain(learned_.final_norm, learned_.d_final_norm); break;
        case Slot::head: add(learned_.head); break;
      }
      at += p.size();
      if (gradient) gradient += p.size();
    });
    if (config_.tied) learned_.head = learned_.embedding;
    if (frozen) add_adapters();
  }

  void add_adapters() {
    const LoraOptions& o = *options_.lora;
    for_each_adapter(config_, o, [&](const Adapter& a) {
      LearnedLayer& l = learned_.layers[static_cast<std::size_t>(a.target.layer)];
      const index_t d = config_.hidden, kv = static_cast<index_t>(config_.kv_heads) * head_dim(config_);
      LearnedMatrix* m = nullptr;
      index_t first_row = 0;
      switch (a.target.slot) {
        case Slot::q: m = &l.qkv; break;
        case Slot::k: m = &l.qkv, first_row = d; break;
        case Slot::v: m = &l.qkv, first_row = d + kv; break;
        case Slot::o: m = &l.o; break;
        case Slot::gate: m = &l.gate_up; break;
        case Slot::up: m = &l.gate_up, first_row = config_.ffn; break;
        default: m = &l.down; break;
      }
      const float* values = adapters().data();
      float* g = gradients().data();
      m->adapters[static_cast<std::size_t>(m->adapter_count++)] = {first_row, a.target.rows, a.rank, values + a.a, values + a.b, g + a.a, g + a.b, o.scale(), 0.0f, 0};
    });
  }

  /// Forward pass of a micro-batch, with dropout while learning.
  void start(std::span<const std::int32_t> inputs, std::span<const Sequence> batch, bool learning) {
    const auto T = static_cast<index_t>(inputs.size());
    const LoraOptions lora = options_.lora.value_or(LoraOptions{.rank = 0});
    pass_.prepare(config_, {T, std::min(T, options_.logits_rows), options_.checkpointing, lora.rank, lora.dropout > 0});
    if (learning && fresh_) learned_.for_each_matrix([](LearnedMatrix& m) { m.how.accumulate = false; });
    std::uint64_t place = 0;
    const std::uint64_t key = random_bits(options_.seed ^ 0x6472'6f70'6f75'7400u, static_cast<std::uint64_t>(step_) << 20 | static_cast<std::uint64_t>(micro_++));
    learned_.for_each_matrix([&](LearnedMatrix& m) {
      m.work = pass_.adapter_work();
      for (int i = 0; i < m.adapter_count; ++i) {
        m.adapters[static_cast<std::size_t>(i)].dropout = learning ? lora.dropout : 0.0f;
        m.adapters[static_cast<std::size_t>(i)].key = random_bits(key, place++);
      }
    });
    pass_.forward(learned_, inputs, batch);
  }

  /// The gradients that are always added to: of gains, and of an embedding that is not the head too.
  void clear_small() {
    if (options_.lora) return;
    float* at = gradients().data();
    for_each_parameter(config_, [&](const Parameter& p) {
      if (p.role == Role::gain || (p.role == Role::embedding && !config_.tied)) fill(*dev_, at, p.size(), 0.0f);
      at += p.size();
    });
  }

  index_t row_tokens(std::size_t size) const {
    const auto n = static_cast<index_t>(size), tokens = options_.tokens > 0 ? options_.tokens : std::min<index_t>(config_.context, n);
    if (n == 0 || n % tokens) throw Error("trainer", "inputs", "rows of " + std::to_string(tokens) + " tokens", std::to_string(n));
    return tokens;
  }
  /// f(inputs, targets) for each micro-batch of whole rows.
  template <class F>
  void each_micro(std::span<const std::int32_t> inputs, std::span<const std::int32_t> targets, F&& f) const {
    const auto tokens = static_cast<std::size_t>(row_tokens(inputs.size()));
    const std::size_t micro = options_.micro_rows > 0 ? static_cast<std::size_t>(options_.micro_rows) * tokens : inputs.size();
    for (std::size_t at = 0; at < inputs.size(); at += micro) {
      const std::size_t n = std::min(micro, inputs.size() - at);
      f(inputs.subspan(at, n), targets.subspan(at, n));
    }
  }
  void rows_as_sequences(std::size_t size) {
    const index_t tokens = row_tokens(size);
    sequences_.clear();
    for (index_t r = 0; r < static_cast<index_t>(size); r += tokens) sequences_.push_back({r, tokens, 0, nullptr});
  }
  void check_batch(std::span<const std::int32_t> inputs, std::span<const std::int32_t> targets) const {
    if (inputs.size() != targets.size()) throw Error("trainer", "targets", std::to_string(inputs.size()) + ", as inputs", std::to_string(targets.size()));
    const auto outside = [&](std::string_view what, std::size_t i, std::int32_t id) {
      throw Error("trainer", std::string(what) + " at " + std::to_string(i), "an id below " + std::to_string(config_.vocab), std::to_string(id));
    };
    bool any = false;
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      if (inputs[i] < 0 || inputs[i] >= config_.vocab) outside("input", i, inputs[i]);
      if (targets[i] >= config_.vocab) outside("target", i, targets[i]);
      any |= targets[i] >= 0;
    }
    if (!any) throw Error("trainer", "targets", "at least one that counts", inputs.empty() ? "none at all" : "only such as do not");
  }
  static std::int64_t counted(std::span<const std::int32_t> targets) { return std::count_if(targets.begin(), targets.end(), [](std::int32_t t) { return t >= 0; }); }

  D* dev_;
  TrainerOptions options_;
  C config_;
  Memory<D> weights_;  // with LoRA: what stays as it is
  Memory<D> state_;    // of what is learned: values, gradient, first and second moment
  LearnedWeights<C> learned_;
  TrainingPass<C, D> pass_;
  std::vector<Sequence> sequences_;
  std::vector<float> row_weights_;
  bool fresh_ = true;  // no micro-batch of this step yet
  double loss_ = 0;
  std::int64_t step_ = 0, micro_ = 0;
  StepReport report_;
};

}  // namespace tinyllama
