// SentencePiece BPE against the reference package: the Llama-2 model, and small models with each option.
#include <doctest/doctest.h>

#include "tests/text/vectors.hpp"
#include "tinyllama/io/tokenizer_model.hpp"
#include "tinyllama/text/stream_decoder.hpp"

using namespace tinyllama;
using namespace tinyllama::test;

namespace {

Tokenizer load(const std::filesystem::path& path) { return Tokenizer(read_tokenizer_model(read_file(path), path.string())); }

std::string streamed(const Tokenizer& t, const Ids& ids) {
  StreamDecoder decoder(t);
  std::string text;
  for (const auto id : ids) text += decoder.push(id);
  return text + decoder.finish();
}

}  // namespace

TEST_CASE("sentencepiece: Llama 2, 250 texts and 60 sequences of ids") {
  const auto model = test_data("tokenizer/tokenizer.model");
  if (!model) {
    MESSAGE("skipped: tokenizer/tokenizer.model (Llama 2) is not there");
    return;
  }
  const Tokenizer t = load(*model);
  CHECK(t.size() == 32000);
  CHECK(t.bos() == 1);
  CHECK(t.eos() == 2);
  CHECK(t.vocabulary().add_bos);
  for (const json& v : vectors(fixture("tokenizer/llama2_spm_vectors_visible.jsonl"), 250)) {
    const auto text = v["text"].get<std::string>();
    const auto ids = v["ids"].get<Ids>();
    INFO(v["id"].get<std::string>());
    CHECK(t.encode(text) == ids);
    CHECK(t.decode(ids) == v["decoded"].get<std::string>());
    CHECK(streamed(t, ids) == v["decoded"].get<std::string>());
  }
  for (const json& v : vectors(fixture("tokenizer/llama2_spm_decode_only.jsonl"), 60)) {
    INFO(v["id"].get<std::string>());
    CHECK(t.decode(v["ids"].get<Ids>()) == v["decoded"].get<std::string>());
    CHECK(streamed(t, v["ids"].get<Ids>()) == v["decoded"].get<std::string>());
  }
}

// user: user-defined, control and unused pieces; no_bytes: unknown pieces instead of bytes; no_prefix: no dummy space.
// Each has texts that are no UTF-8.
TEST_CASE("sentencepiece: small models") {
  for (const std::string name : {"llama", "user", "no_bytes", "no_prefix"}) {
    const Tokenizer t = load(fixture("tokenizer/sentencepiece/" + name + ".model"));
    for (const json& v : vectors(fixture("tokenizer/sentencepiece/" + name + ".jsonl"), 200)) {
      INFO(name << " " << v["hex"].get<std::string>());
      CHECK(t.encode(from_hex(v["hex"])) == v["encoded"].get<Ids>());
      CHECK(t.decode(v["ids"].get<Ids>()) == v["decoded"].get<std::string>());
      CHECK(streamed(t, v["ids"].get<Ids>()) == v["decoded"].get<std::string>());
    }
  }
}

TEST_CASE("sentencepiece: the piece of highest score first, the leftmost among equals") {
  Vocabulary v = small_sentencepiece({"ab", "bc", "abc", "a", "b", "c"});
  v.add_space_prefix = false;
  CHECK(Tokenizer(v).encode("abc") == Ids{261});       // ab, then abc
  CHECK(Tokenizer(v).encode("bcabc") == Ids{260, 261});
  v.pieces[260].score = 5;                             // bc before ab: a + bc = abc all the same
  CHECK(Tokenizer(v).encode("abc") == Ids{261});
  v.pieces[261].score = -std::numeric_limits<float>::infinity();  // no merge makes abc
  CHECK(Tokenizer(v).encode("abc") == Ids{262, 260});
  CHECK(Tokenizer(v).encode("\xc3\xa9") == Ids{3 + 0xc3, 3 + 0xa9});
}

TEST_CASE("sentencepiece: a long text in one go") {
  Vocabulary v = small_sentencepiece({"aa", "aaaa", "\xe2\x96\x81", "a"});
  const Tokenizer t(v);
  const Ids ids = t.encode(std::string(1'000'000, 'a'));
  CHECK(ids.size() == 1 + 250'000);  // one word, so one queue
  CHECK(t.decode(ids) == std::string(1'000'000, 'a'));
}
