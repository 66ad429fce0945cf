// The tokenizer in a GGUF file: SmolLM2's, llama.cpp's stories260K, and metadata that contradict themselves.
#include <doctest/doctest.h>

#include <cstring>
#include <functional>
#include <map>

#include "tests/text/vectors.hpp"
#include "tinyllama/io/tokenizer_file.hpp"

using namespace tinyllama;
using namespace tinyllama::test;

namespace {

template <class T>
std::string raw(T v) {
  std::string s(sizeof v, '\0');
  std::memcpy(s.data(), &v, sizeof v);
  return s;
}
std::string text(const std::string& s) { return raw<std::uint64_t>(s.size()) + s; }
std::string tag(GgufType t) { return raw(static_cast<std::uint32_t>(t)); }
std::string string_value(const std::string& s) { return tag(GgufType::string) + text(s); }
std::string uint_value(std::uint32_t v) { return tag(GgufType::u32) + raw(v); }
std::string bool_value(bool v) { return tag(GgufType::boolean) + std::string(1, static_cast<char>(v)); }
std::string array(GgufType t, std::size_t n, const std::string& body) { return tag(GgufType::array) + tag(t) + raw<std::uint64_t>(n) + body; }

using Keys = std::map<std::string, std::string>;

/// The metadata of a vocabulary, as llama.cpp's converters write them.
Keys keys_of(const Vocabulary& v) {
  std::string tokens, scores, types, merges;
  for (const Piece& p : v.pieces) tokens += text(p.text), scores += raw(p.score), types += raw(static_cast<std::int32_t>(p.type));
  for (const auto& [l, r] : v.merges) merges += text(l + " " + r);
  const std::size_t n = v.pieces.size();
  Keys k{{"tokens", array(GgufType::string, n, tokens)}, {"token_type", array(GgufType::i32, n, types)}};
  k["bos_token_id"] = uint_value(static_cast<std::uint32_t>(v.bos)), k["eos_token_id"] = uint_value(static_cast<std::uint32_t>(v.eos));
  if (v.kind == Vocabulary::Kind::byte_level_bpe) {
    k["model"] = string_value("gpt2"), k["pre"] = string_value("smollm"), k["merges"] = array(GgufType::string, v.merges.size(), merges);
  } else {
    k["model"] = string_value("llama"), k["scores"] = array(GgufType::f32, n, scores), k["unknown_token_id"] = uint_value(0);
  }
  return k;
}
Vocabulary read(const Keys& keys) {
  std::string s = "GGUF" + raw<std::uint32_t>(3) + raw<std::uint64_t>(0) + raw<std::uint64_t>(keys.size());
  for (const auto& [key, value] : keys) s += text("tokenizer.ggml." + key) + value;
  return read_tokenizer_gguf(Gguf("m.gguf", std::as_bytes(std::span(s.data(), s.size()))));
}

void refused(Keys k, const std::function<void(Keys&)>& change, const char* word) {
  CHECK_NOTHROW(read(k));
  change(k);
  INFO(std::string(word));
  try {
    Tokenizer(read(k));
    FAIL_CHECK("accepted");
  } catch (const Error& e) {
    INFO(std::string(e.what()));
    CHECK(std::string(e.what()).find(word) != std::string::npos);
    CHECK(e.where() == "m.gguf");
  }
}

}  // namespace

TEST_CASE("tokenizer in GGUF: both kinds come back") {
  const Vocabulary a = small_sentencepiece({"\xe2\x96\x81" "a", "a"}), b = small_byte_level({{"a", "b"}});
  const Vocabulary spm = read(keys_of(a)), byte = read(keys_of(b));
  CHECK(spm.pieces.size() == a.pieces.size());
  CHECK(spm.pieces[260].score == -1);
  CHECK(spm.byte_fallback);
  CHECK(spm.add_bos);
  CHECK(spm.add_space_prefix);
  CHECK(spm.unk == 0);
  CHECK(Tokenizer(spm).encode("a a") == Tokenizer(a).encode("a a"));
  CHECK(byte.pre_tokenizer == PreTokenizer::smollm);
  CHECK(byte.merges == b.merges);
  CHECK_FALSE(byte.add_bos);
  CHECK_FALSE(byte.add_space_prefix);
  CHECK(byte.bos == 256);
}

TEST_CASE("tokenizer in GGUF: policies, user-defined pieces, no ids") {
  Vocabulary v = small_sentencepiece({"a"});
  v.pieces.push_back({"x y", 0, PieceType::user_defined});  // converters write a space for U+2581
  v.bos = -1;
  Keys k = keys_of(v);
  k["add_bos_token"] = bool_value(false), k["add_eos_token"] = bool_value(true), k["add_space_prefix"] = bool_value(false);
  const Vocabulary read_back = read(k);
  CHECK(read_back.bos == -1);
  CHECK_FALSE(read_back.add_bos);
  CHECK(read_back.add_eos);
  CHECK(Tokenizer(read_back).encode("ax ya") == Ids{259, 260, 259});
  Keys llama3 = keys_of(small_byte_level({}));
  llama3["pre"] = string_value("llama-bpe");
  CHECK(read(llama3).ignore_merges);
  CHECK(read(llama3).add_bos);
}

TEST_CASE("tokenizer in GGUF: refused by name") {
  const Keys spm = keys_of(small_sentencepiece({"a"})), byte = keys_of(small_byte_level({{"a", "b"}}));
  refused(spm, [](Keys& k) { k.erase("model"); }, "tokenizer.ggml.model");
  refused(spm, [](Keys& k) { k["model"] = string_value("bert"); }, "bert");
  refused(spm, [](Keys& k) { k["model"] = uint_value(1); }, "string");
  refused(spm, [](Keys& k) { k.erase("tokens"); }, "tokens");
  refused(spm, [](Keys& k) { k.erase("scores"); }, "scores");
  refused(spm, [](Keys& k) { k["token_type"] = array(GgufType::i32, 1, raw(1)); }, "token_type");
  refused(spm, [](Keys& k) { k["bos_token_id"] = uint_value(260); }, "bos_token_id");
  refused(spm, [](Keys& k) { std::string& t = k["token_type"]; t.replace(t.size() - 4, 4, raw(9)); }, "9 for token 259");
  refused(byte, [](Keys& k) { k.erase("pre"); }, "tokenizer.ggml.pre");
  refused(byte, [](Keys& k) { k["pre"] = string_value("qwen2"); }, "qwen2");
  refused(byte, [](Keys& k) { k["merges"] = array(GgufType::string, 1, text("ab")); }, "merge 0");
  refused(byte, [](Keys& k) { k["merges"] = array(GgufType::string, 1, text("a zz")); }, "zz");
}

TEST_CASE("tokenizer in GGUF: SmolLM2") {
  const auto file = smollm2_gguf();
  if (!file) {
    MESSAGE("skipped: SmolLM2's GGUF file is not there");
    return;
  }
  const Vocabulary v = load_vocabulary(*file);
  CHECK(v.pieces.size() == 49152);
  CHECK(v.merges.size() == 48900);
  CHECK(v.bos == 1);
  CHECK(v.eos == 2);
  CHECK_FALSE(v.add_bos);
  CHECK(v.chat_template.find("<|im_start|>") != std::string::npos);
}

TEST_CASE("tokenizer of stories260K: GGUF and llama2.c's file are the same") {
  const auto gguf = test_data("models/stories260K/stories260K.gguf"), bin = test_data("models/stories260K/tok512.bin");
  if (!gguf || !bin) {
    MESSAGE("skipped: models/stories260K is not there");
    return;
  }
  const Tokenizer a = load_tokenizer(*gguf), b = load_tokenizer(*bin);
  REQUIRE(a.size() == 512);
  REQUIRE(b.size() == 512);
  int different = 0;
  for (std::int32_t i = 0; i < 512; ++i) different += a.piece(i) != b.piece(i) || a.type(i) != b.type(i);
  CHECK(different == 0);
  CHECK(a.encode("Once upon a time", {.bos = true}) == Ids{1, 403, 407, 261, 378});
  for (const char* text : {"Once upon a time", "  two  spaces\n", "caf\xc3\xa9"}) {
    CHECK(a.encode(text) == b.encode(text));
    CHECK(b.decode(b.encode(text)) == text);
  }
}
