// load_vocabulary: which reader a path gets, what is read beside it, and errors that name the file.
#include <doctest/doctest.h>

#include <cstring>
#include <fstream>

#include "tests/text/vectors.hpp"
#include "tinyllama/io/tokenizer_file.hpp"

using namespace tinyllama;
using namespace tinyllama::test;

namespace {

void write(const std::filesystem::path& path, const std::string& bytes) { std::ofstream(path, std::ios::binary) << bytes; }
template <class T>
std::string raw(T v) {
  std::string s(sizeof v, '\0');
  std::memcpy(s.data(), &v, sizeof v);
  return s;
}
std::string entry(float score, const std::string& text) { return raw(score) + raw(static_cast<std::int32_t>(text.size())) + text; }

}  // namespace

TEST_CASE("tokenizer_file: by content or name") {
  const auto folder = fixture("tokenizer/sentencepiece");
  CHECK(load_vocabulary(folder / "llama.model").pieces.size() == load_vocabulary(folder / "llama.json").pieces.size());
  TempFolder tmp;
  write(tmp / "copy", read_file(folder / "llama.model"));
  CHECK(load_vocabulary(tmp / "copy").pieces.size() == load_vocabulary(folder / "llama.model").pieces.size());
  write(tmp / "other", read_file(folder / "llama.json"));
  CHECK(load_vocabulary(tmp / "other").merges.size() > 100);
}

TEST_CASE("tokenizer_file: a folder, with what stands beside") {
  TempFolder tmp;
  CHECK_THROWS_WITH_AS(load_vocabulary(tmp.path()), doctest::Contains("tokenizer.json"), Error);
  const auto spm = fixture("tokenizer/sentencepiece");
  write(tmp / "tokenizer.model", read_file(spm / "llama.model"));
  write(tmp / "tokenizer_config.json", R"({"add_bos_token": false, "eos_token": "<s>", "chat_template": "one"})");
  Vocabulary v = load_vocabulary(tmp.path());
  CHECK(v.source == (tmp / "tokenizer.model").string());
  CHECK_FALSE(v.add_bos);
  CHECK(v.eos == 1);
  CHECK(v.chat_template == "one");
  write(tmp / "chat_template.jinja", "two");
  write(tmp / "tokenizer.json", read_file(spm / "llama.json"));
  v = load_vocabulary(tmp.path());
  CHECK(v.source == (tmp / "tokenizer.json").string());
  CHECK(v.chat_template == "two");
  write(tmp / "tokenizer_config.json", "{");
  CHECK_THROWS_WITH_AS(load_vocabulary(tmp.path()), doctest::Contains("tokenizer_config.json"), Error);
}

TEST_CASE("tokenizer_file: errors name the file") {
  TempFolder tmp;
  CHECK_THROWS_WITH_AS(load_vocabulary(tmp / "none.model"), doctest::Contains("none.model"), Error);
  for (const char* name : {"bad.model", "bad.json", "bad.gguf", "bad.bin", "bad"}) {
    write(tmp / name, "\x01\x02\x03\x04\x05");
    CHECK_THROWS_WITH_AS(load_vocabulary(tmp / name), doctest::Contains(name), Error);
  }
  write(tmp / "empty.json", "");
  CHECK_THROWS_WITH_AS(load_vocabulary(tmp / "empty.json"), doctest::Contains("empty.json"), Error);
}

TEST_CASE("tokenizer_file: llama2.c") {
  const std::string head = raw<std::int32_t>(3) + entry(0, "<unk>") + entry(0, "\n<s>\n") + entry(0, "\n</s>\n");
  std::string bytes;
  for (int b = 0; b < 256; ++b) {
    char text[8];
    std::snprintf(text, sizeof text, "<0x%02X>", b);
    bytes += entry(0, text);
  }
  const std::string good = head + bytes + entry(-1, " a") + entry(-2, "a");
  const Vocabulary v = read_tokenizer_llama2c(good, "tok.bin");
  CHECK(v.pieces.size() == 261);
  CHECK(v.pieces[1].text == "<s>");
  CHECK(v.pieces[2].type == PieceType::control);
  CHECK(v.byte_fallback);
  CHECK(Tokenizer(v).encode("a b") == Ids{259, 3 + 0xe2, 3 + 0x96, 3 + 0x81, 3 + 'b'});  // a lone space is no piece of this one
  CHECK_THROWS_AS(read_tokenizer_llama2c(head.substr(0, 4), "x"), Error);
  CHECK_THROWS_AS(read_tokenizer_llama2c(good + entry(0, "long"), "x"), Error);
  CHECK_THROWS_AS(read_tokenizer_llama2c(head + raw(0.0f) + raw<std::int32_t>(-1), "x"), Error);
  CHECK_THROWS_AS(read_tokenizer_llama2c(head + raw(0.0f) + raw<std::int32_t>(1 << 30), "x"), Error);
  int accepted = 0;
  for (std::size_t n = 0; n < good.size(); ++n) try {
      accepted += read_tokenizer_llama2c(good.substr(0, n), "x").pieces.size() > 0;
    } catch (const Error&) {
    }
  CHECK(accepted == 258);  // it ends cleanly after each piece from the third on
}
