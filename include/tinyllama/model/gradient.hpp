// A training pass over any TrainingDevice: forward, loss and backward of one micro-batch.
//
//   x = E[ids];  x = block(x) for each layer;  loss = sum_t weight_t (log sum exp(logits_t) - logits_t[target_t]),  logits = Whead rmsnorm(x)
//
// Attention is among the rows of a sequence; a batch is a list of sequences, so that samples packed into one row do not see each other.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "tinyllama/device/memory.hpp"
#include "tinyllama/model/learned.hpp"
#include "tinyllama/model/training_activations.hpp"
#include "tinyllama/model/weights.hpp"

namespace tinyllama {

/// A layer's weights and where the gradients of its gains are summed (null: frozen).
template <class A = float>
struct LearnedLayer : Layer<LearnedMatrix<A>> {
  float *d_attn_norm = nullptr, *d_ffn_norm = nullptr;
};

/// All weights that a training pass reads, and where their gradients go. Owns nothing.
template <Config C, class A = float>
struct LearnedWeights {
  C config{};
  LearnedMatrix<A> embedding;          // [vocab, hidden]
  std::vector<LearnedLayer<A>> layers;
  const float* final_norm = nullptr;   // [hidden]
  float* d_final_norm = nullptr;
  LearnedMatrix<A> head;               // [vocab, hidden]; the embedding where tied
  std::vector<double> frequencies;     // [head_dim / 2]

  /// f on each matrix that products read.
  template <class F>
  void for_each_matrix(F&& f) {
    for (LearnedLayer<A>& l : layers)
      for (LearnedMatrix<A>* m : {&l.qkv, &l.o, &l.gate_up, &l.down}) f(*m);
    f(head);
  }
};

/// Told by a pass which part of the weights comes next and which is done: 0 the embedding, 1 .. layers the blocks, layers + 1 the last norm and the head. Weights
/// need be there, and the places of gradients known, from `before` to `after` only; that is how distributed/ shards them.
struct PassHooks {
  virtual void before_forward(int /*part*/) {}
  virtual void after_forward(int /*part*/) {}
  virtual void before_backward(int /*part*/) {}
  virtual void after_backward(int /*part*/) {}  // the part's gradients are complete

 protected:
  ~PassHooks() = default;
};

/// A stretch of a pass's work between two that its hooks are told of: in forward or backward, of one part.
struct PassSegment {
  bool backward;
  int part;
};
/// Work that is done at once.
inline constexpr auto at_once = [](PassSegment, auto&& work) { work(); };

/// The memory of a training pass, for one shape at a time; and the pass.
template <Config C, TrainingDevice D>
class TrainingPass {
  using A = typename D::activation;
  using Weights = LearnedWeights<C, A>;
  using Block = TrainingActivations<C, A>;

 public:
  explicit TrainingPass(D& dev) : dev_(&dev), staged_(dev) {}

  /// Takes memory for the shape, unless it has it. Whether arrays have moved.
  bool prepare(const C& c, const TrainingShape& shape) {
    if (buffers_ && shape == shape_) return false;
    if (const std::size_t bytes = training_buffer_bytes<D>(c, shape); !arena_ || bytes > arena_->capacity()) {
      buffers_.reset(), arena_.reset();
      arena_ = std::make_unique<Arena<D>>(*dev_, bytes);
    }
    arena_->reset();
    blocks_.clear(), lse_.clear(), sequences_.clear();
    buffers_.emplace(take_training_buffers(*arena_, c, shape, [&](int, const Block& b, View<float, dyn, dyn> lse) {
      blocks_.push_back(b), lse_.push_back(lse);
    }));
    shape_ = shape;
    return true;
  }
  std::size_t bytes() const { return arena_ ? arena_->capacity() : 0; }
  const AdapterWork<A>& adapter_work() const { return buffers_->adapters; }

  /// Whom the next passes tell of the parts; null: nobody.
  void hook(PassHooks* hooks) { hooks_ = hooks; }

  /// Keeps what the functions below work on, which forward() then sends to the device: ids and targets [T] of all sequences; targets below 0 do not count. `weights`
  /// [T], for backward(): of the losses.
  void load(const Weights& w, std::span<const std::int32_t> ids, std::span<const std::int32_t> targets, std::span<const Sequence> batch, std::span<const float> weights = {}) {
    turn(w, batch);
    const auto T = static_cast<index_t>(ids.size()), vocab = static_cast<index_t>(w.config.vocab);
    const TrainingInput to{reinterpret_cast<std::int32_t*>(staged_.begin(static_cast<std::size_t>(TrainingInput::words<D>(T, vocab)) * sizeof(std::int32_t))), T};
    std::copy(ids.begin(), ids.end(), to.ids().begin());
    std::copy(targets.begin(), targets.end(), to.targets().begin());
    if (!weights.empty()) std::copy(weights.begin(), weights.end(), to.weights()), id_rows(*dev_, to.id_rows(), ids, vocab);
    stretches_.clear();
    for (std::size_t r = 0; r < targets.size(); r += static_cast<std::size_t>(shape_.logits_rows)) {
      const auto stretch = targets.subspan(r, std::min(targets.size() - r, static_cast<std::size_t>(shape_.logits_rows)));
      stretches_.push_back({static_cast<index_t>(r), static_cast<index_t>(r + stretch.size()), std::any_of(stretch.begin(), stretch.end(), [](std::int32_t t) { return t >= 0; })});
    }
  }
  /// Adds to `kind` what the work of forward() and backward() depends on beside the numbers that were sent and where it has its memory.
  void describe(std::vector<std::uint64_t>& kind, std::span<const Sequence> batch) const {
    for (const Sequence& s : batch) kind.push_back(static_cast<std::uint64_t>(s.first_row)), kind.push_back(static_cast<std::uint64_t>(s.tokens));
    for (const Stretch& s : stretches_) kind.push_back(s.counts);
  }
  /// The same of a segment, where hooks say where its part has its weights and gradients.
  static void describe(std::vector<std::uint64_t>& kind, const Weights& w, PassSegment s) {
    const auto add = [&](auto... at) { (kind.push_back(reinterpret_cast<std::uint64_t>(at)), ...); };
    kind.push_back(2 * static_cast<std::uint64_t>(s.part) + s.backward);
    if (s.part == 0) return add(w.embedding.value, w.embedding.gradient);
    if (s.part > static_cast<int>(w.layers.size())) return add(w.final_norm, w.d_final_norm, w.head.value, w.head.gradient);
    const LearnedLayer<A>& l = w.layers[static_cast<std::size_t>(s.part) - 1];
    add(l.attn_norm, l.d_attn_norm, l.qkv.value, l.qkv.gradient);
  }
  /// Rows of what was sent, and on the device the loss of each, behind losses() or backward(), and its weight.
  index_t rows() const { return stretches_.empty() ? 0 : stretches_.back().end; }
  const float* device_losses() const { return buffers_->losses; }
  const float* device_weights() const { return input().weights(); }

  /// ids through the model, up to the last norm. `run(segment, work)` does the work, here and in backward(): at once, or as it was recorded.
  template <class Run = decltype(at_once)>
  void forward(const Weights& w, std::span<const Sequence> batch, const Run& run = at_once) {
    const C& c = w.config;
    D& dev = *dev_;
    const int parts = static_cast<int>(blocks_.size()) + 2;
    tell(&PassHooks::before_forward, 0);
    run(PassSegment{false, 0}, [&] {
      staged_.bring(buffers_->input);
      dev.embedding(blocks_.front().x, Matrix{format_of<A>, D::packed_embedding, w.embedding.rows, w.embedding.columns, reinterpret_cast<const std::byte*>(w.embedding.value)},
                    ids_on(dev, input().ids()));
    });
    tell(&PassHooks::after_forward, 0);
    for (std::size_t l = 0; l < blocks_.size(); ++l) {
      const Block& a = blocks_[l];
      const int part = static_cast<int>(l) + 1;
      tell(&PassHooks::before_forward, part);
      run(PassSegment{false, part}, [&] {
        if (l == 0) dev.rmsnorm(a.normed, a.x, w.layers[l].attn_norm, c.norm_eps);
        else half_sum<LearnedMatrix<A>>(dev, a.normed, a.x, blocks_[l - 1].mid, a, w.layers[l].attn_norm, c.norm_eps);
        block(w, l, batch, true);
      });
      tell(&PassHooks::after_forward, part);
    }
    tell(&PassHooks::before_forward, parts - 1);
    run(PassSegment{false, parts - 1}, [&] {
      const Block& last = blocks_.back();
      half_sum<LearnedMatrix<A>>(dev, buffers_->final_normed, last.out, last.mid, last, w.final_norm, c.norm_eps);
    });
  }

  /// The loss of each row, [T]: targets below 0 have none. After forward(); valid until the next call.
  std::span<const float> losses(const Weights& w) {
    head(w, false);
    tell(&PassHooks::after_forward, static_cast<int>(blocks_.size()) + 1);
    return dev_->host(View<const float, dyn>(buffers_->losses, {rows()}), staging_).span();
  }

  /// The same losses, on the device, and the gradient of sum_t weights_t loss_t by every weight that has a place for it: added to what is there where `accumulate`
  /// is set in w's matrices, in the place of it where not (those of the gains and of the embedding are always added). After forward().
  template <class Run = decltype(at_once)>
  void backward(const Weights& w, std::span<const Sequence> batch, const Run& run = at_once) {
    const C& c = w.config;
    D& dev = *dev_;
    const TrainingBuffers<C, A>& b = *buffers_;
    const BlockGradients<C, A>& d = b.gradients;
    const int last = static_cast<int>(blocks_.size()) + 1;
    tell(&PassHooks::before_backward, last);
    run(PassSegment{true, last}, [&] {
      head(w, true);
      fill(dev, d.x.data(), rows() * c.hidden, 0.0f);
      rmsnorm_backward(dev, d.x, d.rounded, d.normed, blocks_.back().out, w.final_norm, w.d_final_norm, c.norm_eps, d.rms, slice(b.final_normed, 0, 0));
    });
    tell(&PassHooks::after_backward, last);
    const HeadShape heads{c.heads, c.kv_heads, head_dim(c)};
    for (std::size_t l = blocks_.size(); l-- > 0;) {
      const Block& a = blocks_[l];
      const int part = static_cast<int>(l) + 1;
      tell(&PassHooks::before_backward, part);
      const LearnedLayer<A>& layer = w.layers[l];
      run(PassSegment{true, part}, [&] {
        if (shape_.checkpointing == Checkpointing::layer) {
          dev.rmsnorm(a.normed, a.x, layer.attn_norm, c.norm_eps);
          block(w, l, batch, false);
        }
        block_backward(dev, c, layer, a, d, {b.cos, b.opposite_sin}, [&](auto dqkv, auto d_attended) {
          flash_attention_backward(dev, dqkv, d_attended, a.qkv, a.attended, lse_[l], batch, heads, b.attention, layer.qkv.product(false));
        }, layer.d_attn_norm, layer.d_ffn_norm, shape_.checkpointing == Checkpointing::selective);
      });
      tell(&PassHooks::after_backward, part);
    }
    tell(&PassHooks::before_backward, 0);
    run(PassSegment{true, 0}, [&] {
      if (w.embedding.gradient) embedding_backward(dev, View<float, dyn, dyn>(w.embedding.gradient, {w.embedding.rows, w.embedding.columns}), input().ids(), input().id_rows(), d.x);
    });
    tell(&PassHooks::after_backward, 0);
  }

 private:
  /// On the device.
  TrainingInput input() const { return {buffers_->input, rows()}; }
  /// Rows [begin, end) whose logits are there at a time, and whether one of their targets counts.
  struct Stretch {
    index_t begin, end;
    bool counts;
  };
  void tell(void (PassHooks::*what)(int), int part) const {
    if (hooks_) (hooks_->*what)(part);
  }
  void block(const Weights& w, std::size_t l, std::span<const Sequence> batch, bool output) {
    const C& c = w.config;
    block_forward(*dev_, c, static_cast<const Layer<LearnedMatrix<A>>&>(w.layers[l]), blocks_[l], {buffers_->cos, buffers_->sin}, [&](auto attended, auto qkv) {
      flash_attention(*dev_, attended, lse_[l], qkv, batch, HeadShape{c.heads, c.kv_heads, head_dim(c)}, w.layers[l].qkv.product(false));
    }, output);
  }

  /// Logits a stretch of rows at a time, so that they are never there for all; with d[final_normed] and the head's gradient if `gradient`.
  void head(const Weights& w, bool gradient) {
    const TrainingBuffers<C, A>& b = *buffers_;
    LearnedMatrix<A> matrix = w.head;
    for (const auto& [r, end, counts] : stretches_) {
      const View<A, dyn, dyn> logits = slice(b.logits, 0, end - r), normed = slice(b.final_normed, r, end), d_normed = slice(View<A, dyn, dyn>(b.gradients.normed), r, end);
      if (!counts) {
        fill(*dev_, b.losses + r, end - r, 0.0f);
        if (gradient) dev_->zero(d_normed.data(), static_cast<std::size_t>(d_normed.size()) * sizeof(A));
        continue;
      }
      matmul(*dev_, logits, normed, matrix);
      cross_entropy(*dev_, gradient ? logits : slice(logits, 0, 0), logits, input().targets().subspan(static_cast<std::size_t>(r), static_cast<std::size_t>(end - r)), input().weights() + r, b.losses + r);
      if (!gradient) continue;
      matmul_backward_input(*dev_, d_normed, logits, matrix);
      matmul_backward_weight(*dev_, matrix, logits, normed);
      matrix.how.accumulate = true;
    }
    if (gradient && matrix.gradient && !matrix.how.accumulate) fill(*dev_, matrix.gradient, matrix.rows * matrix.columns, 0.0f);  // nothing counted
  }

  /// The angles of the batch's positions, kept while its sequences stay as they are.
  void turn(const Weights& w, std::span<const Sequence> batch) {
    const auto same = [](const Sequence& a, const Sequence& b) { return a.first_row == b.first_row && a.tokens == b.tokens && a.position == b.position; };
    if (std::equal(batch.begin(), batch.end(), sequences_.begin(), sequences_.end(), same)) return;
    const TrainingBuffers<C, A>& b = *buffers_;
    dev_->rope_angles(b.cos, b.sin, w.frequencies, dev_->batch({}, batch));
    dev_->copy_bytes(b.opposite_sin.data(), b.sin.data(), static_cast<std::size_t>(b.sin.size()) * sizeof(float));
    scale(*dev_, b.opposite_sin, -1.0f);
    sequences_.assign(batch.begin(), batch.end());
  }

  D* dev_;
  PassHooks* hooks_ = nullptr;
  TrainingShape shape_;
  std::unique_ptr<Arena<D>> arena_;
  std::optional<TrainingBuffers<C, A>> buffers_;
  std::vector<Block> blocks_;
  std::vector<View<float, dyn, dyn>> lse_;
  std::vector<Sequence> sequences_;  // whose angles are there
  StepInput<D> staged_;              // the input of the next forward()
  std::vector<Stretch> stretches_;   // of the rows that were sent
  [[no_unique_address]] typename D::Staging staging_;  // losses that the host can read
};

}  // namespace tinyllama
