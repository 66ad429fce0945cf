// LearnedArrays: the flat arrays of a training on a device (values, gradient, moments, and what products read), of which this rank has all or its shards.
//
//            values       moments      what products read (an array of its own where that is not f32)
//   alone, ddp   whole        whole        whole
//   zero1        whole, or own shards where products read another array    own shards    whole
//   fsdp         own shards   own shards   own shards; a part is gathered while it computes
//
// Moments that are not f32 lie by themselves. Those in blocks begin anew with each part, and shards are whole blocks, so that what shares a scale does not depend on
// who has which shard.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "tinyllama/model/gradient.hpp"
#include "tinyllama/train/adapters.hpp"
#include "tinyllama/train/learned_parts.hpp"
#include "tinyllama/train/peers.hpp"
#include "tinyllama/train/trainer_options.hpp"

namespace tinyllama {

/// An array for the host: itself, or a copy where the host cannot touch it.
struct HostArray {
  std::vector<float> own;
  std::span<float> values;
};

/// One of AdamW's averages, as host(), put() and whole() of a trainer take it; where it is stored in f32, a span of the device's memory.
struct StoredMoment {
  MomentArray array;
  bool second = false;
  index_t n = 0;  // elements as the host sees them: all, or own shards with what pads them

  /// Throws Error where it is not f32.
  operator std::span<float>() const {
    if (array.format != Moments::f32) throw Error("trainer", second ? "second moment" : "first moment", "f32, to be read as it lies", std::string(name(array.format)));
    return {array.floats(), static_cast<std::size_t>(n)};
  }
  operator std::span<const float>() const { return static_cast<std::span<float>>(*this); }
};

/// The arrays, each in the order of for_each_parameter (with LoRA: of for_each_adapter); and learned(), what a pass makes of them.
template <Config C, TrainingDevice D>
class LearnedArrays {
  using A = typename D::activation;

 public:
  static constexpr bool rounds = !std::is_same_v<A, float>;  // products read a copy of the values in A

  LearnedArrays(D& dev, const C& config, const TrainerOptions& options, Peers<D>* peers)
      : dev_(&dev), config_(config), options_(&options), peers_(peers), partition_(Partition::of(config, options.lora, peers ? peers->ranks() : 1, std::max(cache_line, info(options.moments).block))) {
    moments_at_ = owns_all() ? Partition::of(config, options.lora, 1, info(options.moments).block) : partition_;
    const auto all = static_cast<std::size_t>(size()), own = static_cast<std::size_t>(partition_.own_size());
    const std::size_t values = shards_values() ? own : all, gradient = sharding() == Sharding::fsdp ? own : all, moments = in_f32() ? static_cast<std::size_t>(moments_at_.own_size()) : 0;
    begin_ = {0, values, values + gradient, values + gradient + moments, values + gradient + 2 * moments};
    state_ = floats(begin_.back());
    if (!in_f32()) {
      moments_ = Memory<D>(dev, 2 * moment_bytes(options.moments, moments_at_.own_size()));
      dev.zero(moments_.data(), moments_.bytes());
    }
    const auto elements = static_cast<std::size_t>(parameter_count(config_));
    if (options.lora) frozen_ = floats(elements);
    if constexpr (rounds) {
      if (sharding() != Sharding::fsdp) rounded_ = Memory<D>(dev, ((options.lora ? elements : 0) + all) * sizeof(A));
      if (shards_values()) rounded_own_ = Memory<D>(dev, own * sizeof(A));
      if (shards_values() && !options.lora) gains_ = floats(static_cast<std::size_t>(gain_count() * config_.hidden));
    }
    list_ranges();
    own_gradients_ = gradients().data();
    if (peers_)
      peers_->attach(dev, {partition_, config_.tied, sharding() == Sharding::fsdp ? nullptr : products(), shards_values() ? own_products() : nullptr, gradients().data(),
                           {reinterpret_cast<float*>(gains_.data()), gains_.bytes() / sizeof(float)}});
    lay_out();
  }
  ~LearnedArrays() {
    if (peers_) peers_->detach();
  }
  LearnedArrays(const LearnedArrays&) = delete;
  LearnedArrays& operator=(const LearnedArrays&) = delete;

  /// What is learned, of all ranks together.
  index_t size() const { return static_cast<index_t>(options_->lora ? adapter_parameter_count(config_, *options_->lora) : parameter_count(config_)); }
  Sharding sharding() const { return peers_ ? peers_->sharding() : Sharding::none; }
  const Partition& partition() const { return partition_; }
  /// This rank updates all that is learned.
  bool owns_all() const { return sharding() == Sharding::none || sharding() == Sharding::ddp; }
  /// The values are own shards. With zero1 they are a part of the optimizer's state, where products read another array.
  bool shards_values() const { return sharding() == Sharding::fsdp || (rounds && sharding() == Sharding::zero1); }

  std::span<float> values() { return array(0); }
  std::span<float> gradients() { return array(1); }
  /// m, and `second` v.
  StoredMoment stored_moment(bool second) { return {moment(second), second, owns_all() ? size() : partition_.own_size()}; }
  /// The model's weights: what is learned, or with LoRA what stays.
  std::span<float> weights() {
    return options_->lora ? std::span<float>(reinterpret_cast<float*>(frozen_.data()), static_cast<std::size_t>(parameter_count(config_))) : values();
  }
  /// Of what this rank owns, summed over the ranks, once they are; the padding between shards is 0.
  std::span<const float> own_gradients() const { return {own_gradients_, static_cast<std::size_t>(owns_all() ? size() : partition_.own_size())}; }
  void own_gradients(const float* complete) { own_gradients_ = complete; }
  /// Where in it a part begins; 0 where it cannot be taken apart there, by 16 bytes.
  index_t own_begin(int part) const {
    const index_t begin = owns_all() ? partition_.part(part).begin : partition_.own_offset(part);
    return begin % 4 == 0 ? begin : 0;
  }
  std::size_t bytes() const { return frozen_.bytes() + state_.bytes() + moments_.bytes() + rounded_.bytes() + rounded_own_.bytes() + gains_.bytes() + (peers_ ? peers_->bytes() : 0); }

  LearnedWeights<C, A>& learned() { return learned_; }
  /// For a pass whose weights come and go.
  const typename Peers<D>::Place& place() const { return place_; }

  /// An update, in three steps of which the second is this rank's alone. The ranks agree on what the device has seen in this step. Collective.
  void agree() {
    if (!peers_) return;
    if (const std::span<float> seen = magnitudes(*dev_); !seen.empty()) peers_->most_on_device(seen);
  }
  /// AdamW on what this rank owns, with the numbers of `t`.
  void update(AdamwTask t) {
    const float decay = t.decay;
    for (const Piece& piece : pieces_) {
      t.n = piece.n, t.decay = decay, t.place = static_cast<std::uint32_t>(piece.flat), t.goes_on = &piece != &pieces_.front();
      t.p = values().data() + piece.value, t.m = moment(false).from(piece.moment), t.v = moment(true).from(piece.moment), t.gradient = own_gradients_ + piece.own;
      adamw(*dev_, t, piece.ranges, (shards_values() ? own_products() : products()) + piece.value);
    }
    spread_gains();
  }
  /// What this rank has updated goes to the others. Collective.
  void share() {
    if (peers_) peers_->begin_sharing_weights();
  }

  /// The host's `from` becomes one of the arrays above; of the values, products then read it. Collective where the values are sharded.
  void put(std::span<float> to, std::span<const float> from) {
    if (from.size() != to.size()) throw Error("trainer", "values", std::to_string(to.size()), std::to_string(from.size()));
    if (from.data() != to.data()) dev_->upload(to.data(), from.data(), from.size_bytes());
    if (options_->lora && to.data() == weights().data()) {
      if constexpr (rounds) round_to(*dev_, reinterpret_cast<A*>(rounded_.data()), to.data(), static_cast<index_t>(to.size()));
    } else if (to.data() == values().data()) {
      changed();
    }
  }
  /// The same of all that is learned, of which this rank takes its share.
  void put_learned(std::span<const float> all) {
    if (!shards_values()) return put(values(), all);
    for (int p = 0; p < partition_.parts(); ++p) put_shard(p, all.data() + partition_.part(p).begin);
    changed();
  }
  /// The values of all parameters by fill(parameter, its number, to) in the host's memory, a part at a time; this rank's shards stay.
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
      if (at == partition_.part(now).end) put_shard(now++, part.data());
    });
    changed();
  }
  /// Behind a change of the values from outside: what products read follows, on all ranks. Collective where the values are sharded.
  void changed() {
    if constexpr (rounds) round_to(*dev_, shards_values() ? own_products() : products(), values().data(), static_cast<index_t>(values().size()));
    if (shards_values()) spread_gains(), share();
  }

  HostArray host(std::span<float> of) const {
    HostArray h;
    if constexpr (D::host_memory) {
      h.values = of;
    } else {
      h.own.resize(of.size());
      dev_->download(h.own.data(), of.data(), of.size_bytes());
      h.values = h.own;
    }
    return h;
  }

  /// A moment for the host, in f32: what it is, or what it decodes to.
  HostArray host(const StoredMoment& of) {
    if (in_f32()) return host(static_cast<std::span<float>>(of));
    HostArray h;
    h.own.resize(static_cast<std::size_t>(of.n));
    h.values = h.own;
    with_host_moment(of.array, [&](const MomentArray& m) {
      each_moment([&](index_t at, index_t to, index_t n) { decode_moment(m.from(at), of.second, h.own.data() + to, n); });
      return false;
    });
    return h;
  }
  /// The host's values become those of a moment, to the nearest that its format has: those of host() exactly.
  void put(const StoredMoment& to, std::span<const float> from) {
    if (in_f32()) return put(static_cast<std::span<float>>(to), from);
    if (static_cast<index_t>(from.size()) != to.n) throw Error("trainer", "values", std::to_string(to.n), std::to_string(from.size()));
    with_host_moment(to.array, [&](const MomentArray& m) {
      each_moment([&](index_t at, index_t in, index_t n) { encode_moment(m.from(at), to.second, from.data() + in, n); });
      return true;
    });
  }

  /// The gradients that are always added to are cleared: of gains, and of an embedding that is not the head too.
  void clear_small() {
    if (options_->lora) return;
    float* at = gradients().data();
    for_each_parameter(config_, [&](const Parameter& p) {
      if (always_added(p)) fill(*dev_, at, p.size(), 0.0f);
      at += p.size();
    });
  }

 private:
  /// Of what this rank owns, what AdamW takes at a time: where it begins among values, complete gradients and moments, and in the flat array.
  struct Piece {
    index_t value = 0, own = 0, moment = 0, flat = 0, n = 0;
    std::vector<AdamwRange> ranges;
  };
  /// Elements of the gains that this rank owns, to their place among all.
  struct OwnGain {
    index_t to, from, n;
  };

  Memory<D> floats(std::size_t n) const {
    Memory<D> m(*dev_, n * sizeof(float));
    fill(*dev_, reinterpret_cast<float*>(m.data()), static_cast<index_t>(n), 0.0f);
    return m;
  }
  std::span<float> array(std::size_t which) { return {reinterpret_cast<float*>(state_.data()) + begin_[which], begin_[which + 1] - begin_[which]}; }
  bool in_f32() const { return options_->moments == Moments::f32; }
  index_t gain_count() const { return 2 * index_t{config_.layers} + 1; }
  static constexpr index_t first_gain(int part) { return 2 * (index_t{part} - 1); }
  bool always_added(const Parameter& p) const { return p.role == Role::gain || (p.role == Role::embedding && !config_.tied); }

  /// What products read of all that is learned, and of this rank's shards.
  A* products() {
    if constexpr (rounds) return reinterpret_cast<A*>(rounded_.data()) + (options_->lora ? parameter_count(config_) : 0);
    else return values().data();
  }
  A* own_products() {
    if constexpr (rounds) return reinterpret_cast<A*>(rounded_own_.data());
    else return values().data();
  }

  void put_shard(int p, const float* part) {
    const Interval mine = partition_.shard(p, peers_->rank());
    dev_->upload(values().data() + partition_.own_offset(p), part + (mine.begin - partition_.part(p).begin), static_cast<std::size_t>(mine.size()) * sizeof(float));
  }
  /// Norms read gains in f32, so these are whole on each rank: a sum of what each owns, and zeros.
  void spread_gains() {
    if (gains_.bytes() == 0) return;
    auto* const to = reinterpret_cast<float*>(gains_.data());
    dev_->zero(to, gains_.bytes());
    for (const OwnGain& g : own_gains_) dev_->copy_bytes(to + g.to, values().data() + g.from, static_cast<std::size_t>(g.n) * sizeof(float));
  }

  /// pieces_ and own_gains_.
  void list_ranges() {
    struct Range {
      Interval at;
      bool decays;
    };
    std::vector<Range> ranges;  // of the flat array
    if (options_->lora) {
      ranges.push_back({{0, size()}, true});
    } else {
      index_t at = 0, gain = 0;
      for_each_parameter(config_, [&](const Parameter& p) {
        const Interval here{at, at + p.size()};
        const bool decays = p.role != Role::gain || options_->decay == WeightDecay::all;
        if (!ranges.empty() && ranges.back().decays == decays) ranges.back().at.end = here.end;
        else ranges.push_back({here, decays});
        at = here.end;
        if (p.role != Role::gain) return;
        if (shards_values()) each_shard([&](int part, const Interval& mine) {
          if (const Interval c = common(mine, here); !c.empty()) own_gains_.push_back({gain + c.begin - here.begin, partition_.own_offset(part) + c.begin - mine.begin, c.size()});
        });
        gain += p.size();
      });
    }
    const auto add = [&](Piece& piece, const Interval& flat) {
      for (const Range& r : ranges)
        if (const Interval c = common(flat, r.at); !c.empty()) {
          if (!piece.ranges.empty() && piece.ranges.back().decays == r.decays) piece.ranges.back().n += c.size();
          else piece.ranges.push_back({c.size(), r.decays});
          piece.n += c.size();
        }
    };
    if (!in_f32()) {  // blocks begin with a part, and rounding depends on the place in the flat array: parts together where both go on
      for (int p = 0; p < partition_.parts(); ++p) {
        const Interval mine = owns_all() ? partition_.part(p) : partition_.shard(p, peers_->rank());
        if (mine.empty()) continue;
        const index_t own = partition_.own_offset(p);
        const Piece here{shards_values() ? own : mine.begin, owns_all() ? mine.begin : own, moments_at_.own_offset(p), mine.begin, 0, {}};
        const auto follows = [&](const Piece& a) { return a.value + a.n == here.value && a.own + a.n == here.own && a.moment + a.n == here.moment && a.flat + a.n == here.flat; };
        add(!pieces_.empty() && follows(pieces_.back()) ? pieces_.back() : pieces_.emplace_back(here), mine);
      }
      return;
    }
    if (owns_all()) return add(pieces_.emplace_back(), {0, size()});
    each_shard([&](int part, const Interval& mine) {
      if (mine.empty()) return;
      const index_t own = partition_.own_offset(part);
      if (!shards_values()) return add(pieces_.emplace_back(Piece{mine.begin, own, own, mine.begin, 0, {}}), mine);
      // Shards one behind the other, with what pads them, which is 0 and stays so: one launch on a card.
      if (pieces_.empty()) pieces_.push_back({own, own, own, mine.begin, 0, {}});
      Piece& all = pieces_.back();
      if (const index_t padding = partition_.own_offset(part) - all.own - all.n; padding > 0) all.ranges.back().n += padding, all.n += padding;
      add(all, mine);
    });
  }
  MomentArray moment(bool second) {
    if (in_f32()) return array(second ? 3 : 2).data();
    return {options_->moments, moments_.data() + (second ? moments_.bytes() / 2 : 0), moments_at_.own_size()};
  }
  /// f(the moment in the host's memory); what f changed, and then returns true for, goes back.
  template <class F>
  void with_host_moment(const MomentArray& m, F&& f) {
    if constexpr (D::host_memory) {
      f(m);
    } else {
      std::vector<std::byte> copy(moments_.bytes() / 2);
      dev_->download(copy.data(), m.elements, copy.size());
      if (f(MomentArray(m.format, copy.data(), moments_at_.own_size()))) dev_->upload(m.elements, copy.data(), copy.size());
    }
  }
  /// f(where it begins among the moments, where for the host, elements) for what this rank has of each part.
  template <class F>
  void each_moment(F&& f) const {
    for (int p = 0; p < partition_.parts(); ++p) {
      if (owns_all()) f(moments_at_.own_offset(p), partition_.part(p).begin, partition_.part(p).size());
      else f(partition_.own_offset(p), partition_.own_offset(p), partition_.shards(p).chunk);
    }
  }

  /// f(part, this rank's shard of it)
  template <class F>
  void each_shard(F&& f) const {
    for (int p = 0; p < partition_.parts(); ++p) f(p, partition_.shard(p, peers_->rank()));
  }

  /// What a pass reads; with fsdp a part at a time, as place() is told of it.
  void lay_out() {
    learned_.config = config_;
    learned_.layers.resize(static_cast<std::size_t>(config_.layers));
    learned_.frequencies = rope_frequencies(config_);
    index_t begin = 0;
    for_each_part(config_, [&](int, index_t n) { part_begin_.push_back(std::exchange(begin, begin + n)); });
    if (sharding() == Sharding::fsdp) return;
    const bool frozen = options_->lora.has_value();
    const A* read = products();
    if constexpr (rounds) read = reinterpret_cast<const A*>(rounded_.data());
    else read = weights().data();
    for (std::size_t part = 0; part < part_begin_.size(); ++part)
      place_part(static_cast<int>(part), read + part_begin_[part], frozen ? nullptr : gradients().data() + part_begin_[part]);
    if (frozen) place_adapters(learned_, *options_->lora, static_cast<const A*>(products()), gradients().data());
  }
  void place_part(int part, const A* at, float* gradient) {
    const bool block = part > 0 && part <= config_.layers;
    const GemmOptions how{options_->precision != Precision::f32, false, options_->precision == Precision::fp8 && block, sharding() == Sharding::fsdp};
    // Gains beside rounded weights: all of them apart, or where the f32 weights are.
    const float* gains = nullptr;
    if constexpr (rounds)
      if (part > 0 && gains_.bytes() > 0) gains = reinterpret_cast<const float*>(gains_.data()) + first_gain(part) * config_.hidden;
    const float* flat = rounds && !gains ? weights().data() + part_begin_[static_cast<std::size_t>(part)] : nullptr;
    tinyllama::place_part(learned_, part, {at, gradient, gains, flat, how});
  }
  /// The same for a pass whose weights come and go.
  void place_sharded(int part, const A* at, float* gradient) {
    place_part(part, at, gradient);
    if (!gradient) return;
    for_each_parameter(config_, [&](const Parameter& p) {
      if (part_of(config_, p) != part) return;
      if (always_added(p)) fill(*dev_, gradient, p.size(), 0.0f);
      gradient += p.size();
    });
  }

  D* dev_;
  C config_;
  const TrainerOptions* options_;
  Peers<D>* peers_;
  Partition partition_;
  Partition moments_at_;   // where a part's moments lie: among those of all parts in whole blocks, or of own shards
  Memory<D> frozen_;       // with LoRA: the model's weights, in f32
  Memory<D> state_;        // of what is learned: values, gradient, first and second moment where these are f32
  Memory<D> moments_;      // where they are not: elements and scales of the first, and of the second
  std::array<std::size_t, 5> begin_{};  // where they begin in it, and the end
  Memory<D> rounded_;      // what products read where that is not f32: with LoRA the model's weights, then what is learned
  Memory<D> rounded_own_;  // the same of this rank's shards, on their way to the others
  Memory<D> gains_;        // where values are sharded and products read others
  std::vector<OwnGain> own_gains_;
  std::vector<Piece> pieces_;
  const float* own_gradients_ = nullptr;
  std::vector<index_t> part_begin_;  // of each part of the weights, in their flat array
  LearnedWeights<C, A> learned_;
  typename Peers<D>::Place place_ = [this](int part, const A* values, float* gradients) { place_sharded(part, values, gradients); };
};

}  // namespace tinyllama
