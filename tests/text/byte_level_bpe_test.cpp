// Byte-level BPE against Hugging Face's tokenizers: SmolLM2's vocabulary, and a small one of our own, under three pre-tokenizers.
#include <doctest/doctest.h>

#include "tests/text/vectors.hpp"
#include "tinyllama/io/tokenizer_file.hpp"
#include "tinyllama/text/stream_decoder.hpp"

using namespace tinyllama;
using namespace tinyllama::test;

namespace {

struct Way {
  const char* name;
  PreTokenizer how;
};
constexpr Way ways[] = {{"smollm", PreTokenizer::smollm}, {"gpt2", PreTokenizer::gpt2}, {"llama3", PreTokenizer::llama3}};

}  // namespace

TEST_CASE("byte level: SmolLM2's vocabulary, 626 texts in every script, three pre-tokenizers") {
  const auto file = smollm2_gguf();
  if (!file) {
    MESSAGE("skipped: SmolLM2's GGUF file is not there");
    return;
  }
  Vocabulary v = load_vocabulary(*file);
  CHECK(v.pre_tokenizer == PreTokenizer::smollm);
  const auto rows = vectors(fixture("tokenizer/smollm2_vectors.jsonl"), 500);
  for (const Way& way : ways) {
    v.pre_tokenizer = way.how;
    v.ignore_merges = way.how == PreTokenizer::llama3;
    const Tokenizer t(v);
    for (const json& row : rows) {
      INFO(way.name << " " << row["text"].dump());
      CHECK(t.encode(row["text"].get<std::string>()) == row[way.name].get<Ids>());
      if (way.how == PreTokenizer::smollm) CHECK(t.decode(row[way.name].get<Ids>()) == row["decoded"].get<std::string>());
    }
  }
}

TEST_CASE("byte level: a small tokenizer.json, three pre-tokenizers") {
  Vocabulary v = load_vocabulary(fixture("tokenizer/byte_level"));
  CHECK(v.pre_tokenizer == PreTokenizer::smollm);
  const auto rows = vectors(fixture("tokenizer/byte_level/vectors.jsonl"), 200);
  for (const Way& way : ways) {
    v.pre_tokenizer = way.how;
    const Tokenizer t(v);
    for (const json& row : rows) {
      INFO(way.name << " " << row["text"].dump());
      const auto text = row["text"].get<std::string>();
      if (row.contains(way.name)) CHECK(t.encode(text) == row[way.name].get<Ids>());
      if (way.how == PreTokenizer::smollm) CHECK(t.encode(text, {.special = true}) == row["special"].get<Ids>());
      const auto ids = row["ids"].get<Ids>();
      CHECK(t.decode(ids) == row["decoded"].get<std::string>());
      CHECK(t.decode(ids, true) == row["decoded_special"].get<std::string>());
    }
  }
}

TEST_CASE("byte level: any bytes come back") {
  const Tokenizer t(small_byte_level({{"a", "b"}}));
  std::string all;
  for (int b = 0; b < 256; ++b) all.push_back(static_cast<char>(b));
  std::string back;
  for (const auto id : t.encode(all + "ab\xff")) back += t.piece(id);
  CHECK(back == all + "ab\xff");
}

TEST_CASE("byte level: a byte without a piece is unk, or left out") {
  Vocabulary v = small_byte_level({});
  v.pieces['x'].text = "<none>";
  CHECK(Tokenizer(v).encode("axb") == Ids{'a', 'b'});
  v.unk = 256;
  CHECK(Tokenizer(v).encode("axb") == Ids{'a', 256, 'b'});
}

TEST_CASE("byte level: whole words where merges are ignored") {
  Vocabulary v = small_byte_level({{"a", "b"}, {"c", "d"}});
  v.pieces.push_back({"abcd", 0, PieceType::normal});
  CHECK(Tokenizer(v).encode("abcd") == Ids{258, 259});
  v.ignore_merges = true;
  CHECK(Tokenizer(v).encode("abcd") == Ids{260});
  CHECK(Tokenizer(v).encode("xabcd") == Ids{'x', 258, 259});
}

TEST_CASE("byte level: a space put before") {
  Vocabulary v = small_byte_level({});
  v.add_space_prefix = true;
  const Tokenizer t(v);
  CHECK(t.encode("a") == Ids{' ', 'a'});
  CHECK(t.encode(" a") == Ids{' ', 'a'});
  CHECK(t.encode("a", {.continuation = true}) == Ids{'a'});
  CHECK(t.encode("").empty());
}

TEST_CASE("byte level: no merge makes a control piece") {
  Vocabulary v = small_byte_level({{"<", "|"}, {"<|", ">"}});
  CHECK(Tokenizer(v).encode("<|>") == Ids{259});
  v.pieces.back().type = PieceType::control;
  CHECK(Tokenizer(v).encode("<|>") == Ids{258, '>'});
  CHECK(Tokenizer(v).encode("<|>", {.special = true}) == Ids{259});
}
