// Chat templates: a conversation to ids. Control pieces come from the template alone, never from what somebody wrote.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tinyllama/error.hpp"
#include "tinyllama/text/tokenizer.hpp"

namespace tinyllama {

/// The formats of TinyLlama's chat models and their relatives; [x] is a control piece, all else plain text:
///   zephyr  <|system|>\n...[eos]\n<|user|>\n...[eos]\n<|assistant|>\n        TinyLlama-1.1B-Chat v0.6, v1.0
///   chatml  [<|im_start|>]user\n...[<|im_end|>]\n[<|im_start|>]assistant\n   TinyLlama-1.1B-Chat v0.2-0.5, SmolLM2
///   human   ### Human: ...### Assistant:                                     TinyLlama-1.1B-Chat v0.1
///   llama2  [bos][INST] <<SYS>>\n...\n<</SYS>>\n\n... [/INST] ... [eos]      Llama-2-chat ("[INST]" is plain text)
enum class ChatTemplate : std::uint8_t { none, zephyr, chatml, human, llama2 };

struct Message {
  std::string role;  // "system", "user" or "assistant"
  std::string content;
};

namespace detail {
inline constexpr std::array<std::pair<std::string_view, ChatTemplate>, 5> chat_templates{{{"none", ChatTemplate::none},
                                                                                         {"zephyr", ChatTemplate::zephyr},
                                                                                         {"chatml", ChatTemplate::chatml},
                                                                                         {"human", ChatTemplate::human},
                                                                                         {"llama2", ChatTemplate::llama2}}};
}  // namespace detail

constexpr std::string_view name(ChatTemplate t) { return detail::chat_templates[static_cast<std::size_t>(t)].first; }

/// The template of that name, or an Error that lists the names.
inline ChatTemplate parse_chat_template(std::string_view text) {
  std::string known;
  for (const auto& [n, t] : detail::chat_templates) {
    if (n == text) return t;
    known.append(known.empty() ? "" : ", ").append(n);
  }
  throw Error("chat template", "", "one of " + known, "'" + std::string(text) + "'");
}

/// The template of a Jinja source, told by its markers; `none` where it is another.
inline ChatTemplate detect_chat_template(std::string_view jinja) {
  const auto has = [&](std::string_view marker) { return jinja.find(marker) != jinja.npos; };
  if (has("<|im_start|>") && has("<|im_end|>")) return ChatTemplate::chatml;
  if (has("<|user|>") && has("<|assistant|>") && !has("<|end|>")) return ChatTemplate::zephyr;  // with <|end|> it is Phi's
  if (has("### Human:") && has("### Assistant:")) return ChatTemplate::human;
  if (has("[INST]") && has("[/INST]")) return ChatTemplate::llama2;
  return ChatTemplate::none;
}

/// The template that the file names; without one, ChatML where the vocabulary has its pieces.
inline ChatTemplate detect_chat_template(const Vocabulary& v) {
  if (!v.chat_template.empty()) return detect_chat_template(std::string_view(v.chat_template));
  int markers = 0;
  for (const Piece& p : v.pieces) markers += p.text == "<|im_start|>" || p.text == "<|im_end|>";
  return markers == 2 ? ChatTemplate::chatml : ChatTemplate::none;
}

/// The system message that a ChatML template puts where a conversation has none, if it stands there as a literal (SmolLM2 has one); else "".
inline std::string default_system_message(const Vocabulary& v) {
  const std::string_view jinja = v.chat_template;
  constexpr std::string_view opening = "<|im_start|>system", closing = "<|im_end|>";
  for (std::size_t at = jinja.find(opening); at != jinja.npos; at = jinja.find(opening, at + 1)) {
    std::string_view rest = jinja.substr(at + opening.size());
    if (rest.starts_with('\n')) rest.remove_prefix(1);          // GGUF: a line break inside the literal
    else if (rest.starts_with("\\n")) rest.remove_prefix(2);    // tokenizer_config.json: Jinja's escape
    else continue;
    const std::string_view literal = rest.substr(0, rest.find(closing));
    if (literal.size() < rest.size() && literal.find_first_of("'\"{}\\") == literal.npos) return std::string(literal);
  }
  return "";
}

namespace detail {

/// Plain text is gathered and encoded in one piece; a control piece ends it.
class ChatWriter {
 public:
  ChatWriter(const Tokenizer& t, bool continuation) : t_(t), continuation_(continuation) {}
  ChatWriter& text(std::string_view s) { return text_.append(s), *this; }
  ChatWriter& control(std::int32_t id) {
    flush();
    ids_.push_back(id);
    continuation_ = false;
    return *this;
  }
  ChatWriter& control(std::string_view piece) {
    const auto id = t_.find(piece);
    if (!id) throw Error(t_.vocabulary().source, "chat template", "a vocabulary with the piece " + std::string(piece), "none");
    return control(*id);
  }
  ChatWriter& eos() {
    if (t_.eos() < 0) throw Error(t_.vocabulary().source, "chat template", "a vocabulary with an end-of-text piece", "none");
    return control(t_.eos());
  }
  std::vector<std::int32_t> take() { return flush(), std::move(ids_); }

 private:
  void flush() {
    if (text_.empty()) return;
    const auto ids = t_.encode(text_, {.continuation = continuation_});
    ids_.insert(ids_.end(), ids.begin(), ids.end());
    text_.clear();
    continuation_ = true;
  }
  const Tokenizer& t_;
  bool continuation_;
  std::string text_;
  std::vector<std::int32_t> ids_;
};

inline void check_role(const Message& m) {
  if (m.role != "system" && m.role != "user" && m.role != "assistant")
    throw Error("chat template", "role", "system, user or assistant", "'" + m.role + "'");
}

}  // namespace detail

/// The ids that follow when messages[0, first) stand in the cache already, the last of them being an answer as it was generated, that is,
/// without its closing piece: closes the answer, adds messages[first, end) and, if asked, the opening of the next answer.
/// With first = 0 the conversation begins: with bos where that is the vocabulary's policy, and the template's own system message.
/// Throws Error for an unknown role, a vocabulary without the template's pieces, and for ChatTemplate::none.
inline std::vector<std::int32_t> render_turn(const Tokenizer& t, ChatTemplate how, std::span<const Message> messages, std::size_t first,
                                             bool add_generation_prompt) {
  if (first > messages.size()) throw Error("chat template", "first", "at most " + std::to_string(messages.size()), std::to_string(first));
  for (const Message& m : messages) detail::check_role(m);
  const bool begin = first == 0;
  detail::ChatWriter out(t, !begin);
  if (begin && t.bos() >= 0 && t.vocabulary().add_bos && how != ChatTemplate::llama2) out.control(t.bos());
  const auto rest = messages.subspan(first);
  switch (how) {
    case ChatTemplate::zephyr:
      if (!begin) out.eos().text("\n");
      for (const Message& m : rest) out.text("<|" + m.role + "|>\n").text(m.content).eos().text("\n");
      if (add_generation_prompt) out.text("<|assistant|>\n");
      break;
    case ChatTemplate::chatml: {
      const auto message = [&](std::string_view role, std::string_view content) {
        out.control("<|im_start|>").text(role).text("\n").text(content).control("<|im_end|>").text("\n");
      };
      if (!begin) out.control("<|im_end|>").text("\n");
      if (begin && !rest.empty() && rest[0].role != "system")
        if (const std::string system = default_system_message(t.vocabulary()); !system.empty()) message("system", system);
      for (const Message& m : rest) message(m.role, m.content);
      if (add_generation_prompt) out.control("<|im_start|>").text("assistant\n");
      break;
    }
    case ChatTemplate::human:
      for (const Message& m : rest)
        if (m.role == "system") out.text(m.content).text("\n");
        else out.text(m.role == "user" ? "### Human: " : "### Assistant: ").text(m.content);
      if (add_generation_prompt) out.text("### Assistant:");
      break;
    case ChatTemplate::llama2: {
      std::string system;  // goes into the user's message that follows
      if (!begin) out.text(" ").eos();
      for (const Message& m : rest) {
        if (m.role == "system") system = "<<SYS>>\n" + m.content + "\n<</SYS>>\n\n";
        else if (m.role == "assistant") out.text(" ").text(m.content).text(" ").eos();
        else (t.bos() >= 0 ? out.control(t.bos()) : out).text("[INST] ").text(std::exchange(system, "")).text(m.content).text(" [/INST]");
      }
      break;  // "[/INST]" opens the answer
    }
    case ChatTemplate::none: throw Error(t.vocabulary().source, "chat template", "a known one, or one chosen by name", "none");
  }
  return out.take();
}

/// The ids of a whole conversation.
inline std::vector<std::int32_t> render(const Tokenizer& t, ChatTemplate how, std::span<const Message> messages, bool add_generation_prompt) {
  return render_turn(t, how, messages, 0, add_generation_prompt);
}

/// Ids that end an answer.
inline std::vector<std::int32_t> stop_ids(const Tokenizer& t, ChatTemplate how) {
  std::vector<std::int32_t> ids;
  const auto add = [&](std::int32_t id) {
    if (id >= 0 && std::find(ids.begin(), ids.end(), id) == ids.end()) ids.push_back(id);
  };
  add(t.eos());
  if (how == ChatTemplate::chatml)
    for (const char* piece : {"<|im_end|>", "<|endoftext|>"}) add(t.find(piece).value_or(-1));
  return ids;
}

/// Texts that end an answer, and are no part of it: where a template has no piece for its end, the next speaker's mark.
inline std::vector<std::string> stop_strings(ChatTemplate how) {
  if (how == ChatTemplate::human) return {"### Human:"};
  return {};
}

}  // namespace tinyllama
