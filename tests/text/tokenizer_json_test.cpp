// tokenizer.json: both kinds, what is refused by name, and damaged files.
#include <doctest/doctest.h>

#include <functional>

#include "tests/text/vectors.hpp"
#include "tinyllama/io/tokenizer_json.hpp"
#include "tinyllama/io/tokenizer_model.hpp"

using namespace tinyllama;
using namespace tinyllama::test;

namespace {

json parsed(const char* name) { return json::parse(read_file(fixture("tokenizer") / name)); }
Vocabulary read(const json& j) { return read_tokenizer_json(j.dump(), "tokenizer.json"); }

void refused(json j, const std::function<void(json&)>& change, const char* word) {
  CHECK_NOTHROW(Tokenizer(read(j)));
  change(j);
  INFO(std::string(word));
  try {
    Tokenizer(read(j));
    FAIL_CHECK("accepted");
  } catch (const Error& e) {
    INFO(std::string(e.what()));
    CHECK(std::string(e.what()).find(word) != std::string::npos);
    CHECK(e.where() == "tokenizer.json");
  }
}

}  // namespace

TEST_CASE("tokenizer.json: a converted Llama model encodes as its tokenizer.model") {
  const Tokenizer from_json(read(parsed("sentencepiece/llama.json")));
  const Tokenizer from_model(read_tokenizer_model(read_file(fixture("tokenizer/sentencepiece/llama.model")), "llama.model"));
  CHECK(from_json.size() == from_model.size());
  CHECK(from_json.bos() == from_model.bos());
  CHECK(from_json.eos() == from_model.eos());
  CHECK(from_json.vocabulary().add_bos);
  CHECK(from_json.vocabulary().unk == 0);
  for (const json& v : vectors(fixture("tokenizer/sentencepiece/llama.jsonl"), 200)) {
    INFO(v["hex"].get<std::string>());
    CHECK(from_json.encode(from_hex(v["hex"])) == v["encoded"].get<Ids>());
    CHECK(from_json.decode(v["ids"].get<Ids>()) == v["decoded"].get<std::string>());
  }
}

TEST_CASE("tokenizer.json: Metaspace in place of a normaliser; the two ways to write a merge") {
  json j = parsed("sentencepiece/llama.json");
  const Ids expected = Tokenizer(read(j)).encode("the quiet  boat");
  j["normalizer"] = nullptr;
  j["pre_tokenizer"] = {{"type", "Metaspace"}, {"replacement", "\u2581"}, {"prepend_scheme", "first"}, {"split", false}};
  for (json& m : j["model"]["merges"]) m = m.is_string() ? json(m) : json(m[0].get<std::string>() + " " + m[1].get<std::string>());
  CHECK(Tokenizer(read(j)).encode("the quiet  boat") == expected);
  j["pre_tokenizer"]["prepend_scheme"] = "never";
  CHECK(Tokenizer(read(j)).encode("the quiet  boat") != expected);
}

TEST_CASE("tokenizer.json: pre-tokenizers by their patterns") {
  json j = parsed("byte_level/tokenizer.json");
  CHECK(read(j).pre_tokenizer == PreTokenizer::smollm);
  const json byte_level{{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", true}};
  j["pre_tokenizer"] = byte_level;
  CHECK(read(j).pre_tokenizer == PreTokenizer::gpt2);
  CHECK_FALSE(read(j).add_space_prefix);
  j["pre_tokenizer"]["add_prefix_space"] = true;
  CHECK(read(j).add_space_prefix);
  json plain = byte_level;
  plain["use_regex"] = false;
  const json split{{"type", "Split"}, {"pattern", {{"Regex", detail::llama3_pattern}}}, {"behavior", "Isolated"}, {"invert", false}};
  j["pre_tokenizer"] = {{"type", "Sequence"}, {"pretokenizers", {split, plain}}};
  CHECK(read(j).pre_tokenizer == PreTokenizer::llama3);
  j["pre_tokenizer"] = plain;
  CHECK(read(j).pre_tokenizer == PreTokenizer::none);
}

TEST_CASE("tokenizer.json: added tokens, holes, and what stands around a text") {
  json j = parsed("byte_level/tokenizer.json");
  const auto n = static_cast<std::int32_t>(read(j).pieces.size());
  j["added_tokens"].push_back({{"id", n + 2}, {"content", "<far>"}, {"special", true}});
  j["post_processor"] = json::parse(R"({"type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<|im_start|>"}}, {"Sequence": {"id": "A"}}, {"SpecialToken": {"id": "<far>"}}]})");
  const Vocabulary v = read(j);
  CHECK(v.pieces.size() == static_cast<std::size_t>(n) + 3);
  CHECK(v.pieces[static_cast<std::size_t>(n)].type == PieceType::unused);
  CHECK(v.add_bos);
  CHECK(v.add_eos);
  CHECK(v.bos == 1);
  CHECK(v.eos == n + 2);
  CHECK(Tokenizer(v).encode("<far>", {.special = true}) == Ids{n + 2});
  CHECK(Tokenizer(v).decode(Ids{n, n + 1}).empty());
}

TEST_CASE("tokenizer.json: the configuration beside it") {
  Vocabulary v = read(parsed("byte_level/tokenizer.json"));
  CHECK(v.eos == 0);  // <|endoftext|>, for want of better
  apply_tokenizer_config(v, parsed("byte_level/tokenizer_config.json"), "c");
  CHECK(v.bos == 1);
  CHECK(v.eos == 2);
  CHECK(v.pad == 0);
  CHECK(v.chat_template.find("im_start") != std::string::npos);
  apply_tokenizer_config(v, json::parse(R"({"chat_template": [{"name": "rag", "template": "R"}, {"name": "default", "template": "D"}], "add_bos_token": true})"), "c");
  CHECK(v.chat_template == "D");
  CHECK(v.add_bos);
  Vocabulary spm = small_sentencepiece({});
  apply_tokenizer_config(spm, {{"added_tokens_decoder", {{"2", {{"content", "</s>"}}}, {"260", {{"content", "<|im_end|>"}, {"special", true}}}, {"259", {{"content", "[PAD]"}}}}}}, "c");
  REQUIRE(spm.pieces.size() == 261);
  CHECK(spm.pieces[259].text == "[PAD]");
  CHECK(spm.pieces[260].type == PieceType::control);
  CHECK_THROWS_AS(apply_tokenizer_config(spm, {{"added_tokens_decoder", {{"270", {{"content", "x"}}}}}}, "c"), Error);
  CHECK_THROWS_AS(apply_tokenizer_config(spm, {{"added_tokens_decoder", {{"x", json::object()}}}}, "c"), Error);
  CHECK_THROWS_AS(apply_tokenizer_config(spm, {{"add_bos_token", "yes"}}, "c"), Error);
}

TEST_CASE("tokenizer.json: refused by name") {
  const json byte = parsed("byte_level/tokenizer.json"), llama = parsed("sentencepiece/llama.json");
  refused(byte, [](json& j) { j["model"]["type"] = "WordPiece"; }, "WordPiece");
  refused(byte, [](json& j) { j["model"]["type"] = 3; }, "a string");
  refused(byte, [](json& j) { j.erase("model"); }, "model");
  refused(byte, [](json& j) { j["model"]["dropout"] = 0.1; }, "dropout");
  refused(byte, [](json& j) { j["model"]["end_of_word_suffix"] = "</w>"; }, "end_of_word_suffix");
  refused(byte, [](json& j) { j["model"]["unk_token"] = "[UNK]"; }, "[UNK]");
  refused(byte, [](json& j) { j["model"]["merges"][0] = "abc"; }, "merge 0");
  refused(byte, [](json& j) { j["model"]["merges"][0] = json::array({"a"}); }, "merge 0");
  refused(byte, [](json& j) { j["model"]["merges"][0] = json::array({"a", "zzzz"}); }, "zzzz");
  refused(byte, [](json& j) { j["model"]["vocab"]["a"] = 1000000000; }, "1000000000");
  refused(byte, [](json& j) { j["model"]["vocab"]["a"] = -1; }, "-1");
  refused(byte, [](json& j) { j["model"]["vocab"]["a"] = j["model"]["vocab"]["b"]; }, "each id once");
  refused(byte, [](json& j) { j["added_tokens"][0]["content"] = "x"; }, "contradicts");
  refused(byte, [](json& j) { j["added_tokens"].back()["lstrip"] = true; }, "lstrip");
  refused(byte, [](json& j) { j["added_tokens"][0] = 1; }, "added_tokens");
  refused(byte, [](json& j) { j["normalizer"] = {{"type", "NFC"}}; }, "NFC");
  refused(byte, [](json& j) { j["pre_tokenizer"] = nullptr; }, "ByteLevel");
  refused(byte, [](json& j) { j["pre_tokenizer"]["pretokenizers"][0]["type"] = "Whitespace"; }, "Whitespace");
  refused(byte, [](json& j) { j["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = false; }, "Digits");
  refused(byte, [](json& j) { j["pre_tokenizer"]["pretokenizers"][0] = {{"type", "Split"}, {"pattern", {{"Regex", "x"}}}, {"behavior", "Isolated"}}; }, "Split");
  refused(byte, [](json& j) { j["pre_tokenizer"] = 5; }, "pre_tokenizer");
  refused(byte, [](json& j) { j["post_processor"] = {{"type", "BertProcessing"}}; }, "BertProcessing");
  refused(byte, [](json& j) { j["post_processor"] = json::parse(R"({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "[CLS]"}}]})"); }, "post_processor");
  refused(llama, [](json& j) { j["normalizer"] = nullptr; }, "U+2581");
  refused(llama, [](json& j) { j["normalizer"]["normalizers"][0]["prepend"] = "_"; }, "Prepend");
  refused(llama, [](json& j) { j["pre_tokenizer"] = {{"type", "Metaspace"}, {"replacement", "\u2581"}}; }, "Metaspace");
  refused(llama, [](json& j) { j["model"]["vocab"].erase("<0x41>"); }, "byte 65");
  CHECK_THROWS_AS(read_tokenizer_json("[]", "x"), Error);
  CHECK_THROWS_AS(read_tokenizer_json("{", "x"), Error);
  CHECK_THROWS_AS(read_tokenizer_json(std::string(100000, '['), "x"), Error);
}

TEST_CASE("tokenizer.json: damaged files") {
  std::uint32_t state = 1;
  const auto random = [&](std::size_t n) { return (state = state * 1664525u + 1013904223u, (state >> 8) % n); };
  int errors = 0, successes = 0;
  const auto attempt = [&](const std::string& bytes) {
    const std::vector<char> exact(bytes.begin(), bytes.end());
    try {
      const Tokenizer t(read_tokenizer_json({exact.data(), exact.size()}, "damaged"));
      t.decode(t.encode("the <tool> \xff 42", {.special = true}));
      ++successes;
    } catch (const Error&) {
      ++errors;
    }
  };
  for (const char* name : {"byte_level/tokenizer.json", "sentencepiece/llama.json"}) {
    const json good = parsed(name);
    const std::string text = good.dump();
    for (int i = 0; i < 400; ++i) {
      std::string bad = text;
      for (std::size_t n = 1 + random(2); n > 0; --n) bad[random(bad.size())] = "\0\"{}[]:,0a\xff-e"[random(14)];
      attempt(bad);
      if (i % 8 == 0) attempt(text.substr(0, random(text.size())));
    }
    // Any value anywhere replaced by one of another type.
    const json flat = good.flatten();
    const json others[] = {nullptr, true, -1, 1e300, "", "x", json::array(), json::object(), std::uint64_t{1} << 63};
    for (const auto& [path, value] : flat.items()) {
      if (path.size() > 12 && (path.starts_with("/model/vocab") || path.starts_with("/model/merges")) && random(40) != 0) continue;
      json::json_pointer at(path);
      for (int up = 0; up < 3 && !at.empty(); ++up, at.pop_back()) {
        json bad = good;
        bad[at] = others[random(std::size(others))];
        attempt(bad.dump());
      }
    }
  }
  CHECK(errors > 500);
  CHECK(successes > 50);
}
