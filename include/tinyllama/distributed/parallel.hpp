// Parallel: data parallelism, ZeRO-1 and FSDP of a trainer over any device and communicator, by what a pass tells as it goes.
//
//   ddp    g = sum over ranks of g, a bucket of parts at a time, from the head down, while backward computes the parts below
//   zero1  the same, but each rank gets the sum of its own shards only, updates these, and sends the weights round; the next forward waits part by part
//   fsdp   before a part computes, its weights are gathered from all ranks' shards, and those of the next part begin to be; after its backward, its gradient is
//          summed into the shards
//
// With micro-batches, ddp and zero1 add up at home and communicate in the last one only; fsdp, which has no room for whole gradients, in each.
#pragma once

#include <algorithm>
#include <array>
#include <exception>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "tinyllama/distributed/communicator.hpp"
#include "tinyllama/train/peers.hpp"

namespace tinyllama {

struct ParallelOptions {
  Sharding sharding = Sharding::ddp;
  /// ddp: parts are summed together until they have so many bytes, since a message has a cost of its own: 25 MB take some 0.1 ms over NVLink, ten times that.
  std::size_t bucket_bytes = default_bucket_bytes;
  /// What gradients are while they are summed: f32, or bf16, which takes half the time on the wires and rounds each rank's gradient and each sum of two to 8 bits.
  /// Weights travel as products read them whatever this is. For communicators that can (Nccl).
  Format wire = Format::f32;
  /// ddp, zero1: so many sums are under way at once, 0: as many as the communicator likes (fsdp has two by its buffers).
  std::size_t in_flight = 0;
};

/// Serves one trainer at a time; communicator, and device of the trainer, outlive it.
template <class D, Communicator M>
class Parallel final : public Peers<D>, private PassHooks {
  using Request = typename M::Request;
  using Arrays = typename Peers<D>::Arrays;
  using Place = typename Peers<D>::Place;
  using A = typename D::activation;  // of gathered weights

 public:
  explicit Parallel(M& communicator, const ParallelOptions& options = {}) : m_(&communicator), options_(options) {
    if (options.sharding == Sharding::none) throw Error("Parallel", "sharding", "ddp, zero1 or fsdp", "none");
    if (std::find(wire_formats.begin(), wire_formats.end(), options.wire) == wire_formats.end()) throw Error("Parallel", "wire", "f32 or bf16", std::string(name(options.wire)));
    if (options.wire != Format::f32 && !narrows && m_->size() > 1) throw Error("Parallel", "wire", "f32, over a communicator that adds up on the way as it is given", std::string(name(options.wire)));
  }

  int rank() const override { return m_->rank(); }
  int ranks() const override { return m_->size(); }
  Sharding sharding() const override { return options_.sharding; }
  void sum(std::span<double> values) override { m_->reduce(values, Reduction::sum, "sums of a step"); }
  void most(std::span<double> values) override { m_->reduce(values, Reduction::max, "counts of a step"); }
  void most_on_device(std::span<float> values) override {
    Request r = m_->start_all_reduce(values.data(), static_cast<index_t>(values.size()), Format::f32, Reduction::max, "magnitudes of a step");
    m_->wait(r);
  }
  void sum_on_device(std::span<double> values) override {
    if constexpr (requires { m_->start_all_reduce(values, Reduction::sum, ""); }) {
      Request r = m_->start_all_reduce(values, Reduction::sum, "sums of a step");
      m_->wait(r);
    } else if constexpr (D::host_memory) {
      sum(values);
    } else {
      std::vector<double> host(values.size());
      dev_->download(host.data(), values.data(), values.size_bytes());
      sum(host);
      dev_->upload(values.data(), host.data(), values.size_bytes());
    }
  }
  void confirm() override {
    if constexpr (requires { m_->confirm("a step"); }) m_->confirm("a step");
  }
  void broadcast(std::span<std::byte> bytes, int from) override { m_->broadcast(bytes, from, "bytes"); }
  void barrier() override { m_->barrier("all ranks"); }

  void attach(D& dev, const Arrays& arrays) override {
    dev_ = &dev, arrays_ = arrays;
    const Partition& p = arrays_.partition;
    const auto parts = static_cast<std::size_t>(p.parts());
    gather_.clear(), reduce_.clear(), flying_.clear(), gather_.resize(parts), reduce_.resize(parts);
    weights_names_.clear(), gradients_names_.clear();
    index_t largest = 0, largest_shard = 0;
    for (int i = 0; i < p.parts(); ++i) {
      const std::string part = i == 0 ? "the embedding" : i + 1 == p.parts() ? "the head" : "layer " + std::to_string(i - 1);
      weights_names_.push_back("weights of " + part), gradients_names_.push_back("gradients of " + part);
      largest = std::max(largest, p.shards(i).chunk * p.ranks()), largest_shard = std::max(largest_shard, p.shards(i).chunk);
    }
    part_floats_ = largest;
    if (narrow()) travelling_ = Memory<D>(*dev_, wire_bytes(options_.wire, sharding(), largest, options_.bucket_bytes));
    if (zero1()) summed_ = zeros(p.own_size());
    if (!fsdp()) return;
    const auto n = static_cast<std::size_t>(fsdp_buffers(arrays_.tied));
    for (std::size_t i = 0; i < n; ++i) {
      values_[i].memory = Memory<D>(*dev_, static_cast<std::size_t>(largest) * sizeof(A)), values_[i].part = -1;
      gradients_[i].memory = floats(largest), gradients_[i].part = -1;
      addends_[i] = floats(largest_shard);
    }
    buffers_ = n;
  }

  void detach() noexcept override {
    if (std::uncaught_exceptions() > 0) return;  // the others may be waiting for us no more
    try {
      m_->wait(gains_);
      for (auto* requests : {&gather_, &reduce_})
        for (Request& r : *requests) m_->wait(r);
      for (auto* buffers : {&values_, &gradients_})
        for (Buffer& b : *buffers) m_->wait(b.request), b.part = -1;
    } catch (...) {  // the next call says so again
    }
  }

  void begin_step() override { next_ = arrays_.partition.parts() - 1, pass_ = 0, summed_down_to_ = next_ + 1; }

  PassHooks* begin_pass(bool learning, bool last, const Place& place) override {
    last_ = learning && last, place_ = &place;
    pass_ += learning;
    if (fsdp() && changed_) {  // since the last pass; what the buffers hold is old
      for (Buffer& b : values_) b.part = -1;
      changed_ = false;
    }
    return this;
  }

  float* finish_gradients(int from) override {
    if (fsdp()) {
      for (std::size_t i = 0; i < buffers_; ++i)
        if (gradients_[i].part >= from) finish_sum(gradients_[i], i);
      return arrays_.gradients;
    }
    for (; summed_down_to_ > 0; --next_) sum_down_to(next_);
    std::erase_if(flying_, [&](const Flight& f) {
      if (f.end <= from) return false;
      m_->wait(reduce_[static_cast<std::size_t>(f.part)]);
      return true;
    });
    return zero1() ? data(summed_) : arrays_.gradients;
  }

  void begin_sharing_weights() override {
    changed_ = true;
    finish_sharing_weights();
    if (!arrays_.gains.empty()) gains_ = m_->start_all_reduce(arrays_.gains.data(), static_cast<index_t>(arrays_.gains.size()), Format::f32, Reduction::sum, "gains");
    if (!zero1()) return;
    for (int i = 0; i < arrays_.partition.parts(); ++i) {
      const Interval part = arrays_.partition.part(i);
      if (!part.empty())
        gather_[static_cast<std::size_t>(i)] = m_->start_all_gather(arrays_.products + part.begin, own_products(i), arrays_.partition.shards(i), format_of<A>, weights_names_[static_cast<std::size_t>(i)]);
    }
  }
  void finish_sharing_weights() override {
    m_->wait(gains_);
    if (zero1())
      for (Request& r : gather_) m_->wait(r);
  }

  std::span<const float> gather(int part, const float* own) override {
    const Partition& p = arrays_.partition;
    if (fsdp()) finish_sum(gradients_[0], 0);
    else if (whole_.bytes() == 0) whole_ = floats(part_floats_);
    float* const to = data(fsdp() ? gradients_[0].memory : whole_);
    Request r = m_->start_all_gather(to, own + p.own_offset(part), p.shards(part), Format::f32, weights_names_[static_cast<std::size_t>(part)]);
    m_->wait(r);
    const auto n = static_cast<std::size_t>(p.part(part).size());
    if constexpr (D::host_memory) {
      return {to, n};
    } else {
      host_.resize(n);
      dev_->download(host_.data(), to, n * sizeof(float));
      return host_;
    }
  }

  std::size_t bytes() const override {
    std::size_t n = summed_.bytes() + whole_.bytes() + travelling_.bytes();
    for (std::size_t i = 0; i < buffers_; ++i) n += values_[i].memory.bytes() + gradients_[i].memory.bytes() + addends_[i].bytes();
    return n;
  }

 private:
  /// Parts [part, end) whose gradients are being summed.
  struct Flight {
    int part, end;
  };
  /// Room for a whole part.
  struct Buffer {
    Memory<D> memory;
    int part = -1;        // whose weights or gradient are there
    bool used = false;    // by the part that computes
    std::int64_t pass = 0;
    Request request = {};
  };

  static constexpr bool narrows = requires(M& m, float* x, const Shards& s, Wire w) {
    m.start_all_reduce(x, s.n, w, std::string_view());
    m.start_reduce_scatter(x, x, s, w, std::string_view());
  };
  bool narrow() const { return narrows && options_.wire != Format::f32; }
  Wire wire() const { return {options_.wire, travelling_.data()}; }
  bool zero1() const { return options_.sharding == Sharding::zero1; }
  bool fsdp() const { return options_.sharding == Sharding::fsdp; }
  Memory<D> floats(index_t n) const { return Memory<D>(*dev_, static_cast<std::size_t>(n) * sizeof(float)); }
  Memory<D> zeros(index_t n) const {
    Memory<D> m = floats(n);
    dev_->zero(m.data(), static_cast<std::size_t>(n) * sizeof(float));
    return m;
  }
  static float* data(const Memory<D>& m) { return reinterpret_cast<float*>(m.data()); }
  static A* products(const Memory<D>& m) { return reinterpret_cast<A*>(m.data()); }
  /// This rank's shard of what products read.
  const A* own_products(int part) const { return arrays_.own ? arrays_.own + arrays_.partition.own_offset(part) : arrays_.products + arrays_.partition.shard(part, rank()).begin; }
  int last_part() const { return arrays_.partition.parts() - 1; }

  // ---- ddp, zero1

  /// The part and those above it are complete: sums what has not been, where it is worth a message.
  void sum_down_to(int part) {
    const Partition& p = arrays_.partition;
    const Flight flight{part, std::exchange(summed_down_to_, part)};
    if (zero1()) {
      const Interval whole = p.part(part);
      if (!whole.empty()) reduce_[static_cast<std::size_t>(part)] = start_sum_of_shards(data(summed_) + p.own_offset(part), arrays_.gradients + whole.begin, part);
      return limit_flight(flight);
    }
    const Interval bucket{p.part(part).begin, p.part(flight.end - 1).end};
    if (part > 0 && static_cast<std::size_t>(bucket.size()) * sizeof(float) < options_.bucket_bytes) {
      summed_down_to_ = flight.end;
      return;
    }
    if (!bucket.empty()) reduce_[static_cast<std::size_t>(part)] = start_sum(arrays_.gradients + bucket.begin, bucket.size(), part);
    limit_flight(flight);
  }
  /// Sums of a part's gradients, which travel as the options say.
  Request start_sum(float* out, index_t n, int part) {
    const std::string& what = gradients_names_[static_cast<std::size_t>(part)];
    if constexpr (narrows)
      if (narrow()) return m_->start_all_reduce(out, n, wire(), what);
    return m_->start_all_reduce(out, n, Format::f32, Reduction::sum, what);
  }
  Request start_sum_of_shards(float* out, const float* in, int part) {
    const std::string& what = gradients_names_[static_cast<std::size_t>(part)];
    const Shards shards = arrays_.partition.shards(part);
    if constexpr (narrows)
      if (narrow()) return m_->start_reduce_scatter(out, in, shards, wire(), what);
    return m_->start_reduce_scatter(out, in, shards, Format::f32, Reduction::sum, what);
  }
  void limit_flight(const Flight& flight) {
    flying_.push_back(flight);
    std::size_t most = options_.in_flight;
    if constexpr (requires { M::in_flight; })
      if (most == 0) most = M::in_flight;
    if (most == 0 || flying_.size() <= most) return;
    m_->wait(reduce_[static_cast<std::size_t>(flying_.front().part)]);
    flying_.erase(flying_.begin());
  }

  // ---- fsdp

  /// Begins to gather the part's weights, unless they are there or under way.
  Buffer& fetch(int part) {
    Buffer* to = nullptr;
    for (std::size_t i = 0; i < buffers_; ++i)
      if (values_[i].part == part) return values_[i];
    for (std::size_t i = 0; i < buffers_; ++i)
      if (Buffer& b = values_[i]; !b.used && (!to || b.pass < to->pass)) to = &b;
    const Partition& p = arrays_.partition;
    m_->wait(to->request);
    to->part = part;
    to->request = m_->start_all_gather(products(to->memory), own_products(part), p.shards(part), format_of<A>, weights_names_[static_cast<std::size_t>(part)]);
    return *to;
  }
  /// The part's weights are there, and the pass will read them.
  const A* hold(int part) {
    Buffer& b = fetch(part);
    m_->wait(b.request);
    b.used = true, b.pass = ++clock_;
    return products(b.memory);
  }
  void release(int part) {
    for (std::size_t i = 0; i < buffers_; ++i)
      if (values_[i].part == part) values_[i].used = false;
  }
  /// Room for the part's gradient.
  float* take_gradient(int part) {
    std::size_t to = buffers_;
    for (std::size_t i = 0; i < buffers_; ++i) {
      if (gradients_[i].used && gradients_[i].part == part) return data(gradients_[i].memory);
      if (!gradients_[i].used && (to == buffers_ || gradients_[i].pass < gradients_[to].pass)) to = i;
    }
    Buffer& b = gradients_[to];
    finish_sum(b, to);
    b.part = part, b.used = true, b.pass = ++clock_;
    return data(b.memory);
  }
  /// Its sum is on its way into the own shard: of the first pass at once, of others by way of an addend.
  void begin_sum(int part) {
    const Partition& p = arrays_.partition;
    for (std::size_t i = 0; i < buffers_; ++i) {
      Buffer& b = gradients_[i];
      if (!b.used || b.part != part) continue;
      b.used = false, adds_[i] = pass_ > 1;
      float* const to = adds_[i] ? data(addends_[i]) : arrays_.gradients + p.own_offset(part);
      b.request = start_sum_of_shards(to, data(b.memory), part);
    }
  }
  void finish_sum(Buffer& b, std::size_t i) {
    if (b.part < 0) return;
    m_->wait(b.request);
    if (std::exchange(adds_[i], false)) {
      const Partition& p = arrays_.partition;
      const index_t n = p.shard(b.part, rank()).size();
      dev_->add(View<float, dyn, dyn>(arrays_.gradients + p.own_offset(b.part), {1, n}), View<const float, dyn, dyn>(data(addends_[i]), {1, n}));
    }
    b.part = -1;
  }

  // ---- what the pass tells

  void before_forward(int part) override {
    m_->wait(gains_);
    if (zero1()) m_->wait(gather_[static_cast<std::size_t>(part)]);
    if (arrays_.tied && part == last_part() && zero1()) m_->wait(gather_[0]);
    if (!fsdp()) return;
    (*place_)(part, hold(part), nullptr);
    if (part < last_part()) fetch(part + 1);
  }
  void after_forward(int part) override {
    m_->progress();
    if (fsdp() && !(arrays_.tied && part == 0)) release(part);
    if (fsdp() && arrays_.tied && part == last_part()) release(0);
  }
  void before_backward(int part) override {
    if (!fsdp()) return;
    if (arrays_.tied && part == last_part()) (*place_)(0, hold(0), take_gradient(0));
    if (arrays_.tied && part == 0) return;  // placed with the head; its gradient is added to
    // The embedding's gradient needs no weights.
    (*place_)(part, part == 0 ? products(values_[0].memory) : hold(part), take_gradient(part));
    if (part > 1) fetch(part - 1);
  }
  void after_backward(int part) override {
    m_->progress();
    if (fsdp()) {
      release(part);
      if (arrays_.tied && part == last_part()) release(0);
      return begin_sum(part);
    }
    if (last_) sum_down_to(part), next_ = part - 1;
  }

  M* m_;
  ParallelOptions options_;
  D* dev_ = nullptr;
  Arrays arrays_;
  std::vector<std::string> weights_names_, gradients_names_;  // of each part, for errors
  std::vector<Request> gather_, reduce_;                      // of each part; ddp: of the bucket that ends there
  Request gains_ = {};
  Memory<D> summed_;                                          // zero1: own shards of the gradients' sum
  Memory<D> whole_;                                           // what gather() returns, where there are no buffers; taken when it is first asked for
  std::vector<float> host_;
  index_t part_floats_ = 0;
  std::vector<Flight> flying_;                                // ddp, zero1: what is under way, oldest first
  Memory<D> travelling_;                                      // gradients in the wire's format, of one message
  int next_ = 0, summed_down_to_ = 0;  // parts from here on are complete, are on their way
  std::int64_t pass_ = 0, clock_ = 0;
  bool last_ = false, changed_ = true;
  const Place* place_ = nullptr;
  std::array<Buffer, 3> values_, gradients_;
  std::array<Memory<D>, 3> addends_;
  std::array<bool, 3> adds_{};
  std::size_t buffers_ = 0;
};

}  // namespace tinyllama
