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

/// Tokens of a prefill step on D, where `asked` (0: no wish) is the caller's wish.
template <Device D>
constexpr index_t prefill_chunk(index_t asked) {
  if (asked > 0) return asked;
  if constexpr (requires { D::prefill_rows; }) return D::prefill_rows;
  else return 512;
}

struct PrefillOptions {
  index_t chunk = 0;                                                     ///< tokens of a step; 0: as many as suit the device
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
  Session(const Session& o) : model_(o.model_), cache_(o.cache_), tokens_(o.tokens_), deferred_(o.deferred_), logits_(o.logits().begin(), o.logits().end()) {}
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
    forget_logits();
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
    if (deferred_) read({});
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
    read(ids, options);
    return logits();
  }
  /// The same, but the logits stay on the device until logits() asks for them, or choose() has no need to.
  void read(std::span<const std::int32_t> ids, const PrefillOptions& options = {}) {
    check_ids(ids, model_.config().vocab);
    const auto known = static_cast<std::size_t>(cache_.length()), total = tokens_.size() + ids.size() - known;
    cache_.reserve(cache_.length() + static_cast<index_t>(total));
    tokens_.insert(tokens_.end(), ids.begin(), ids.end());
    deferred_ = false;
    forget_logits();
    const auto chunk = static_cast<std::size_t>(prefill_chunk<D>(options.chunk));
    for (std::size_t done = 0; done < total;) {
      if (options.stop.stop_requested()) {
        tokens_.resize(known + done);
        return;
      }
      const std::size_t n = std::min(chunk, total - done);
      const bool last = done + n == total && options.logits != Logits::none;
      step(std::span<const std::int32_t>(tokens_).subspan(known + done, n), last ? Logits::last : Logits::none, NoObserver{});
      logits_on_device_ = last;
      done += n;
      if (options.progress) options.progress(done, total);
    }
  }

  /// One more token; the logits [vocab] behind it. After reserve() nothing is allocated.
  std::span<const float> decode(std::int32_t id) { return prefill(std::span(&id, 1)); }

  /// `n` tokens, each the most probable (the lowest id among equals) behind the one before it, the first behind `id`; all but the last are then in the
  /// session, and logits() are those that the last came from. A device that offers it goes from token to token without the host.
  std::vector<std::int32_t> decode_greedy(std::int32_t id, index_t n) {
    std::vector<std::int32_t> found;
    if (n <= 0) return found;
    check_ids(std::span(&id, 1), model_.config().vocab);
    flush();
    found.resize(static_cast<std::size_t>(n));
    if constexpr (requires(D& dev, const Sequence& s) { dev.decode(model_.weights().prepared, work_->logits().data(), id, s, found.data(), n); }) {
      D& dev = model_.device();
      const Sequence s{0, n, cache_.length(), cache_.open(n)};
      work_->prepare(dev, model_.config(), 1, 1);
      const Memory<D> memory(dev, found.size() * sizeof(std::int32_t));
      if (dev.decode(model_.weights().prepared, work_->logits().data(), id, s, reinterpret_cast<std::int32_t*>(memory.data()), n)) {
        dev.download(found.data(), memory.data(), found.size() * sizeof(std::int32_t));
        tokens_.push_back(id);
        tokens_.insert(tokens_.end(), found.begin(), found.end() - 1);
        cache_.advance(n);
        forget_logits();
        logits_on_device_ = true;
        return found;
      }
    }
    for (std::int32_t& next : found) {
      const auto l = decode(id);
      id = next = static_cast<std::int32_t>(std::max_element(l.begin(), l.end()) - l.begin());
    }
    return found;
  }

  /// Logits of every position of `ids`, [T, vocab], in one step; valid until the session's next one. `observer`: see llama.hpp.
  template <class Observer = NoObserver>
  View<const float, dyn, extents<C>::vocab> logits_of(std::span<const std::int32_t> ids, Observer&& observer = {}) {
    check_ids(ids, model_.config().vocab);
    flush();
    cache_.reserve(cache_.length() + static_cast<index_t>(ids.size()));
    tokens_.insert(tokens_.end(), ids.begin(), ids.end());
    forget_logits();
    step(ids, Logits::all, observer);
    const auto l = work_->host_logits(model_.device());
    if (l.extent(0) > 0) logits_.assign(&l(l.extent(0) - 1, 0), &l(l.extent(0) - 1, 0) + l.extent(1));
    return l;
  }

  /// The logits behind the last position, as the last prefill or decode left them.
  std::span<const float> logits() const {
    if (std::exchange(logits_on_device_, false)) {
      const auto l = work_->host_logits(model_.device());
      logits_.assign(l.data(), l.data() + l.size());
    }
    return logits_;
  }
  bool has_logits() const { return logits_on_device_ || !logits_.empty(); }
  bool has_logits_on_device() const { return logits_on_device_; }
  /// The token that `how` chooses from these, without their coming to the host; nothing where the device does not choose, or has them no more.
  std::optional<std::int32_t> choose(const Draw& how) {
    if constexpr (requires(D& dev) { dev.sample(static_cast<std::int32_t*>(nullptr), work_->logits(), std::span(&how, 1)); })
      if (logits_on_device_) {
        D& dev = model_.device();
        if (chosen_.bytes() == 0) chosen_ = Memory<D>(dev, sizeof(std::int32_t));
        dev.sample(reinterpret_cast<std::int32_t*>(chosen_.data()), work_->logits(), std::span(&how, 1));
        std::int32_t id = 0;
        dev.download(&id, chosen_.data(), sizeof id);
        if (id >= 0) return id;
      }
    return {};
  }

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
    forget_logits();
  }

 private:
  template <Config C2, Device D2>
  friend View<const float, dyn, extents<C2>::vocab> prefill_batch(std::span<Session<C2, D2>* const> sessions,
                                                                   std::span<const std::span<const std::int32_t>> ids);
  template <Config C2, Device D2>
  friend std::vector<std::vector<std::int32_t>> decode_batch_greedy(std::span<Session<C2, D2>* const> sessions, std::span<const std::int32_t> ids, index_t n);

  void forget_logits() { logits_.clear(), logits_on_device_ = false; }

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
  mutable std::vector<float> logits_;
  mutable bool logits_on_device_ = false;  // and not in logits_ yet
  Memory<D> chosen_;                       // one id
  std::unique_ptr<Workspace<C, D>> work_ = std::make_unique<Workspace<C, D>>();  // on the heap: moving a session leaves views of it valid
};

namespace detail {
template <Config C, Device D>
void check_sessions(const char* what, std::span<Session<C, D>* const> sessions) {
  if (sessions.empty()) throw Error(what, "sessions", "at least one", "none");
  std::vector<const Session<C, D>*> each(sessions.begin(), sessions.end());
  std::sort(each.begin(), each.end(), std::less<>());
  if (const auto twice = std::adjacent_find(each.begin(), each.end()); twice != each.end())
    throw Error(what, "session " + std::to_string(std::find(sessions.begin(), sessions.end(), *twice) - sessions.begin()), "each session once", "it again");
  for (std::size_t i = 1; i < sessions.size(); ++i)
    if (&sessions[i]->model().weights() != &sessions[0]->model().weights()) throw Error(what, "session " + std::to_string(i), "the model of session 0", "another");
}
}  // namespace detail

/// Several sessions of one model in one step, each with its own new ids (of any number, at least one); weights are read once for all.
/// Returns the logits behind each sequence's last id, [sequences, vocab], valid until the first session's next step.
template <Config C, Device D>
View<const float, dyn, extents<C>::vocab> prefill_batch(std::span<Session<C, D>* const> sessions, std::span<const std::span<const std::int32_t>> ids) {
  detail::expect_extent("prefill_batch", "sequences of ids", static_cast<index_t>(sessions.size()), static_cast<index_t>(ids.size()));
  std::vector<std::int32_t> all;
  std::vector<Sequence> batch;
  detail::check_sessions<C, D>("prefill_batch", sessions);
  for (std::size_t i = 0; i < sessions.size(); ++i) {
    Session<C, D>& s = *sessions[i];
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
    s.forget_logits();
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

/// `n` tokens for each session, [sessions][n], as decode_greedy gives them for one: each the most probable behind the one before it, the first behind
/// ids[i]. A device that chooses tokens itself goes from step to step without the host.
template <Config C, Device D>
std::vector<std::vector<std::int32_t>> decode_batch_greedy(std::span<Session<C, D>* const> sessions, std::span<const std::int32_t> ids, index_t n) {
  detail::expect_extent("decode_batch_greedy", "ids", static_cast<index_t>(sessions.size()), static_cast<index_t>(ids.size()));
  detail::check_sessions<C, D>("decode_batch_greedy", sessions);
  std::vector<std::vector<std::int32_t>> found(sessions.size());
  if (n <= 0) return found;
  const Weights<C, D>& w = sessions[0]->model_.weights();
  D& dev = *w.device;
  check_ids(ids, w.config.vocab);
  if constexpr (requires(std::span<const Sequence> batch) { dev.argmax(static_cast<std::int32_t*>(nullptr), sessions[0]->work_->logits()), dev.batch(DeviceIds(nullptr, 0), batch); }) {
    const std::size_t S = sessions.size();
    std::vector<Sequence> batch;
    for (Session<C, D>* s : sessions) {
      s->flush();
      batch.push_back({static_cast<index_t>(batch.size()), 1, s->cache_.length(), s->cache_.open(n)});
    }
    Workspace<C, D>& work = *sessions[0]->work_;
    const Memory<D> memory(dev, (static_cast<std::size_t>(n) + 1) * S * sizeof(std::int32_t));
    auto* const current = reinterpret_cast<std::int32_t*>(memory.data());
    dev.upload(current, ids.data(), ids.size_bytes());
    for (index_t i = 0; i < n; ++i) {
      forward(w, DeviceIds(current, static_cast<index_t>(S)), std::span<const Sequence>(batch), work, Logits::last);
      dev.argmax(current, work.logits());
      dev.copy_bytes(current + static_cast<std::size_t>(i + 1) * S, current, S * sizeof(std::int32_t));
      for (Sequence& s : batch) ++s.position;
    }
    std::vector<std::int32_t> all(static_cast<std::size_t>(n) * S);
    dev.download(all.data(), current + S, all.size() * sizeof(std::int32_t));
    const auto logits = work.host_logits(dev);
    for (std::size_t i = 0; i < S; ++i) {
      Session<C, D>& s = *sessions[i];
      for (index_t t = 0; t < n; ++t) found[i].push_back(all[static_cast<std::size_t>(t) * S + i]);
      s.tokens_.push_back(ids[i]);
      s.tokens_.insert(s.tokens_.end(), found[i].begin(), found[i].end() - 1);
      s.cache_.advance(n);
      const float* l = &logits(static_cast<index_t>(i), 0);
      s.forget_logits();
      s.logits_.assign(l, l + logits.extent(1));
    }
  } else {
    std::vector<std::int32_t> next(ids.begin(), ids.end());
    for (index_t t = 0; t < n; ++t) {
      const auto logits = decode_batch<C, D>(sessions, next);
      for (std::size_t i = 0; i < sessions.size(); ++i) {
        const float* l = &logits(static_cast<index_t>(i), 0);
        found[i].push_back(next[i] = static_cast<std::int32_t>(std::max_element(l, l + logits.extent(1)) - l));
      }
    }
  }
  return found;
}

}  // namespace tinyllama
