// Text from a session: as a range of pieces, or through a callback.
#pragma once

#include <concepts>
#include <iterator>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>

#include "tinyllama/generate/sampler.hpp"
#include "tinyllama/generate/stop_strings.hpp"
#include "tinyllama/model/model.hpp"
#include "tinyllama/text/stream_decoder.hpp"

namespace tinyllama {

/// How to go on. The members of SamplingOptions stand here themselves, so that one pair of braces sets everything.
struct GenerateOptions {
  int max_tokens = 256;
  float temperature = 0.8f;         ///< 0: greedy
  int top_k = 0;
  float top_p = 0.95f;
  float min_p = 0.0f;
  float repetition_penalty = 1.0f;
  float presence_penalty = 0.0f;
  float frequency_penalty = 0.0f;
  int penalty_window = 64;
  std::vector<std::pair<std::int32_t, float>> logit_bias = {};
  std::uint64_t seed = 0;
  std::vector<std::int32_t> stop_ids = {};       ///< beside the vocabulary's end of sequence
  bool ignore_eos = false;                       ///< go on behind an end of sequence
  std::vector<std::string> stop_strings = {};    ///< not part of the text
  std::optional<bool> bos = std::nullopt;        ///< before a prompt in an empty session; unset: the vocabulary's policy
  bool special = false;                          ///< control pieces written in the prompt count as such
  int log_probabilities = -1;                    ///< n >= 0: Token::log_probability and the n most probable alternatives
  index_t chunk = 0;                             ///< tokens of a prefill step; 0: as many as suit the device
  std::function<void(std::size_t done, std::size_t total)> progress = {};  ///< of the prefill
  std::stop_token stop = {};                     ///< another thread may end it; checked between steps

  SamplingOptions sampling() const {
    return {temperature, top_k, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty, penalty_window, logit_bias, seed};
  }
};

/// Why a generation ended.
enum class Finish : std::uint8_t { running, end_of_sequence, stop_id, stop_string, max_tokens, context_full, cancelled };
constexpr std::string_view name(Finish f) {
  constexpr std::string_view names[] = {"running", "end_of_sequence", "stop_id", "stop_string", "max_tokens", "context_full", "cancelled"};
  return names[static_cast<std::size_t>(f)];
}

/// One generated token. `text` is what became whole characters with it, perhaps nothing.
struct Token {
  std::int32_t id = -1;
  std::string text;
  float log_probability = 0;
  std::vector<TokenProbability> top;
};

/// A generation under way: a single-pass range of std::string_view, each some whole characters. It refers to the session, which holds
/// the conversation when it ends: the prompt and all tokens but a final end or stop id.
template <Config C, Device D>
class Generation {
 public:
  Generation(Session<C, D>& session, std::vector<std::int32_t> prompt, GenerateOptions options)
      : session_(&session), tokenizer_(session.model().tokenizer()), options_(std::move(options)), sampler_(options_.sampling()), decoder_(tokenizer_),
        stop_strings_(options_.stop_strings), prompt_(std::move(prompt)) {}
  Generation(Generation&&) = default;

  /// The next token, or null at the end (see finish()).
  const Token* next() {
    if (finish_ != Finish::running) return nullptr;
    if (!started_ && !start()) return nullptr;
    if (options_.stop.stop_requested()) return end(Finish::cancelled);
    if (generated_ >= options_.max_tokens) return end(Finish::max_tokens);
    if (generated_ > 0) {
      if (session_->length() == session_->cache().context()) return end(Finish::context_full);
      session_->flush();
    }
    token_ = Token();
    const std::int32_t id = choose();
    if (options_.log_probabilities >= 0) {
      token_.top = Sampler::log_probabilities(session_->logits(), id, options_.log_probabilities);
      token_.log_probability = token_.top.front().log_probability;
      token_.top.erase(token_.top.begin());
    }
    ++generated_;
    token_.id = id;
    history_.push_back(id);
    if (!options_.ignore_eos && id == tokenizer_.eos()) return end(Finish::end_of_sequence);
    if (std::find(options_.stop_ids.begin(), options_.stop_ids.end(), id) != options_.stop_ids.end()) return end(Finish::stop_id);
    session_->defer(id);
    token_.text = stop_strings_.push(decoder_.push(id));
    if (stop_strings_.stopped()) finish_ = Finish::stop_string;
    return &token_;
  }

  Finish finish() const { return finish_; }
  /// The last token, also one that ended the generation.
  const Token& token() const { return token_; }
  /// Tokens drawn so far, an end of sequence included.
  int generated() const { return generated_; }
  std::span<const std::int32_t> prompt() const { return prompt_; }

  class iterator {
   public:
    using value_type = std::string_view;
    using difference_type = std::ptrdiff_t;
    iterator() = default;
    explicit iterator(Generation* g) : generation_(g) { ++*this; }
    std::string_view operator*() const { return generation_->text_; }
    iterator& operator++() {
      if (!generation_->advance()) generation_ = nullptr;
      return *this;
    }
    void operator++(int) { ++*this; }
    bool operator==(std::default_sentinel_t) const { return generation_ == nullptr; }

   private:
    Generation* generation_ = nullptr;
  };
  iterator begin() { return iterator(this); }
  std::default_sentinel_t end() const { return {}; }

  /// All that is left, as one string.
  std::string text() {
    std::string all;
    while (advance()) all += text_;
    return all;
  }

  /// Calls on_token(const Token&) for each token until it returns false, if it returns anything.
  template <class F>
  Finish run(F&& on_token) {
    const auto go_on = [&](const Token& t) {
      if constexpr (std::is_convertible_v<std::invoke_result_t<F&, const Token&>, bool>) return static_cast<bool>(on_token(t));
      else return on_token(t), true;
    };
    while (const Token* t = next())
      if (!go_on(*t)) return finish_ = Finish::cancelled;
    if (advance()) {
      token_ = {-1, text_, 0, {}};
      go_on(token_);
    }
    return finish_;
  }

  /// The sampler's next token: by the device where it has the logits and nobody else wants them.
  std::int32_t choose() {
    if constexpr (!D::host_memory)
      if (options_.log_probabilities < 0 && session_->has_logits_on_device())
        if (const auto draw = sampler_.draw())
          if (const auto id = session_->choose(*draw)) return *id;
    return sampler_.sample(session_->logits(), history_);
  }

  /// Reads the prompt, which next() does otherwise; false where it was cancelled.
  bool start() {
    started_ = true;
    session_->reserve(std::min(session_->length() + static_cast<index_t>(prompt_.size()) + options_.max_tokens, session_->cache().context()),
                      std::max<index_t>(1, std::min<index_t>(prefill_chunk<D>(options_.chunk), static_cast<index_t>(prompt_.size()))));
    history_.assign(session_->tokens().begin(), session_->tokens().end());
    history_.insert(history_.end(), prompt_.begin(), prompt_.end());
    history_.reserve(history_.size() + static_cast<std::size_t>(std::max(0, options_.max_tokens)));
    for (const std::int32_t id : history_) decoder_.push(id);  // so that the first piece knows what stands before it
    session_->read(prompt_, {options_.chunk, Logits::last, options_.progress, options_.stop});
    if (session_->has_logits()) return true;
    if (options_.stop.stop_requested()) finish_ = Finish::cancelled;
    else throw Error("generate", "prompt", "at least one token (a text, or a vocabulary with a BOS)", "none");
    return false;
  }

 private:
  const Token* end(Finish why) {
    finish_ = why;
    return nullptr;
  }
  /// To the next piece of text that is not empty; what was held back comes last.
  bool advance() {
    while (const Token* t = next()) {
      if (t->text.empty()) continue;
      text_ = t->text;
      return true;
    }
    if (flushed_) return false;
    flushed_ = true;
    text_ = stop_strings_.push(decoder_.finish());
    text_ += stop_strings_.finish();
    return !text_.empty();
  }

  Session<C, D>* session_;
  Tokenizer tokenizer_;
  GenerateOptions options_;
  Sampler sampler_;
  StreamDecoder decoder_;
  StopStrings stop_strings_;
  std::vector<std::int32_t> prompt_, history_;
  Token token_;
  std::string text_;
  int generated_ = 0;
  Finish finish_ = Finish::running;
  bool started_ = false, flushed_ = false;
};

/// Goes on behind what the session holds with `prompt` (ids); nothing runs until the first piece is asked for.
template <Config C, Device D>
Generation<C, D> generate(Session<C, D>& session, std::vector<std::int32_t> prompt, GenerateOptions options = {}) {
  return Generation<C, D>(session, std::move(prompt), std::move(options));
}

/// The same with a text. An empty session gets the vocabulary's BOS first, by its policy.
template <Config C, Device D>
Generation<C, D> generate(Session<C, D>& session, std::string_view prompt, GenerateOptions options = {}) {
  const Tokenizer tokenizer = session.model().tokenizer();
  const bool first = session.length() == 0;
  const bool bos = first && options.bos.value_or(tokenizer.vocabulary().add_bos) && tokenizer.bos() >= 0;
  auto ids = tokenizer.encode(prompt, {bos, false, options.special, !first});
  return generate(session, std::move(ids), std::move(options));
}

/// Calls on_token(const Token&) for each token; it may return false to end. Returns why it ended. Text that was held back comes with a last
/// token of id -1.
template <Config C, Device D, class Prompt, std::invocable<const Token&> F>
Finish generate(Session<C, D>& session, Prompt&& prompt, GenerateOptions options, F&& on_token) {
  auto g = generate(session, std::forward<Prompt>(prompt), std::move(options));
  return g.run(on_token);
}

}  // namespace tinyllama
