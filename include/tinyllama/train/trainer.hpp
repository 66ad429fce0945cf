// Trainer: a model that learns. step() is one optimizer step; the pieces it is made of are public, to be used one by one.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <initializer_list>
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
#include "tinyllama/train/peers.hpp"
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
/// of a shape. With `peers`, which outlive it, it is one of several that learn one model together: each is called alike, with its own rows of the batch, and
/// what is said of a batch holds for the rows of all.
template <Config C, TrainingDevice D = Cpu>
class Trainer {
 public:
  /// Initial weights as in the paper (train/initialise.hpp).
  explicit Trainer(D& dev, const TrainerOptions& options = {}, const C& config = {}, Peers<D>* peers = nullptr) : Trainer(dev, options, config, peers, 0) {
    if (sharding() != Sharding::fsdp) initialise(dev, config_, weights_data(), options_.seed);
    else fill_shards([&](const Parameter& p, std::uint64_t tensor, float* to) { initialise(dev, config_, p, tensor, to, options_.seed); });
  }
  /// The weights of a checkpoint, whose config must be C's. Throws Error.
  Trainer(D& dev, const Checkpoint& file, const TrainerOptions& options = {}, const C& config = {}, Peers<D>* peers = nullptr)
      : Trainer(dev, options, config, peers, 0) {
    if (!same_model(describe(config_), file.config))
      throw Error(file.path, "config", "that of the trainer", preset_name(file.config).empty() ? "another" : std::string(preset_name(file.config)));
    if (sharding() != Sharding::fsdp) read_flat(file, weights());
    else fill_shards([&](const Parameter& p, std::uint64_t, float* to) { read_flat(file, p, to); });
  }

  ~Trainer() {
    if (peers_) peers_->detach();
  }
  Trainer(const Trainer&) = delete;
  Trainer& operator=(const Trainer&) = delete;

  /// One optimizer step on B rows of T tokens: `inputs` and `targets` [B, T], where a target is the next id, or below 0 where it does not
  /// count. Returns the mean loss. Throws Error for an id outside the vocabulary, or where no target counts.
  float step(std::span<const std::int32_t> inputs, std::span<const std::int32_t> targets) {
    check_batch(inputs, targets);
    const std::int64_t count = total(counted(targets));
    check_counted(count, inputs);
    begin_step(peers_ ? micro_batches(inputs.size()) : -1);
    each_micro(inputs, targets, [&](auto in, auto out) {
      if (peers_ || counted(out) > 0) accumulate(in, out, 1.0f / static_cast<float>(count));
    });
    return end_step(count);
  }

  // ---- the pieces of a step ------------------------------------------------------------------------------------------------------------

  /// Begins a step: the next gradients replace those that are there. `passes`: how many accumulate() there will be on this rank; with peers the gradients then
  /// leave during the last of them, and with fsdp it must be known. Collective where it is given.
  void begin_step(std::int64_t passes = -1) {
    fresh_ = true, loss_ = 0, micro_ = 0, accumulated_ = 0, passes_ = passes;
    finished_ = false;
    if (!peers_) return;
    if (passes >= 0) passes_ = most(passes);
    peers_->begin_step();
  }

  /// The sum of each rank's number: of targets that count, for instance. Collective, so not between begin_step() and end_step(), where ranks differ in what they
  /// have done.
  std::int64_t total(std::int64_t mine) {
    if (!peers_) return mine;
    double sum = static_cast<double>(mine);
    peers_->sum({&sum, 1});
    return static_cast<std::int64_t>(sum);
  }

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
    if (!peers_) check_counted(counted(targets), inputs);
    if (sharding() == Sharding::fsdp && passes_ < 0) throw Error("trainer", "begin_step", "the number of passes, for fsdp", "none given");
    ++accumulated_;
    start(inputs, batch, true);
    if (std::exchange(fresh_, false) && sharding() != Sharding::fsdp) clear_small();
    const auto losses = pass_.backward(learned_, inputs, targets, weights, batch);
    for (std::size_t i = 0; i < losses.size(); ++i) loss_ += static_cast<double>(losses[i]) * weights[i];
    if (sharding() != Sharding::fsdp) learned_.for_each_matrix([](LearnedMatrix& m) { m.how.accumulate = true; });
  }

  /// The global 2-norm of the gradient. Collective.
  float gradient_norm() {
    finish_passes();
    double squares = 0;
    if (owns_all()) {
      squares = sum_of_squares(*dev_, own_gradients_, learned_size());
    } else {
      for (int p = 0; p < partition_.parts(); ++p) squares += sum_of_squares(*dev_, own_gradients_ + partition_.own_offset(p), partition_.shard(p, peers_->rank()).size());
      peers_->sum({&squares, 1});
    }
    return static_cast<float>(std::sqrt(squares));
  }

  /// AdamW on all weights with the gradient times `scale`. Collective.
  void update(float lr, float scale) {
    finish_passes();
    const auto step = static_cast<float>(step_ + 1);
    AdamwTask t{nullptr, nullptr, nullptr, nullptr, 0, lr, options_.beta1, options_.beta2, options_.eps, 0,
                1.0f - std::pow(options_.beta1, step), 1.0f - std::pow(options_.beta2, step), scale};
    const auto run = [&](const Interval& piece, index_t own, bool decays) {  // `own`: where the piece is in arrays of what is owned
      t.n = piece.size(), t.decay = decays ? options_.weight_decay : 0.0f;
      t.p = learned_values() + (sharding() == Sharding::fsdp ? own : piece.begin);
      t.m = first_moment().data() + own, t.v = second_moment().data() + own, t.gradient = own_gradients_ + own;
      adamw(*dev_, t);
    };
    const auto run_owned = [&](const Interval& piece, bool decays) {
      if (owns_all()) return run(piece, piece.begin, decays);
      for (int p = 0; p < partition_.parts(); ++p) {
        const Interval shard = partition_.shard(p, peers_->rank()), mine = common(shard, piece);
        if (!mine.empty()) run(mine, partition_.own_offset(p) + mine.begin - shard.begin, decays);
      }
    };
    index_t at = 0;
    if (options_.lora) run_owned({0, learned_size()}, true);
    else for_each_parameter(config_, [&](const Parameter& p) { run_owned({at, at + p.size()}, p.role != Role::gain || options_.decay == WeightDecay::all), at += p.size(); });
    if (peers_) peers_->begin_sharing_weights();
    ++step_;
  }

  /// Clips, updates and reports; `count` is the number of targets that counted. Collective.
  float end_step(std::int64_t count) {
    finish_passes();
    if (peers_) peers_->sum({&loss_, 1});
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
    if (!peers_) check_counted(counted(targets), inputs);
    start(inputs, batch, false);
    return pass_.losses(learned_, targets);
  }
  /// Mean loss over the targets that count. Collective; a rank may have no rows.
  float evaluate(std::span<const std::int32_t> inputs, std::span<const std::int32_t> targets) {
    double sum = 0;
    const std::int64_t count = total(counted(targets)), mine = micro_batches(inputs.size());
    const bool gathers = sharding() == Sharding::fsdp;
    const std::int64_t all = gathers ? most(mine) : mine;
    each_micro(inputs, targets, [&](auto in, auto out) {
      if (counted(out) == 0 && !gathers) return;
      for (const float l : losses(in, out)) sum += static_cast<double>(l);
    });
    for (std::int64_t n = mine; n < all; ++n) losses(padding_id_, padding_target_, padding_sequence_);
    if (peers_) peers_->sum({&sum, 1});
    return static_cast<float>(sum / static_cast<double>(std::max<std::int64_t>(1, count)));
  }

  /// The weights as they are now (adapters merged), packed to generate with; a copy. Collective.
  Model<C, D> model(std::optional<Tokenizer> tokenizer = {}, const LoadOptions& options = {}) {
    std::vector<float> merged;
    if (sharding() == Sharding::fsdp) merged = whole(weights());
    std::span<const float> now = merged.empty() ? weights() : merged;
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

  // With peers that shard them, these are a rank's own shards (partition()): of the moments with zero1 and fsdp, of weights and gradients with fsdp. whole() has
  // all of them.

  /// The model's weights, [parameter_count(C)].
  std::span<float> weights() {
    if (peers_) peers_->finish_sharing_weights();
    return options_.lora ? std::span<float>(weights_data(), static_cast<std::size_t>(parameter_count(config_))) : array(0);
  }
  /// The adapters' weights, [adapter_parameter_count]; empty without LoRA.
  std::span<float> adapters() {
    if (peers_) peers_->finish_sharing_weights();
    return options_.lora ? array(0) : std::span<float>();
  }
  /// Of what is learned, weights or adapters.
  std::span<float> gradients() { return array(1); }
  std::span<float> first_moment() { return array(2); }
  std::span<float> second_moment() { return array(3); }
  /// Of the step, summed over all ranks and not clipped, of all that is learned; a copy. Collective.
  std::vector<float> whole_gradients() {
    finish_passes();
    return whole({own_gradients_, static_cast<std::size_t>(owns_all() ? learned_size() : partition_.own_size())});
  }
  /// One of the arrays above with the other ranks' shards; a copy. Collective.
  std::vector<float> whole(std::span<const float> own) {
    if (static_cast<index_t>(own.size()) != partition_.own_size() || owns_all()) return {own.begin(), own.end()};
    std::vector<float> all(static_cast<std::size_t>(learned_size()));
    for (int p = 0; p < partition_.parts(); ++p) {
      const auto part = peers_->gather(p, own.data());
      std::copy(part.begin(), part.end(), all.begin() + partition_.part(p).begin);
    }
    return all;
  }
  Peers<D>* peers() const { return peers_; }
  Sharding sharding() const { return peers_ ? peers_->sharding() : Sharding::none; }
  const Partition& partition() const { return partition_; }
  /// Goes on behind step n, whose arrays are in place.
  void resume(std::int64_t n) { step_ = n; }

  /// Bytes on the device, to be compared with training_plan().
  std::size_t bytes() const { return weights_.bytes() + state_.bytes() + pass_.bytes() + (peers_ ? peers_->bytes() : 0); }

 private:
  Trainer(D& dev, const TrainerOptions& options, const C& config, Peers<D>* peers, int)
      : dev_(&dev), options_(options), config_(config), peers_(peers), pass_(dev) {
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
    if (options_.lora && sharding() == Sharding::fsdp) throw Error("trainer", "sharding", "ddp or zero1 for adapters", "fsdp");
    const std::size_t float_bytes = sizeof(float);
    partition_ = Partition::of(config_, options_.lora, peers_ ? peers_->ranks() : 1);
    const auto all = static_cast<std::size_t>(learned_size()), own = static_cast<std::size_t>(partition_.own_size());
    const std::size_t values = sharding() == Sharding::fsdp ? own : all, moments = owns_all() ? all : own;
    begin_ = {0, values, 2 * values, 2 * values + moments, 2 * values + 2 * moments};
    if (options_.lora) weights_ = Memory<D>(dev, static_cast<std::size_t>(parameter_count(config_)) * float_bytes);
    state_ = Memory<D>(dev, begin_.back() * float_bytes);
    fill(dev, reinterpret_cast<float*>(state_.data()), static_cast<index_t>(begin_.back()), 0.0f);
    own_gradients_ = gradients().data();
    if (peers_) peers_->attach(dev, {partition_, config_.tied, learned_values(), gradients().data()});
    if (options_.lora) {
      const std::vector<float> initial = initial_adapters(config_, *options_.lora);
      std::copy(initial.begin(), initial.end(), adapters().begin());
    }
    lay_out();
  }

  index_t learned_size() const {
    return static_cast<index_t>(options_.lora ? adapter_parameter_count(config_, *options_.lora) : parameter_count(config_));
  }
  std::span<float> array(std::size_t which) { return {reinterpret_cast<float*>(state_.data()) + begin_[which], begin_[which + 1] - begin_[which]}; }
  /// This rank updates all that is learned.
  bool owns_all() const { return sharding() == Sharding::none || sharding() == Sharding::ddp; }

  /// fill(parameter, its number, to) for all weights, a part at a time; this rank's shards stay.
  template <class F>
  void fill_shards(F&& fill_one) {
    index_t largest = 0;
    for (int p = 0; p < partition_.parts(); ++p) largest = std::max(largest, partition_.part(p).size());
    std::vector<float> part(static_cast<std::size_t>(largest));
    int now = 0;
    index_t at = 0;
    std::uint64_t tensor = 0;
    for_each_parameter(config_, [&](const Parameter& p) {
      fill_one(p, tensor++, part.data() + (at - partition_.part(now).begin));
      at += p.size();
      if (at < partition_.part(now).end) return;
      const Interval mine = partition_.shard(now, peers_->rank());
      dev_->upload(learned_values() + partition_.own_offset(now), part.data() + (mine.begin - partition_.part(now).begin), static_cast<std::size_t>(mine.size()) * sizeof(float));
      ++now;
    });
  }
  float* weights_data() { return reinterpret_cast<float*>((options_.lora ? weights_ : state_).data()); }
  float* learned_values() { return array(0).data(); }

  /// What a pass reads, as matrices: Q, K and V lie one behind the other, and gate and up, so that they are one matrix each.
  void lay_out() {
    learned_.config = config_;
    learned_.layers.resize(static_cast<std::size_t>(config_.layers));
    learned_.frequencies = rope_frequencies(config_);
    if (sharding() == Sharding::fsdp) return;
    const bool frozen = options_.lora.has_value();
    float *at = weights_data(), *gradient = frozen ? nullptr : gradients().data();
    for_each_part(config_, [&](int part, index_t n) {
      place(part, at, gradient);
      at += n;
      if (gradient) gradient += n;
    });
    if (frozen) add_adapters();
  }

  /// Points the part's matrices and gains at its weights and (null: none) their gradient.
  void place(int part, float* at, float* gradient) {
    const GemmOptions how{options_.precision == Precision::bf16, false};
    LearnedLayer* const l = part > 0 && part <= config_.layers ? &learned_.layers[static_cast<std::size_t>(part - 1)] : nullptr;
    const auto matrix = [&](LearnedMatrix& m, std::initializer_list<index_t> rows, index_t columns) {
      m.value = at, m.gradient = gradient, m.columns = columns, m.how = how, m.rows = 0;
      for (const index_t r : rows) m.rows += r;
      at += m.rows * columns;
      if (gradient) gradient += m.rows * columns;
    };
    const index_t d = config_.hidden, kv = static_cast<index_t>(config_.kv_heads) * head_dim(config_), f = config_.ffn;
    const auto gain = [&](const float*& value, float*& gradient_of) {
      value = at, gradient_of = gradient;
      at += d;
      if (gradient) gradient += d;
    };
    if (l) {
      gain(l->attn_norm, l->d_attn_norm);
      matrix(l->qkv, {d, kv, kv}, d), matrix(l->o, {d}, d);
      gain(l->ffn_norm, l->d_ffn_norm);
      matrix(l->gate_up, {f, f}, d), matrix(l->down, {d}, f);
    } else if (part == 0) {
      matrix(learned_.embedding, {index_t{config_.vocab}}, d);
      if (config_.tied) learned_.head = learned_.embedding;
    } else {
      gain(learned_.final_norm, learned_.d_final_norm);
      if (!config_.tied) matrix(learned_.head, {index_t{config_.vocab}}, d);
    }
  }
  /// The same for a pass whose weights come and go.
  void place_sharded(int part, float* at, float* gradient) {
    place(part, at, gradient);
    if (!gradient) return;
    for_each_parameter(config_, [&](const Parameter& p) {
      const int here = p.layer >= 0 ? p.layer + 1 : p.slot == Slot::embedding ? 0 : static_cast<int>(config_.layers) + 1;
      if (here != part) return;
      if (always_added(p)) fill(*dev_, gradient, p.size(), 0.0f);
      gradient += p.size();
    });
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
    const std::uint64_t key = random_bits(options_.seed ^ 0x6472'6f70'6f75'7400u, static_cast<std::uint64_t>(step_) << 20 | dropout_place());
    learned_.for_each_matrix([&](LearnedMatrix& m) {
      m.work = pass_.adapter_work();
      for (int i = 0; i < m.adapter_count; ++i) {
        m.adapters[static_cast<std::size_t>(i)].dropout = learning ? lora.dropout : 0.0f;
        m.adapters[static_cast<std::size_t>(i)].key = random_bits(key, place++);
      }
    });
    pass_.hook(peers_ ? peers_->begin_pass(learning, learning && accumulated_ == passes_, place_) : nullptr);
    pass_.forward(learned_, inputs, batch);
  }
  /// Of the micro-batch within the step's, over all ranks.
  std::uint64_t dropout_place() {
    const auto n = static_cast<std::uint64_t>(micro_++);
    return peers_ ? n * static_cast<std::uint64_t>(peers_->ranks()) + static_cast<std::uint64_t>(peers_->rank()) : n;
  }

  /// Behind the last micro-batch of this rank: its share of the passes of those that have more, so that all take part in the same operations, and the sum of
  /// the gradients.
  void finish_passes() {
    if (!peers_ || finished_) return;
    while (accumulated_ < std::max<std::int64_t>(1, passes_)) {
      row_weights_.assign(1, 0.0f);
      accumulate(padding_id_, padding_target_, padding_sequence_, std::span<const float>(row_weights_));
    }
    own_gradients_ = peers_->finish_gradients();
    finished_ = true;
  }
  std::int64_t most(std::int64_t mine) {
    double n = static_cast<double>(mine);
    peers_->most({&n, 1});
    return static_cast<std::int64_t>(n);
  }

  /// The gradients that are always added to: of gains, and of an embedding that is not the head too.
  bool always_added(const Parameter& p) const { return p.role == Role::gain || (p.role == Role::embedding && !config_.tied); }
  void clear_small() {
    if (options_.lora) return;
    float* at = gradients().data();
    for_each_parameter(config_, [&](const Parameter& p) {
      if (always_added(p)) fill(*dev_, at, p.size(), 0.0f);
      at += p.size();
    });
  }

  index_t row_tokens(std::size_t size) const {
    const auto n = static_cast<index_t>(size), tokens = options_.tokens > 0 ? options_.tokens : std::min<index_t>(config_.context, n);
    if (n == 0 || n % tokens) throw Error("trainer", "inputs", "rows of " + std::to_string(tokens) + " tokens", std::to_string(n));
    return tokens;
  }
  std::int64_t micro_batches(std::size_t size) const {
    if (size == 0) return 0;
    const index_t rows = static_cast<index_t>(size) / row_tokens(size), micro = options_.micro_rows > 0 ? options_.micro_rows : rows;
    return (rows + micro - 1) / micro;
  }
  /// f(inputs, targets) for each micro-batch of whole rows.
  template <class F>
  void each_micro(std::span<const std::int32_t> inputs, std::span<const std::int32_t> targets, F&& f) const {
    if (peers_ && inputs.empty()) return;
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
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      if (inputs[i] < 0 || inputs[i] >= config_.vocab) outside("input", i, inputs[i]);
      if (targets[i] >= config_.vocab) outside("target", i, targets[i]);
    }
  }
  static void check_counted(std::int64_t count, std::span<const std::int32_t> inputs) {
    if (count == 0) throw Error("trainer", "targets", "at least one that counts", inputs.empty() ? "none at all" : "only such as do not");
  }
  static std::int64_t counted(std::span<const std::int32_t> targets) { return std::count_if(targets.begin(), targets.end(), [](std::int32_t t) { return t >= 0; }); }

  D* dev_;
  TrainerOptions options_;
  C config_;
  Peers<D>* peers_;
  Partition partition_;
  Memory<D> weights_;  // with LoRA: what stays as it is
  Memory<D> state_;    // of what is learned: values, gradient, first and second moment
  std::array<std::size_t, 5> begin_{};  // where they begin in it, and the end
  float* own_gradients_ = nullptr;      // complete, of what this rank updates
  LearnedWeights<C> learned_;
  TrainingPass<C, D> pass_;
  std::vector<Sequence> sequences_;
  std::vector<float> row_weights_;
  bool fresh_ = true;  // no micro-batch of this step yet
  double loss_ = 0;
  std::int64_t step_ = 0, micro_ = 0;
  std::int64_t accumulated_ = 0, passes_ = -1;       // accumulate() of this step so far, and the most of a rank; below 0: not known
  bool finished_ = true;                             // the gradients of this step are summed over the ranks
  typename Peers<D>::Place place_ = [this](int part, float* values, float* gradients) { place_sharded(part, values, gradients); };
  std::array<std::int32_t, 1> padding_id_{0}, padding_target_{-1};  // a micro-batch that adds nothing
  std::array<Sequence, 1> padding_sequence_{Sequence{0, 1, 0, nullptr}};
  StepReport report_;
};

}  // namespace tinyllama
