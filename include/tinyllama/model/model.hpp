// Model and Session: weights that are shared, and one conversation with them.
#pragma once

#include <algorithm>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <stop_token>
#include <vector>

#include "tinyllama/model/kv_cache.hpp"
#include "tinyllama/model/llama.hpp"
#include "tinyllama/text/tokenizer.hpp"

namespace tinyllama {

template <Config C, Device D>
class Session;

/// Weights on a device. Copies share them; the device outlives them all.
template <Config C, Device D>
class Model {
 public:
  explicit Model(std::shared_ptr<const Weights<C, D>> weights, std::optional<Tokenizer> tokenizer = {})
      : weights_(std::move(weights)), tokenizer_(std::move(tokenizer)) {}

  const C& config() const { return weights_->config; }
  D& device() const { return *weights_->device; }
  const Weights<C, D>& weights() const { return *weights_; }
  std::shared_ptr<const Weights<C, D>> shared_weights() const { return weights_; }
  bool has_tokenizer() const { return tokenizer_.has_value(); }
  /// The checkpoint's own; Error where none stood beside it.
  const Tokenizer& tokenizer() const {
    if (!tokenizer_) throw Error("model", "tokenizer", "one in the checkpoint (tokenizer.json, tokenizer.model, or in a GGUF file)", "none");
    return *tokenizer_;
  }
  KvCache<D> new_cache() const { return KvCache<D>(*weights_->device, weights_->cache, weights_->config.context); }
  Session<C, D> start() const { return Session<C, D>(*this); }

 private:
  std::shared_ptr<const Weights<C, D>> weights_;
  std::optional<Tokenizer> tokenizer_;
};

struct PrefillOptions {
  index_t chunk = 512;                                                   ///< tokens of a step
  Logits logits = Logits::last;                                          ///< of the last position, or of none; `all` through Session::logits_of
  std::function<void(std::size_t done, std::size_t total)> progress = {};    ///< tokens, after each chunk
  std::stop_token stop = {};                                                 ///< checked between chunks
};

/// Throws Error where an id is none of the vocabulary.
inline void check_ids(std::span<const std::int32_t> ids, index_t vocab) {
  for (std::size_t i = 0; i < ids.size(); ++i)
    if (ids[i] < 0 || ids[i] >= vocab)
      throw Error("token ids", "id " + std::to_string(i), "0.." + std::to_string(vocab - 1), std::to_string(ids[i]));
}

/// A model, a KV cache and the tokens in it. A value: copying forks the conversation (the cache's pages are shared until written),
/// truncate() undoes. One thread at a time; sessions of one device take turns.
template <Config C, Device D>
class Session {
 public:
  explicit Session(Model<C, D> model) : model_(std::move(model)), cache_(model_.new_cache()) {}
  Session(const Session& o) : model_(o.model_), cache_(o.cache_), tokens_(o.tokens_), deferred_(o.deferred_), logits_(o.logits_) {}
  Session& operator=(const Session& o) { return *this = Session(o); }
  Session(Session&&) noexcept = default;
  Session& operator=(Session&&) noexcept = default;

  const Model<C, D>& model() const { return model_; }
  KvCache<D>& cache() { return cache_; }
  const KvCache<D>& cache() const { return cache_; }
  /// Tokens of the conversation, a deferred one included.
  index_t length() const { return static_cast<index_t>(tokens_.size()); }
  std::span<const std::int32_t> tokens() const { return tokens_; }

  /// Forgets positions from `length` on.
  void truncate(index_t length) {
    if (length < 0 || length > this->length()) throw Error("Session::truncate", "length", "0.." + std::to_string(this->length()), std::to_string(length));
    if (length < cache_.length()) cache_.truncate(length);
    tokens_.resize(static_cast<std::size_t>(length));
    deferred_ = length > cache_.length();
    logits_.clear();
  }

  /// Adds a token that will be read together with the next ones, or by flush(): the last token of an answer costs no step of its own.
  void defer(std::int32_t id) {
    check_ids(std::span(&id, 1), model_.config().vocab);
    flush();
    cache_.reserve(cache_.length() + 1);
    tokens_.push_back(id);
    deferred_ = true;
  }
  /// Reads a deferred token, if there is one; logits() are then those behind it.
  void flush() {
    if (deferred_) prefill({});
  }

  /// Allocates what `tokens` positions and steps of `rows` tokens will need.
  void reserve(index_t tokens, index_t rows = 1) {
    const C& c = model_.config();
    cache_.reserve(tokens);
    tokens_.reserve(static_cast<std::size_t>(tokens));
    logits_.reserve(static_cast<std::size_t>(c.vocab));
    work_->prepare(model_.device(), c, rows, 1);
    model_.device().reserve_scratch(step_scratch<D>(c, cache_.shape(), rows, 1, tokens));
  }

  /// Reads `ids` behind what is in the cache, in chunks. Returns the logits [vocab] behind the last of them (empty for Logits::none, for no
  /// ids, or where `stop` was requested; what was read by then stays in the cache).
  std::span<const float> prefill(std::span<const std::int32_t> ids, const PrefillOptions& options = {}) {
    check_ids(ids, model_.config().vocab);
    const auto read = static_cast<std::size_t>(cache_.length()), total = tokens_.size() + ids.size() - read;
    cache_.reserve(cache_.length() + static_cast<index_t>(total));
    tokens_.insert(tokens_.end(), ids.begin(), ids.end());
    deferred_ = false;
    logits_.clear();
    const auto chunk = static_cast<std::size_t>(std::max<index_t>(1, options.chunk));
    for (std::size_t done = 0; done < total;) {
      if (options.stop.stop_requested()) {
        tokens_.resize(read + done);
        return {};
      }
      const std::size_t n = std::min(chunk, total - done);
      const bool last = done + n == total && options.logits != Logits::none;
      step(std::span<const std::int32_t>(tokens_).subspan(read + done, n), last ? Logits::last : Logits::none, NoObserver{});
      if (last) {
        const auto l = work_->host_logits(model_.device());
        logits_.assign(l.data(), l.data() + l.size());
      }
      done += n;
      if (options.progress) options.progress(done, total);
    }
    return logits_;
  }

  /// One more token; the logits [vocab] behind it. After reserve() nothing is allocated.
  std::span<const float> decode(std::int32_t id) { return prefill(std::span(&id, 1)); }

  /// Logits of every position of `ids`, [T, vocab], in one step; valid until the session's next one. `observer`: see llama.hpp.
  template <class Observer = NoObserver>
  View<const float, dyn, extents<C>::vocab> logits_of(std::span<const std::int32_t> ids, Observer&& observer = {}) {
    check_ids(ids, model_.config().vocab);
    flush();
    cache_.reserve(cache_.length() + static_cast<index_t>(ids.size()));
    tokens_.insert(tokens_.end(), ids.begin(), ids.end());
    step(ids, Logits::all, observer);
    const auto l = work_->host_logits(model_.device());
    if (l.extent(0) > 0) logits_.assign(&l(l.extent(0) - 1, 0), &l(l.extent(0) - 1, 0) + l.extent(1));
    return l;
  }

  /// The logits behind the last position, as the last prefill or decode left them.
  std::span<const float> logits() const { return logits_; }

  /// Writes cache and tokens to a file, atomically; restore() reads them back into a session of the same model.
  void save(const std::filesystem::path& path) {
    flush();
    cache_.save(path, std::as_bytes(std::span(tokens_)));
  }
  void restore(const std::filesystem::path& path) {
    std::vector<std::byte> extra = cache_.restore(path);
    tokens_.resize(extra.size() / sizeof(std::int32_t));
    deferred_ = false;
    if (!tokens_.empty()) std::memcpy(tokens_.data(), extra.data(), tokens_.size() * sizeof(std::int32_t));
    logits_.clear();
  }

 private:
  template <Config C2, Device D2>
  friend View<const float, dyn, extents<C2>::vocab> prefill_batch(std::span<Session<C2, D2>* const> sessions,
                                                                   std::span<const std::span<const std::int32_t>> ids);

  template <class Observer>
  void step(std::span<const std::int32_t> ids, Logits want, Observer&& observer) {
    const auto n = static_cast<index_t>(ids.size());
    if (n == 0) {
      work_->prepare(model_.device(), model_.config(), 0, 0);
      return;
    }
    const Sequence s{0, n, cache_.length(), cache_.open(n)};
    forward(model_.weights(), ids, std::span(&s, 1), *work_, want, observer);
    cache_.advance(n);
  }

  Model<C, D> model_;
  KvCache<D> cache_;
  std::vector<std::int32_t> tokens_;
  bool deferred_ = false;  // the last of tokens_ is not in the cache yet
  std::vector<float> logits_;
  std::unique_ptr<Workspace<C, D>> work_ = std::make_unique<Workspace<C, D>>();  // on the heap: moving a session leaves views of it valid
};

/// Several sessions of one model in one step, each with its own new ids (of any number, at least one); weights are read once for all.
/// Returns the logits behind each sequence's last id, [sequences, vocab], valid until the first session's next step.
template <Config C, Device D>
View<const float, dyn, extents<C>::vocab> prefill_batch(std::span<Session<C, D>* const> sessions, std::span<const std::span<const std::int32_t>> ids) {
  detail::expect_extent("prefill_batch", "sequences of ids", static_cast<index_t>(sessions.size()), static_cast<index_t>(ids.size()));
  if (sessions.empty()) throw Error("prefill_batch", "sessions", "at least one", "none");
  std::vector<std::int32_t> all;
  std::vector<Sequence> batch;
  for (std::size_t i = 0; i < sessions.size(); ++i) {
    Session<C, D>& s = *sessions[i];
    if (&s.model_.weights() != &sessions[0]->model_.weights()) throw Error("prefill_batch", "session " + std::to_string(i), "the model of session 0", "another");
    for (std::size_t j = 0; j < i; ++j)
      if (sessions[j] == &s) throw Error("prefill_batch", "session " + std::to_string(i), "each session once", "session " + std::to_string(j) + " again");
    if (ids[i].empty()) throw Error("prefill_batch", "ids of session " + std::to_string(i), "at least one", "none");
    check_ids(ids[i], s.model_.config().vocab);
    s.flush();
    s.cache_.reserve(s.cache_.length() + static_cast<index_t>(ids[i].size()));
    all.insert(all.end(), ids[i].begin(), ids[i].end());
  }
  index_t row = 0;
  for (std::size_t i = 0; i < sessions.size(); ++i) {
    const auto n = static_cast<index_t>(ids[i].size());
    batch.push_back({row, n, sessions[i]->cache_.length(), sessions[i]->cache_.open(n)});
    row += n;
  }
  Workspace<C, D>& work = *sessions[0]->work_;
  forward(sessions[0]->model_.weights(), std::span<const std::int32_t>(all), std::span<const Sequence>(batch), work, Logits::last);
  const auto logits = work.host_logits(sessions[0]->model_.device());
  for (std::size_t i = 0; i < sessions.size(); ++i) {
    Session<C, D>& s = *sessions[i];
    s.cache_.advance(batch[i].tokens);
    s.tokens_.insert(s.tokens_.end(), ids[i].begin(), ids[i].end());
    const float* l = &logits(static_cast<index_t>(i), 0);
    s.logits_.assign(l, l + logits.extent(1));
  }
  return logits;
}

/// The same with one new id for each session.
template <Config C, Device D>
View<const float, dyn, extents<C>::vocab> decode_batch(std::span<Session<C, D>* const> sessions, std::span<const std::int32_t> ids) {
  std::vector<std::span<const std::int32_t>> each;
  for (const std::int32_t& id : ids) each.push_back(std::span(&id, 1));
  return prefill_batch<C, D>(sessions, each);
}

}  // namespace tinyllama
