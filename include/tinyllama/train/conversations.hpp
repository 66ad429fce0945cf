// Conversations to training samples: the ids that inference would see, and the loss on the assistant's answers alone.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tinyllama/io/file.hpp"
#include "tinyllama/io/json.hpp"
#include "tinyllama/tensor/dtype.hpp"
#include "tinyllama/text/chat_template.hpp"

namespace tinyllama {

/// A target that the loss does not count.
inline constexpr std::int32_t not_counted = -100;

/// Row t of a sample: the model reads ids[t] and has to say targets[t], the id that follows, where that is not -100.
struct Sample {
  std::vector<std::int32_t> ids, targets;  // [T] each

  index_t tokens() const { return static_cast<index_t>(ids.size()); }
  index_t counted() const { return std::count_if(targets.begin(), targets.end(), [](std::int32_t t) { return t != not_counted; }); }
  bool operator==(const Sample&) const = default;
};

/// Which answers of a conversation are learned.
enum class Answers : std::uint8_t { all, last };

/// What becomes of a sample of more than max_tokens: `truncate` keeps its beginning, if an answer's token is left in it.
enum class TooLong : std::uint8_t { drop, truncate };

struct ConversationOptions {
  std::optional<ChatTemplate> chat_template = {};  // default: the vocabulary's own
  Answers answers = Answers::all;
  index_t max_tokens = 2048;
  TooLong too_long = TooLong::drop;
};

/// Samples of a file, and what became of its lines: lines = samples + dropped + without_answer.
struct ConversationSamples {
  std::vector<Sample> samples;
  std::int64_t lines = 0, dropped = 0, truncated = 0, without_answer = 0;
  std::int64_t tokens = 0, counted = 0;  // of all samples; those the loss counts
};

namespace detail {

/// The template asked for, or the vocabulary's.
inline ChatTemplate chosen_template(const Tokenizer& t, std::optional<ChatTemplate> asked) {
  return asked ? *asked : detect_chat_template(t.vocabulary());
}

/// How many of the ids at the beginning of a turn close the answer before it, and are the model's to say: through the closing piece, or, where the
/// template has none, the mark of the next speaker, at which generation stops.
inline std::size_t closing_ids(const Tokenizer& t, ChatTemplate how, std::span<const std::int32_t> turn) {
  if (how == ChatTemplate::human) {
    const std::string mark = stop_strings(how).front();
    std::string text;
    for (std::size_t n = 0; n < turn.size() && text.size() < mark.size(); ++n)
      if ((text += t.piece(turn[n])).starts_with(mark)) return n + 1;
    return 0;  // the next speaker is not the user
  }
  const auto stops = stop_ids(t, how);
  const auto at = std::find_first_of(turn.begin(), turn.end(), stops.begin(), stops.end());
  return at == turn.end() ? 0 : static_cast<std::size_t>(at - turn.begin()) + 1;
}

/// A conversation up to the end of its last answer, where the answers of messages[learn_from, end) are learned. It is put together as a chat puts it
/// together: each prompt by render_turn, and each answer as a text of its own, which is what the model will have to continue with. Encoding a
/// prompt and its answer as one text could merge across their border. Without an answer to learn the sample is empty.
inline Sample conversation_sample(const Tokenizer& t, ChatTemplate how, std::span<const Message> messages, std::size_t learn_from) {
  for (const Message& m : messages) check_role(m);
  while (!messages.empty() && messages.back().role != "assistant") messages = messages.first(messages.size() - 1);
  if (messages.size() <= learn_from) return {};
  // These two open an answer without a space, which the model says first.
  const std::string gap = how == ChatTemplate::human || how == ChatTemplate::llama2 ? " " : "";

  std::vector<std::int32_t> ids, targets;  // targets[i]: ids[i] if it is learned
  const auto add = [&](std::span<const std::int32_t> more, bool learned) {
    ids.insert(ids.end(), more.begin(), more.end());
    for (const std::int32_t id : more) targets.push_back(learned ? id : not_counted);
  };
  std::size_t first = 0;       // messages before it stand in `ids`
  bool close_learned = false;  // the answer before `first` is one to learn
  for (std::size_t i = 0; i < messages.size(); ++i) {
    if (messages[i].role != "assistant") continue;
    const auto turn = render_turn(t, how, messages.first(i), first, true);
    const std::size_t closing = first > 0 ? closing_ids(t, how, turn) : 0;
    add(std::span(turn).first(closing), close_learned);
    add(std::span(turn).subspan(closing), false);
    close_learned = i >= learn_from;
    add(t.encode(gap + messages[i].content, {.continuation = true}), close_learned);
    first = i + 1;
  }
  const auto end = render_turn(t, how, messages, first, false);
  if (how != ChatTemplate::human) add(std::span(end).first(closing_ids(t, how, end)), true);
  else if (t.eos() >= 0) add(std::array{t.eos()}, true);
  targets.erase(targets.begin());
  ids.pop_back();
  return {std::move(ids), std::move(targets)};
}

/// Whether the sample may stay, cut to max_tokens where that is the policy.
inline bool fit(Sample& s, index_t max_tokens, TooLong policy, bool& truncated) {
  if (s.tokens() <= max_tokens) return true;
  if (policy == TooLong::drop) return false;
  s.ids.resize(static_cast<std::size_t>(max_tokens));
  s.targets.resize(static_cast<std::size_t>(max_tokens));
  return truncated = s.counted() > 0;
}

/// Calls f(const json&, "FILE:LINE") for each line that is not blank; each must be an object.
template <class F>
void for_each_json_line(const std::filesystem::path& path, F&& f) {
  const MappedFile file(path);
  std::string_view text(reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size());
  if (text.starts_with("\xef\xbb\xbf")) text.remove_prefix(3);
  for (std::size_t line = 1; !text.empty(); ++line) {
    const std::size_t end = std::min(text.find('\n'), text.size());
    const std::string_view row = text.substr(0, end);
    text.remove_prefix(std::min(end + 1, text.size()));
    if (row.find_first_not_of(" \t\r") == row.npos) continue;
    const std::string where = path.string() + ":" + std::to_string(line);
    const json j = parse_json(row, where);
    if (!j.is_object()) throw Error(where, "JSON", "an object", std::string(j.type_name()));
    f(j, std::string_view(where));
  }
}

inline std::string required_string(const JsonObject& o, std::string_view key) {
  if (!o.find(key)) throw o.wrong(key, "a string");
  return o.string(key, "");
}

/// The list of messages under `key`, in OpenAI's layout (role, content) or ShareGPT's (from, value).
inline std::vector<Message> messages_of(const JsonObject& o, std::string_view key, std::string_view where) {
  const json* list = o.find(key);
  if (!list || !list->is_array() || list->empty()) throw o.wrong(key, "a list of messages");
  std::vector<Message> out;
  for (std::size_t i = 0; i < list->size(); ++i) {
    const std::string here = std::string(key) + "[" + std::to_string(i) + "]";
    if (!(*list)[i].is_object()) throw Error(where, here, "an object", json_text((*list)[i]));
    const JsonObject m((*list)[i], where);
    const bool sharegpt = m.find("from") != nullptr;
    const std::string found = required_string(m, sharegpt ? "from" : "role");
    std::string role = found;
    if (role == "human") role = "user";
    if (role == "gpt" || role == "chatgpt" || role == "model" || role == "bot") role = "assistant";
    if (role != "system" && role != "user" && role != "assistant")
      throw Error(where, here, "the role system, user or assistant", "'" + found.substr(0, 60) + "'");
    out.push_back({std::move(role), required_string(m, sharegpt ? "value" : "content")});
  }
  return out;
}

/// What stands under `key`: one text as a message of `role`, or a list of messages.
inline std::vector<Message> text_or_messages(const JsonObject& o, std::string_view key, std::string_view role, std::string_view where) {
  const json* v = o.find(key);
  if (v && v->is_string()) return {{std::string(role), v->get<std::string>()}};
  if (v && v->is_array()) return messages_of(o, key, where);
  throw o.wrong(key, "a string or a list of messages");
}

/// One object of a JSONL file as a conversation.
inline std::vector<Message> conversation_of(const json& j, std::string_view where) {
  const JsonObject o(j, where);
  for (const char* key : {"messages", "conversations"})
    if (o.find(key)) return messages_of(o, key, where);
  using Pair = std::pair<const char*, const char*>;
  for (const auto& [ask, answer] :
       {Pair{"prompt", "completion"}, Pair{"prompt", "response"}, Pair{"question", "answer"}, Pair{"instruction", "output"}}) {
    if (!o.find(ask) || !o.find(answer)) continue;
    std::vector<Message> talk = text_or_messages(o, ask, "user", where);
    if (const std::string input = o.string("input", ""); ask == std::string_view("instruction") && !input.empty())
      talk.back().content += "\n\n" + input;
    if (const std::string system = o.string("system", ""); !system.empty()) talk.insert(talk.begin(), {"system", system});
    for (Message& m : text_or_messages(o, answer, "assistant", where)) talk.push_back(std::move(m));
    return talk;
  }
  std::string keys;
  for (const auto& item : j.items()) keys.append(keys.empty() ? "" : ", ").append(item.key().substr(0, 40));
  throw Error(where, "", "messages, conversations, or a pair: prompt and completion (or response), question and answer, instruction and output",
              keys.empty() ? "an empty object" : keys.substr(0, 200));
}

/// Index of the last answer, or `messages.size()`.
inline std::size_t last_answer(std::span<const Message> messages) {
  for (std::size_t i = messages.size(); i-- > 0;)
    if (messages[i].role == "assistant") return i;
  return messages.size();
}

}  // namespace detail

/// One conversation as a sample: its ids are those that a chat of these messages would have in its cache when the last answer ends, and the targets
/// count on the answers and on what closes them (</s>, <|im_end|>; "### Human:" between the turns of the `human` template, which has no piece for
/// it). Messages after the last answer are left out; a conversation without an answer gives an empty sample. Throws Error as render_turn does.
inline Sample conversation_sample(const Tokenizer& t, ChatTemplate how, std::span<const Message> messages, Answers answers = Answers::all) {
  return detail::conversation_sample(t, how, messages, answers == Answers::last ? detail::last_answer(messages) : 0);
}

/// The samples of a JSONL file, in its order. Each line is a conversation: {"messages": [{"role", "content"}]}, ShareGPT's {"conversations":
/// [{"from", "value"}]}, or a pair prompt/completion, prompt/response, question/answer or instruction/output (with "input"), whose sides are
/// texts or lists of messages and which may have a "system". Throws Error with file and line where a line is none of them, and where no sample is
/// left.
inline ConversationSamples read_conversations(const std::filesystem::path& path, const Tokenizer& t, const ConversationOptions& options = {}) {
  if (options.max_tokens < 1) throw Error("read_conversations", "max_tokens", "1 or more", std::to_string(options.max_tokens));
  const ChatTemplate how = detail::chosen_template(t, options.chat_template);
  ConversationSamples out;
  detail::for_each_json_line(path, [&](const detail::json& j, std::string_view where) {
    ++out.lines;
    Sample s = conversation_sample(t, how, detail::conversation_of(j, where), options.answers);
    bool truncated = false;
    if (s.ids.empty()) return void(++out.without_answer);
    if (!detail::fit(s, options.max_tokens, options.too_long, truncated)) return void(++out.dropped);
    out.truncated += truncated;
    out.tokens += s.tokens();
    out.counted += s.counted();
    out.samples.push_back(std::move(s));
  });
  if (out.samples.empty())
    throw Error(path.string(), "conversations", "at least one with an answer, within " + std::to_string(options.max_tokens) + " tokens",
                std::to_string(out.lines) + " lines, " + std::to_string(out.without_answer) + " without an answer, " + std::to_string(out.dropped) +
                    " too long");
  return out;
}

}  // namespace tinyllama
