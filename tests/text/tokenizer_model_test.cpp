// tokenizer.model: what is refused by name, and damaged files.
#include <doctest/doctest.h>

#include "tests/text/vectors.hpp"
#include "tinyllama/io/tokenizer_model.hpp"

using namespace tinyllama;
using namespace tinyllama::test;

namespace {

std::string varint(std::uint64_t v) {
  std::string s;
  for (; v > 127; v >>= 7) s.push_back(static_cast<char>((v & 127) | 128));
  s.push_back(static_cast<char>(v));
  return s;
}
std::string message(int field, const std::string& body) { return varint(static_cast<std::uint64_t>(field) << 3 | 2) + varint(body.size()) + body; }
std::string number(int field, std::uint64_t value) { return varint(static_cast<std::uint64_t>(field) << 3) + varint(value); }

const std::string unk = message(1, message(1, "<unk>") + number(3, 2));
const std::string a = message(1, message(1, "a"));
const std::string trainer = message(2, number(3, 2));                 // BPE
const std::string normalizer = message(3, number(4, 0));              // extra spaces stay

std::string refusal(const std::string& bytes) {
  try {
    read_tokenizer_model(bytes, "m.model");
    return "accepted";
  } catch (const Error& e) {
    CHECK(e.where() == "m.model");
    return e.what();
  }
}

}  // namespace

TEST_CASE("tokenizer.model: the least that is one") {
  const Vocabulary v = read_tokenizer_model(unk + a + trainer + normalizer, "m.model");
  CHECK(v.pieces.size() == 2);
  CHECK(v.pieces[1].text == "a");
  CHECK(v.pieces[1].type == PieceType::normal);
  CHECK(v.unk == 0);
  CHECK(v.bos == -1);
  CHECK_FALSE(v.add_bos);
  CHECK_FALSE(v.byte_fallback);
  CHECK(v.add_space_prefix);
  CHECK(Tokenizer(v).encode("a") == Ids{0, 1});
}

TEST_CASE("tokenizer.model: bos and eos are the trainer's") {
  const std::string control = message(1, message(1, "[B]") + number(3, 3)) + message(1, message(1, "[E]") + number(3, 3));
  const Vocabulary v = read_tokenizer_model(unk + control + message(2, number(3, 2) + message(46, "[B]") + message(47, "[E]") + message(44, "?")) + normalizer, "m");
  CHECK(v.bos == 1);
  CHECK(v.eos == 2);
  CHECK(v.unk_surface == "?");
}

TEST_CASE("tokenizer.model: refused by name") {
  const auto has = [](const std::string& text, const char* word) {
    INFO(text);
    CHECK(text.find(word) != std::string::npos);
  };
  has(refusal(unk + a + normalizer), "unigram");
  has(refusal(unk + a + message(2, number(3, 1)) + normalizer), "unigram");
  has(refusal(unk + a + message(2, number(3, 3)) + normalizer), "word");
  has(refusal(unk + a + trainer), "remove_extra_whitespaces");
  has(refusal(unk + a + trainer + message(3, number(4, 0) + message(2, "map"))), "character map of 3 bytes");
  has(refusal(unk + a + trainer + normalizer + message(5, message(2, "map"))), "denormalizer_spec");
  has(refusal(unk + a + trainer + message(3, number(4, 0) + number(5, 0))), "escape_whitespaces");
  has(refusal(unk + a + message(2, number(3, 2) + number(24, 1)) + normalizer), "treat_whitespace_as_suffix");
  has(refusal(a + trainer + normalizer), "unknown piece");
  has(refusal(unk + unk + trainer + normalizer), "second");
  has(refusal(unk + message(1, "") + trainer + normalizer), "piece 1");
  has(refusal(unk + message(1, message(1, "a") + number(3, 7)) + trainer + normalizer), "type from 1 to 6");
  has(refusal(trainer + normalizer), "not a SentencePiece model");
  has(refusal(std::string(1, '\0')), "field number");
  has(refusal("\x0b"), "wire type");
  has(refusal(std::string(11, '\xff')), "varint");
  has(refusal(message(1, message(2, "abcd"))), "wire type");
  has(refusal(varint(10) + varint(std::uint64_t{1} << 62)), "truncated");
  CHECK(refusal(unk + a + trainer + normalizer) == "accepted");
}

TEST_CASE("tokenizer.model: every byte changed, every length cut to") {
  const std::string good = read_file(fixture("tokenizer/sentencepiece/user.model"));
  int errors = 0, successes = 0;
  const auto attempt = [&](const std::string& bytes) {
    const std::vector<char> exact(bytes.begin(), bytes.end());  // of this very size, for the address sanitizer
    try {
      const Tokenizer t(read_tokenizer_model({exact.data(), exact.size()}, "damaged"));
      t.decode(t.encode("the boat <user> x\xff 42"));
      ++successes;
    } catch (const Error&) {
      ++errors;
    }
  };
  for (std::size_t i = 0; i < good.size(); i += i < 200 || i + 300 > good.size() ? 1 : 7) {
    for (const int flip : {1, 8, 128, 255}) {
      std::string bad = good;
      bad[i] = static_cast<char>(bad[i] ^ flip);
      attempt(bad);
    }
    attempt(good.substr(0, i));
  }
  CHECK(errors > 1000);
  CHECK(successes > 1000);
}
