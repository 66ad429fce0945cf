// Chat templates (interface; bodies follow).
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tinyllama/text/tokenizer.hpp"

namespace tinyllama {

enum class ChatTemplate : std::uint8_t { none, zephyr, chatml, human, llama2 };
struct Message { std::string role, content; };

ChatTemplate parse_chat_template(std::string_view name);
std::string_view name(ChatTemplate t);
ChatTemplate detect_chat_template(const Vocabulary& v);
std::vector<std::int32_t> render(const Tokenizer& t, ChatTemplate c, std::span<const Message> messages, bool add_generation_prompt);
/// `first`: number of messages (and their answers) that stand in the cache already.
std::vector<std::int32_t> render_turn(const Tokenizer& t, ChatTemplate c, std::span<const Message> messages, std::size_t first, bool add_generation_prompt);
std::vector<std::int32_t> stop_ids(const Tokenizer& t, ChatTemplate c);
std::vector<std::string> stop_strings(ChatTemplate c);

}  // namespace tinyllama
