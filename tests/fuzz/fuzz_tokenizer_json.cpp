// libFuzzer: any bytes as a tokenizer.json give an Error, or a tokenizer that encodes, decodes and streams.
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "tinyllama/io/tokenizer_json.hpp"
#include "tinyllama/text/chat_template.hpp"
#include "tinyllama/text/stream_decoder.hpp"
#include "tinyllama/text/tokenizer.hpp"

namespace {

void use(const tinyllama::Tokenizer& t, std::string_view text) {
  for (const bool special : {false, true}) {
    const auto ids = t.encode(text, {.special = special});
    const std::string whole = t.decode(ids, special);
    tinyllama::StreamDecoder decoder(t, special);
    std::string parts;
    for (const auto id : ids) parts += decoder.push(id);
    if (parts + decoder.finish() != whole) __builtin_trap();
    for (const auto id : ids)
      if (!special && t.type(id) == tinyllama::PieceType::control) __builtin_trap();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  try {
    tinyllama::Vocabulary v = tinyllama::read_tokenizer_json(input, "input");
    tinyllama::apply_tokenizer_config(v, tinyllama::detail::parse_json(input, "input"), "input");
    const tinyllama::Tokenizer t(std::move(v));
    use(t, "Hello  <s>\xc3\xa9 12\n\xff");
    use(t, input.substr(0, 64));
  } catch (const tinyllama::Error&) {
  }
  return 0;
}
