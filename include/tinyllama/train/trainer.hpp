// Trainer: a model that learns. step() is one optimizer step; the pieces it is made of are public, to be used one by one.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "tinyllama/device/cpu.hpp"
#include "tinyllama/model/gradient.hpp"
#include "tinyllama/model/model.hpp"
#include "tinyllama/train/batch_rows.hpp"
#include "tinyllama/train/flat_model.hpp"
#include "tinyllama/train/initialise.hpp"
#include "tinyllama/train/learned_arrays.hpp"
#include "tinyllama/train/merge.hpp"
#include "tinyllama/train/peers.hpp"
#include "tinyllama/train/trainer_options.hpp"

namespace tinyllama {

/// The weights of config C, their gradients and AdamW's moments (arXiv 1711.05101) on a device, which outlives it. All arrays are flat, in the
/// order of for_each_parameter (with LoRA: of for_each_adapter), and in the device's memory: host() and put() where the host cannot touch it. The same bits
/// for any number of threads; no allocation after the first step of a shape. With `peers`, which outlive it, it is one of several that learn one model together:
/// each is called alike, with its own rows of the batch, and what is said of a batch holds for the rows of all.
template <Config C, TrainingDevice D = Cpu>
class Trainer {
  using A = typename D::activation;

 public:
  /// Initial weights as in the paper (train/initialise.hpp).
  explicit Trainer(D& dev, const TrainerOptions& options = {}, const C& config = {}, Peers<D>* peers = nullptr) : Trainer(dev, options, config, peers, 0) {
    auto& threads = threads_of_host();
    fill_weights([&](std::span<float> to) { initialise(threads, config_, to.data(), options_.seed); },
                 [&](const Parameter& p, std::uint64_t tensor, float* to) { initialise(threads, config_, p, tensor, to, options_.seed); });
  }
  /// The weights of a checkpoint, whose config must be C's. Throws Error.
  Trainer(D& dev, const Checkpoint& file, const TrainerOptions& options = {}, const C& config = {}, Peers<D>* peers = nullptr)
      : Trainer(dev, options, config, peers, 0) {
    if (!same_model(describe(config_), file.config))
      throw Error(file.path, "config", "that of the trainer", preset_name(file.config).empty() ? "another" : std::string(preset_name(file.config)));
    fill_weights([&](std::span<float> to) { read_flat(file, to); }, [&](const Parameter& p, std::uint64_t, float* to) { read_flat(file, p, to); });
  }
  Trainer(const Trainer&) = delete;
  Trainer& operator=(const Trainer&) = delete;

  /// One optimizer step on B rows of T tokens: `inputs` and `targets` [B, T], where a target is the next id, or below 0 where it does not
  /// count. Returns the mean loss. Throws Error for an id outside the vocabulary, or where no target counts.
  float step(std::span<const std::int32_t> inputs, std::span<const std::int32_t> targets) {
    rows_.check(inputs, targets);
    const std::int64_t count = total(BatchRows::counted(targets));
    BatchRows::check_counted(count, inputs);
    begin_step(peers_ ? rows_.micro_batches(inputs.size()) : -1);
    each_micro(inputs, targets, [&](auto in, auto out) {
      if (peers_ || BatchRows::counted(out) > 0) accumulate(in, out, 1.0f / static_cast<float>(count));
    });
    return end_step(count);
  }

  // ---- the pieces of a step ------------------------------------------------------------------------------------------------------------

  /// Begins a step: the next gradients replace those that are there. `passes`: how many accumulate() there will be on this rank; with peers the gradients then
  /// leave during the last of them, and with fsdp it must be known. Collective where it is given.
  void begin_step(std::int64_t passes = -1) {
    fresh_ = true, micro_ = 0, accumulated_ = 0, passes_ = passes;
    finished_ = false;
    dev_->zero(sums(), sizeof(StepSums));
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
    rows_.as_sequences(inputs.size(), sequences_);
    accumulate(inputs, targets, std::span<const Sequence>(sequences_), weight);
  }
  void accumulate(std::span<const std::int32_t> inputs, std::span<const std::int32_t> targets, std::span<const Sequence> batch, float weight) {
    row_weights_.assign(inputs.size(), weight);
    accumulate(inputs, targets, batch, std::span<const float>(row_weights_));
  }
  /// The same with a weight for each row, [T]: what preference losses need.
  void accumulate(std::span<const std::int32_t> inputs, std::span<const std::int32_t> targets, std::span<const Sequence> batch, std::span<const float> weights) {
    rows_.check(inputs, targets);
    if (!peers_) BatchRows::check_counted(BatchRows::counted(targets), inputs);
    if (sharding() == Sharding::fsdp && passes_ < 0) throw Error("trainer", "begin_step", "the number of passes, for fsdp", "none given");
    ++accumulated_;
    start(inputs, targets, batch, weights, true);
    auto& learned = arrays_.learned();
    const bool first = std::exchange(fresh_, false);
    const auto work = [&](const auto& run) {
      pass_.forward(learned, batch, run);
      if (first && sharding() != Sharding::fsdp) arrays_.clear_small();
      pass_.backward(learned, batch, run);
      add_loss(*dev_, sums(), pass_.device_losses(), pass_.device_weights(), pass_.rows());
    };
    kind_.assign({pass_work, first});
    pass_.describe(kind_, batch);
    if (options_.lora && options_.lora->dropout > 0) {  // other keys each time
      work(at_once);
    } else if (!peers_) {
      recording_.run(*dev_, kind_, batch, first, [&] { work(at_once); });
    } else {  // told of each part as it comes: what they do themselves in between is not recorded
      const std::size_t whole = kind_.size();
      bool new_weights = first;
      work([&](PassSegment s, const auto& f) {
        kind_.resize(whole);
        pass_.describe(kind_, learned, s);
        recording_.run(*dev_, kind_, batch, std::exchange(new_weights, false), f);
      });
    }
    if (sharding() != Sharding::fsdp) learned.for_each_matrix([](LearnedMatrix<A>& m) { m.how.accumulate = true; });
  }

  /// The global 2-norm of the gradient. Collective.
  float gradient_norm() {
    finish_passes();
    const std::span<const float> own = arrays_.own_gradients();
    double squares = sum_of_squares(*dev_, own.data(), static_cast<index_t>(own.size()));
    if (!arrays_.owns_all()) peers_->sum({&squares, 1});
    return static_cast<float>(std::sqrt(squares));
  }

  /// AdamW on all weights with the gradient times `scale`. Collective.
  void update(float lr, float scale) {
    finish_passes();
    arrays_.agree();
    arrays_.update(adamw_task(lr, scale));
    arrays_.share();
    ++step_;
  }

  /// Clips, updates and reports; `count` is the number of targets that counted. Collective.
  float end_step(std::int64_t count) {
    const float lr = learning_rate();
    const AdamwTask numbers = adamw_task(lr, 0);
    const AdamwStep step{numbers.lr, numbers.correction1, numbers.correction2, numbers.key, 0};
    std::memcpy(numbers_.begin(sizeof step), &step, sizeof step);
    if (peers_) sum_of_ranks();
    // The device goes on by itself, with numbers that it has, and the host waits once.
    arrays_.agree();
    kind_.assign({update_work, reinterpret_cast<std::uint64_t>(arrays_.own_gradients().data())});
    recording_.run(*dev_, kind_, {}, false, [&] {
      numbers_.bring(&sums()->adamw);
      if (!peers_) squares(arrays_.own_gradients());
      clip(*dev_, sums(), options_.clip);
      AdamwTask task = numbers;
      task.at = &sums()->adamw;
      arrays_.update(task);
    });
    arrays_.share();
    StepSums now{};
    dev_->download(&now, sums(), sizeof now);
    if (peers_) peers_->confirm();
    ++step_;
    report_ = {static_cast<float>(now.loss), now.norm, lr, count, std::isnan(now.adamw.scale)};
    return report_.loss;
  }

  // ---- without learning ----------------------------------------------------------------------------------------------------------------

  /// The loss of each target, [B T]; 0 where it does not count. Valid until the next call.
  std::span<const float> losses(std::span<const std::int32_t> inputs, std::span<const std::int32_t> targets) {
    rows_.as_sequences(inputs.size(), sequences_);
    return losses(inputs, targets, sequences_);
  }
  std::span<const float> losses(std::span<const std::int32_t> inputs, std::span<const std::int32_t> targets, std::span<const Sequence> batch) {
    rows_.check(inputs, targets);
    if (!peers_) BatchRows::check_counted(BatchRows::counted(targets), inputs);
    start(inputs, targets, batch, {}, false);
    pass_.forward(arrays_.learned(), batch);
    return pass_.losses(arrays_.learned());
  }
  /// Mean loss over the targets that count. Collective; a rank may have no rows.
  float evaluate(std::span<const std::int32_t> inputs, std::span<const std::int32_t> targets) {
    double sum = 0;
    const std::int64_t count = total(BatchRows::counted(targets)), mine = rows_.micro_batches(inputs.size());
    const bool gathers = sharding() == Sharding::fsdp;
    const std::int64_t all = gathers ? most(mine) : mine;
    each_micro(inputs, targets, [&](auto in, auto out) {
      if (BatchRows::counted(out) == 0 && !gathers) return;
      for (const float l : losses(in, out)) sum += static_cast<double>(l);
    });
    for (std::int64_t n = mine; n < all; ++n) losses(padding_ids_, padding_targets_, padding_sequence_);
    if (peers_) peers_->sum({&sum, 1});
    return static_cast<float>(sum / static_cast<double>(std::max<std::int64_t>(1, count)));
  }

  /// The weights as they are now (adapters merged), packed to generate with; a copy. Collective.
  Model<C, D> model(std::optional<Tokenizer> tokenizer = {}, const LoadOptions& options = {}) {
    const HostArray stored = options_.lora ? host(weights()) : whole_host(weights());
    std::span<const float> now = stored.values;
    std::vector<float> merged;
    if (options_.lora) {
      merged.assign(now.begin(), now.end());
      merge_adapters(threads_of_host(), config_, *options_.lora, merged, whole_host(adapters()).values);
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

  // With peers that shard them, these are a rank's own shards (partition()): of the moments with zero1 and fsdp, of gradients with fsdp, of values where
  // shards_values(). whole() has all of them.

  /// The model's weights, [parameter_count(C)].
  std::span<float> weights() {
    if (peers_) peers_->finish_sharing_weights();
    return arrays_.weights();
  }
  /// The adapters' weights, [adapter_parameter_count]; empty without LoRA.
  std::span<float> adapters() {
    if (peers_) peers_->finish_sharing_weights();
    return options_.lora ? arrays_.values() : std::span<float>();
  }
  /// Of what is learned, weights or adapters.
  std::span<float> gradients() { return arrays_.gradients(); }
  StoredMoment first_moment() { return arrays_.stored_moment(false); }
  StoredMoment second_moment() { return arrays_.stored_moment(true); }
  /// One of the arrays above for the host: itself, or a copy where the host cannot touch it, or it is not f32.
  HostArray host(std::span<float> array) const { return arrays_.host(array); }
  HostArray host(const StoredMoment& moment) { return arrays_.host(moment); }
  /// The host's values become those of one of the arrays above. Collective where the values are sharded.
  void put(std::span<float> array, std::span<const float> values) { arrays_.put(array, values); }
  void put(const StoredMoment& moment, std::span<const float> values) { arrays_.put(moment, values); }
  /// Behind a change of what weights() or adapters() have by other means than put(). Collective where the values are sharded.
  void values_changed() { arrays_.changed(); }
  /// Of the step, summed over all ranks and not clipped, of all that is learned; a copy in the host's memory. Collective.
  std::vector<float> whole_gradients() {
    finish_passes();
    return whole(arrays_.own_gradients());
  }
  /// One of the arrays above with the other ranks' shards; a copy in the host's memory. Collective.
  std::vector<float> whole(std::span<const float> own) {
    std::vector<float> all;
    if (static_cast<index_t>(own.size()) != partition().own_size() || arrays_.owns_all()) {
      all.resize(own.size());
      dev_->download(all.data(), own.data(), own.size_bytes());
      return all;
    }
    all.resize(static_cast<std::size_t>(arrays_.size()));
    for (int p = 0; p < partition().parts(); ++p) {
      const auto part = peers_->gather(p, own.data());
      std::copy(part.begin(), part.end(), all.begin() + partition().part(p).begin);
    }
    return all;
  }
  std::vector<float> whole(const StoredMoment& moment) {
    if (moment.array.format == Moments::f32) return whole(static_cast<std::span<float>>(moment));
    const HostArray mine = host(moment);
    if (arrays_.owns_all()) return mine.own;
    const Memory<D> own(*dev_, mine.own.size() * sizeof(float));
    dev_->upload(own.data(), mine.own.data(), own.bytes());
    return whole(std::span<float>(reinterpret_cast<float*>(own.data()), mine.own.size()));
  }
  /// The same without a copy where the host can touch it.
  HostArray whole_host(std::span<float> own) {
    if (!arrays_.shards_values()) return host(own);
    HostArray h{whole(own), {}};
    h.values = h.own;
    return h;
  }
  Peers<D>* peers() const { return peers_; }
  Sharding sharding() const { return arrays_.sharding(); }
  /// Whether values are this rank's shards: with fsdp, and with zero1 where products read an array of their own.
  bool shards_values() const { return arrays_.shards_values(); }
  const Partition& partition() const { return arrays_.partition(); }
  /// Goes on behind step n, whose arrays are in place.
  void resume(std::int64_t n) { step_ = n; }

  /// Bytes on the device, to be compared with training_plan().
  std::size_t bytes() const { return arrays_.bytes() + pass_.bytes(); }

 private:
  Trainer(D& dev, const TrainerOptions& options, const C& config, Peers<D>* peers, int)
      : dev_(&dev), options_(detail::checked<D>(options, config, peers ? peers->sharding() : Sharding::none)), config_(config), peers_(peers), arrays_(dev, config_, options_, peers), pass_(dev),
        rows_{options_.tokens, options_.micro_rows, config_.context, config_.vocab}, sums_(dev, sizeof(StepSums)), numbers_(dev) {
    dev_->zero(sums(), sizeof(StepSums));
    if (options_.lora) arrays_.put_learned(initial_adapters(config_, *options_.lora));
  }

  /// The device itself, or on a card the host's threads.
  auto& threads_of_host() {
    if constexpr (D::host_memory) {
      return *dev_;
    } else {
      if (!host_threads_) host_threads_.emplace();
      return *host_threads_;
    }
  }
  /// whole(span) fills all weights at once, one(parameter, its number, to) those of one.
  template <class Whole, class One>
  void fill_weights(Whole&& whole_of, One&& one) {
    if (arrays_.shards_values() && !options_.lora) return arrays_.fill_shards(one);
    if constexpr (D::host_memory) {
      whole_of(arrays_.weights());
    } else {
      std::vector<float> values(arrays_.weights().size());
      whole_of(std::span<float>(values));
      arrays_.put(arrays_.weights(), values);
    }
  }

  /// All that comes before the passes of a micro-batch; with dropout while learning.
  void start(std::span<const std::int32_t> inputs, std::span<const std::int32_t> targets, std::span<const Sequence> batch, std::span<const float> weights, bool learning) {
    const auto T = static_cast<index_t>(inputs.size());
    const LoraOptions lora = options_.lora.value_or(LoraOptions{.rank = 0});
    if (pass_.prepare(config_, {T, std::min(T, options_.logits_rows), options_.checkpointing, lora.rank, lora.dropout > 0})) recording_.clear();
    if (learning && fresh_) arrays_.learned().for_each_matrix([](LearnedMatrix<A>& m) { m.how.accumulate = false; });
    std::uint64_t place = 0;
    const std::uint64_t key = random_bits(options_.seed ^ 0x6472'6f70'6f75'7400u, static_cast<std::uint64_t>(step_) << 20 | dropout_place());
    arrays_.learned().for_each_matrix([&](LearnedMatrix<A>& m) {
      m.work = pass_.adapter_work();
      for (int i = 0; i < m.adapter_count; ++i) {
        m.adapters[static_cast<std::size_t>(i)].dropout = learning ? lora.dropout : 0.0f;
        m.adapters[static_cast<std::size_t>(i)].key = random_bits(key, place++);
      }
    });
    pass_.hook(peers_ ? peers_->begin_pass(learning, learning && accumulated_ == passes_, arrays_.place()) : nullptr);
    pass_.load(arrays_.learned(), inputs, targets, batch, weights);
  }
  StepSums* sums() const { return reinterpret_cast<StepSums*>(sums_.data()); }
  /// Of the next step.
  AdamwTask adamw_task(float lr, float scale) const {
    const auto step = static_cast<float>(step_ + 1);
    return {nullptr, nullptr, nullptr, nullptr, 0, lr, options_.beta1, options_.beta2, options_.eps, options_.weight_decay,
            1.0f - std::pow(options_.beta1, step), 1.0f - std::pow(options_.beta2, step), scale, nullptr,
            static_cast<std::uint32_t>(random_bits(options_.seed ^ 0x6d6f'6d65'6e74'7300u, static_cast<std::uint64_t>(step_)))};
  }
  /// Of the micro-batch within the step's, over all ranks.
  std::uint64_t dropout_place() {
    const auto n = static_cast<std::uint64_t>(micro_++);
    return peers_ ? n * static_cast<std::uint64_t>(peers_->ranks()) + static_cast<std::uint64_t>(peers_->rank()) : n;
  }

  /// Behind the last micro-batch of this rank: its share of the passes of those that have more, so that all take part in the same operations, and the sum of
  /// the gradients, of all parts or of those from `from` on.
  void finish_passes(int from = 0) {
    if (!peers_ || finished_) return;
    while (accumulated_ < std::max<std::int64_t>(1, passes_)) {
      row_weights_.assign(padding_ids_.size(), 0.0f);
      accumulate(padding_ids_, padding_targets_, padding_sequence_, std::span<const float>(row_weights_));
    }
    arrays_.own_gradients(peers_->finish_gradients(from));
    finished_ = from == 0;
  }
  /// The ranks' loss and gradients' squares, on the device. The embedding's gradient is complete last: while its sum travels, those of the others are squared.
  void sum_of_ranks() {
    const index_t others = arrays_.own_begin(1);
    finish_passes(others > 0 ? 1 : 0);
    squares(arrays_.own_gradients().subspan(static_cast<std::size_t>(others)));
    finish_passes();
    if (others > 0) squares(arrays_.own_gradients().first(static_cast<std::size_t>(others)));
    static_assert(offsetof(StepSums, squares) == offsetof(StepSums, loss) + sizeof(double));
    peers_->sum_on_device({&sums()->loss, arrays_.owns_all() ? std::size_t{1} : std::size_t{2}});
  }
  void squares(std::span<const float> gradient) { add_squares(*dev_, sums(), gradient.data(), static_cast<index_t>(gradient.size())); }
  /// A rank may have no rows.
  template <class F>
  void each_micro(std::span<const std::int32_t> inputs, std::span<const std::int32_t> targets, F&& f) const {
    if (!peers_ || !inputs.empty()) rows_.each_micro(inputs, targets, f);
  }
  std::int64_t most(std::int64_t mine) {
    double n = static_cast<double>(mine);
    peers_->most({&n, 1});
    return static_cast<std::int64_t>(n);
  }

  D* dev_;
  TrainerOptions options_;
  C config_;
  Peers<D>* peers_;
  LearnedArrays<C, D> arrays_;
  TrainingPass<C, D> pass_;
  std::optional<Cpu> host_threads_;
  BatchRows rows_;
  std::vector<Sequence> sequences_;
  std::vector<float> row_weights_;
  Memory<D> sums_;                    // StepSums
  StepInput<D> numbers_;              // their AdamwStep
  [[no_unique_address]] Recording<D> recording_;
  enum : std::uint64_t { pass_work, update_work };
  std::vector<std::uint64_t> kind_;   // of a micro-batch's work, or an update's
  bool fresh_ = true;  // no micro-batch of this step yet
  std::int64_t step_ = 0, micro_ = 0;
  std::int64_t accumulated_ = 0, passes_ = -1;       // accumulate() of this step so far, and the most of a rank; below 0: not known
  bool finished_ = true;                             // the gradients of this step are summed over the ranks
  // A micro-batch that adds nothing; of 16 rows, as products in 8-bit floats have them.
  std::array<std::int32_t, 16> padding_ids_{}, padding_targets_ = [] {
    std::array<std::int32_t, 16> none;
    none.fill(-1);
    return none;
  }();
  std::array<Sequence, 1> padding_sequence_{Sequence{0, 16, 0, nullptr}};
  StepReport report_;
};

}  // namespace tinyllama
