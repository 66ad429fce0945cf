// Preferences to training pairs: two answers to one prompt, the better and the worse, for DPO (arXiv 2305.18290).
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tinyllama/train/conversations.hpp"

namespace tinyllama {

/// Both hold the whole conversation; targets count only where the two may differ: on the answers after what they share.
struct PreferencePair {
  Sample chosen, rejected;
};

struct PreferenceOptions {
  std::optional<ChatTemplate> chat_template = {};  // default: the vocabulary's own
  index_t max_tokens = 2048;                       // of each of the two
  TooLong too_long = TooLong::drop;
};

/// Pairs of a file, and what became of its lines: lines = pairs + dropped + identical.
struct PreferencePairs {
  std::vector<PreferencePair> pairs;
  std::int64_t lines = 0, dropped = 0, truncated = 0, identical = 0;
};

namespace detail {

/// One side of a pair as a whole conversation: the prompt with the answer, unless the answer is a conversation itself.
inline std::vector<Message> preference_side(const JsonObject& o, const char* key, std::string_view where) {
  std::vector<Message> answer = text_or_messages(o, key, "assistant", where);
  if (answer.back().role != "assistant") throw Error(where, key, "an assistant's message as the last", answer.back().role + "'s");
  if (answer.front().role != "assistant") return answer;
  for (const char* ask : {"prompt", "question"}) {
    if (!o.find(ask)) continue;
    std::vector<Message> talk = text_or_messages(o, ask, "user", where);
    if (const std::string system = o.string("system", ""); !system.empty()) talk.insert(talk.begin(), {"system", system});
    for (Message& m : answer) talk.push_back(std::move(m));
    return talk;
  }
  throw o.wrong("prompt", "a string or a list of messages");
}

/// Number of messages at the beginning that both have.
inline std::size_t shared_messages(std::span<const Message> a, std::span<const Message> b) {
  std::size_t n = 0;
  while (n < a.size() && n < b.size() && a[n].role == b[n].role && a[n].content == b[n].content) ++n;
  return n;
}

}  // namespace detail

/// A pair from two conversations that share their beginning and both end in an answer. The answers that they share are not counted: their
/// probabilities would cancel. Throws Error where the messages differ before an answer does; `where` is for messages.
inline PreferencePair preference_pair(const Tokenizer& t, ChatTemplate how, std::span<const Message> chosen, std::span<const Message> rejected,
                                      std::string_view where = "preference_pair") {
  const std::size_t shared = detail::shared_messages(chosen, rejected);
  for (const auto side : {chosen, rejected})
    if (shared >= side.size() || side[shared].role != "assistant" || side.back().role != "assistant")
      throw Error(where, "chosen and rejected", "one prompt, then two answers that differ",
                  shared >= side.size() ? "one that is the beginning of the other"
                                        : "messages that differ at " + std::to_string(shared) + ", the " + side[shared].role + "'s");
  return {detail::conversation_sample(t, how, chosen, shared), detail::conversation_sample(t, how, rejected, shared)};
}

/// The pairs of a JSONL file, in its order. Each line has "chosen" and "rejected": texts or messages that follow "prompt" (a text or messages;
/// with "system" where there is one), or both the whole conversation. Pairs of equal conversations teach nothing: they are counted and left
/// out. Throws Error with file and line where a line is no such pair, and where no pair is left.
inline PreferencePairs read_preferences(const std::filesystem::path& path, const Tokenizer& t, const PreferenceOptions& options = {}) {
  if (options.max_tokens < 1) throw Error("read_preferences", "max_tokens", "1 or more", std::to_string(options.max_tokens));
  const ChatTemplate how = detail::chosen_template(t, options.chat_template);
  PreferencePairs out;
  detail::for_each_json_line(path, [&](const detail::json& j, std::string_view where) {
    ++out.lines;
    const detail::JsonObject o(j, where);
    const auto chosen = detail::preference_side(o, "chosen", where), rejected = detail::preference_side(o, "rejected", where);
    if (chosen.size() == rejected.size() && detail::shared_messages(chosen, rejected) == chosen.size()) return void(++out.identical);
    PreferencePair p = preference_pair(t, how, chosen, rejected, where);
    bool first = false, second = false;
    if (!detail::fit(p.chosen, options.max_tokens, options.too_long, first) || !detail::fit(p.rejected, options.max_tokens, options.too_long, second))
      return void(++out.dropped);
    out.truncated += first || second;
    out.pairs.push_back(std::move(p));
  });
  if (out.pairs.empty())
    throw Error(
        path.string(), "preferences", "at least one pair within " + std::to_string(options.max_tokens) + " tokens",
        std::to_string(out.lines) + " lines, " + std::to_string(out.identical) + " with equal answers, " + std::to_string(out.dropped) + " too long");
  return out;
}

}  // namespace tinyllama
