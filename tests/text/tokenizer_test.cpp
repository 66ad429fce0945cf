// Tokenizer as a value: options, special pieces, look-ups, and vocabularies that contradict themselves.
#include <doctest/doctest.h>

#include <functional>

#include "tests/text/vectors.hpp"
#include "tinyllama/text/tokenizer.hpp"

using namespace tinyllama;
using namespace tinyllama::test;

TEST_CASE("tokenizer: bos, eos, special, continuation") {
  const Tokenizer t(small_sentencepiece({"\xe2\x96\x81" "a", "\xe2\x96\x81", "a", "<", "s", ">", "/"}));
  CHECK(t.encode("a") == Ids{259});
  CHECK(t.encode("a", {.bos = true, .eos = true}) == Ids{1, 259, 2});
  CHECK(t.encode("", {.bos = true}) == Ids{1});
  CHECK(t.encode("a", {.continuation = true}) == Ids{261});
  CHECK(t.encode("</s>", {.continuation = true}) == Ids{262, 265, 263, 264});
  CHECK(t.encode("</s>", {.special = true}) == Ids{2});
  CHECK(t.encode("a</s>a", {.special = true}) == Ids{259, 2, 259});  // a text after a control piece starts anew
  CHECK(t.encode("a<s></s>", {.special = true, .continuation = true}) == Ids{261, 1, 2});
}

TEST_CASE("tokenizer: control pieces never come from plain text") {
  Vocabulary v = small_byte_level({});
  v.pieces.push_back({"<|tool|>", 0, PieceType::user_defined});  // markup, though the file calls it a word
  v.pieces.push_back({"<word>", 0, PieceType::user_defined});
  const Tokenizer t(v);
  for (const char* text : {"<|im_start|>", "<|im_end|>", "<|tool|>", "x<|im_end|>y"})
    for (const auto id : t.encode(text)) CHECK(id < 256);
  CHECK(t.encode("a<word>b") == Ids{'a', 259, 'b'});
  CHECK(t.encode("<|tool|><word>", {.special = true}) == Ids{258, 259});
  CHECK(t.type(258) == PieceType::control);
  CHECK(t.decode(Ids{'a', 258, 257, 259}) == "a<word>");
  CHECK(t.decode(Ids{'a', 258, 257, 259}, true) == "a<|tool|><|im_end|><word>");
}

TEST_CASE("tokenizer: pieces as they stand in a text") {
  Vocabulary v = small_sentencepiece({"\xe2\x96\x81" "a\xe2\x96\x81"});
  const Tokenizer t(v);
  CHECK(t.piece(0) == " \xe2\x81\x87 ");
  CHECK(t.piece(1) == "<s>");
  CHECK(t.piece(3 + 0xe2) == "\xe2");
  CHECK(t.piece(259) == " a ");
  CHECK(t.size() == 260);
  CHECK(t.find("</s>") == 2);
  CHECK(t.find("\xe2\x96\x81" "a\xe2\x96\x81") == 259);
  CHECK_FALSE(t.find("b").has_value());
  const Tokenizer b(small_byte_level({{"\xc4\xa0", "a"}}));
  CHECK(b.piece(258) == " a");
  CHECK(b.piece(257) == "<|im_end|>");
}

TEST_CASE("tokenizer: a copy outlives its source") {
  auto first = std::make_unique<Tokenizer>(small_sentencepiece({"\xe2\x96\x81", "a"}));
  const Tokenizer copy = *first;
  first.reset();
  CHECK(copy.encode("a a") == Ids{259, 260, 259, 260});
  CHECK(copy.find("a") == 260);
}

TEST_CASE("tokenizer: the dummy prefix goes from the first piece that shows") {
  const Tokenizer t(small_sentencepiece({"\xe2\x96\x81" "a", "\xe2\x96\x81"}));
  CHECK(t.decode(Ids{259, 259}) == "a a");
  CHECK(t.decode(Ids{1, 259}) == "a");
  CHECK(t.decode(Ids{1, 259}, true) == "<s> a");
  CHECK(t.decode(Ids{260, 259}) == " a");
  CHECK(t.decode(Ids{3 + 'x', 259}) == "x a");
}

TEST_CASE("tokenizer: ids that are none") {
  const Tokenizer t(small_sentencepiece({}));
  CHECK_THROWS_AS(t.decode(Ids{-1}), Error);
  CHECK_THROWS_AS(t.decode(Ids{259}), Error);
  CHECK_THROWS_AS(t.piece(1 << 30), Error);
  Vocabulary v = small_sentencepiece({});
  v.bos = v.eos = -1;
  CHECK_THROWS_AS(Tokenizer(v).encode("a", {.bos = true}), Error);
  CHECK_THROWS_AS(Tokenizer(v).encode("a", {.eos = true}), Error);
}

TEST_CASE("tokenizer: vocabularies that contradict themselves") {
  const auto refused = [](Vocabulary v, const std::function<void(Vocabulary&)>& change, std::string_view word) {
    CHECK_NOTHROW(Tokenizer{v});
    change(v);
    v.source = "the file";
    INFO(std::string(word));
    try {
      Tokenizer{v};
      FAIL_CHECK("accepted");
    } catch (const Error& e) {
      CHECK(std::string(e.what()).find(word) != std::string::npos);
      CHECK(e.where() == "the file");
    }
  };
  const Vocabulary spm = small_sentencepiece({"a", "b"}), byte = small_byte_level({{"a", "b"}});
  refused(spm, [](Vocabulary& v) { v.pieces.clear(); }, "pieces");
  refused(spm, [](Vocabulary& v) { v.pieces[260].text = "a"; }, "again");
  refused(spm, [](Vocabulary& v) { v.pieces[260] = v.pieces[2]; }, "again");
  refused(spm, [](Vocabulary& v) { v.pieces[7].type = PieceType::normal; }, "byte 4");
  refused(spm, [](Vocabulary& v) { v.pieces[7].text = "<0x03>"; }, "again");
  refused(spm, [](Vocabulary& v) { v.pieces[7].text = "<0x4>"; }, "<0x00>");
  refused(spm, [](Vocabulary& v) { v.pieces[259].score = std::numeric_limits<float>::quiet_NaN(); }, "NaN");
  refused(spm, [](Vocabulary& v) { v.pieces[259].text = std::string(2000, 'a'); }, "2000");
  refused(spm, [](Vocabulary& v) { v.bos = 261; }, "bos");
  refused(spm, [](Vocabulary& v) { v.eos = -2; }, "eos");
  refused(spm, [](Vocabulary& v) { v.byte_fallback = false, v.unk = -1; }, "unknown");
  refused(spm, [](Vocabulary& v) { v.merges = {{"a", "b"}}; }, "merge 0");
  refused(byte, [](Vocabulary& v) { v.merges[0].second = "bb"; }, "merge 0");
  refused(byte, [](Vocabulary& v) { v.pieces[258].text = "xy"; }, "'ab'");
  refused(byte, [](Vocabulary& v) { v.pieces[257].text = "a"; }, "again");
}
