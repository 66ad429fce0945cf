// Streaming: the parts are the whole, each is UTF-8, and nothing is held back that is complete.
#include <doctest/doctest.h>

#include <random>

#include "tests/text/vectors.hpp"
#include "tinyllama/text/stream_decoder.hpp"

using namespace tinyllama;
using namespace tinyllama::test;

TEST_CASE("stream_decoder: the parts are the whole, for any ids") {
  std::mt19937 random(1);
  Vocabulary user = small_sentencepiece({"\xe2\x96\x81" "a", "\xe2\x96\x81", "a", "\xc3\xa9"});
  user.pieces.push_back({"\xe2\x96\x81x", 0, PieceType::user_defined});
  user.pieces.push_back({"\xff", 0, PieceType::unused});  // a file may hold what is not UTF-8
  for (const Tokenizer& t : {Tokenizer(user), Tokenizer(small_byte_level({{"a", "b"}, {"\xc3\xa2", "\xc4\xb8"}}))}) {
    int wrong = 0, invalid = 0;
    for (int round = 0; round < 4000; ++round) {
      Ids ids;
      for (unsigned n = random() % 10; n > 0; --n) {
        const auto likely = t.find("<0xE2>") ? Ids{3 + 0xe2, 3 + 0x96, 3 + 0x81, 3 + 0xf0, 3 + 0x9f, 0, 1, 260} : Ids{0xe2, 0x96, 0x81, 0xf0, 0x9f, 0xed, 256, 257};
        ids.push_back(random() % 2 ? likely[random() % likely.size()] : static_cast<std::int32_t>(random() % static_cast<unsigned>(t.size())));
      }
      for (const bool special : {false, true}) {
        StreamDecoder decoder(t, special);
        std::string text;
        for (int again = 0; again < 2; ++again) {  // finish() starts anew
          text.clear();
          for (const auto id : ids) {
            const std::string part = decoder.push(id);
            invalid += !is_utf8(part);
            text += part;
          }
          text += decoder.finish();
        }
        wrong += text != t.decode(ids, special);
        invalid += !is_utf8(text);
      }
    }
    CHECK(wrong == 0);
    CHECK(invalid == 0);
  }
}

TEST_CASE("stream_decoder: text comes as soon as it is whole") {
  const Tokenizer t(small_byte_level({}));
  StreamDecoder d(t);
  CHECK(d.push('a') == "a");
  CHECK(d.push(0xf0) == "");
  CHECK(d.push(0x9f) == "");
  CHECK(d.push(0x98) == "");
  CHECK(d.push(0x80) == "\xf0\x9f\x98\x80");
  CHECK(d.push(0xe2) == "");
  CHECK(d.push('b') == "\xef\xbf\xbd" "b");  // what was begun cannot become a character any more
  CHECK(d.push(0xe2) == "");
  CHECK(d.finish() == "\xef\xbf\xbd");
  CHECK(d.finish() == "");
  CHECK_THROWS_AS(d.push(-1), Error);
}

TEST_CASE("stream_decoder: SentencePiece's byte pieces, one sign for each bad byte") {
  const Tokenizer t(small_sentencepiece({"\xe2\x96\x81" "a"}));
  StreamDecoder d(t);
  CHECK(d.push(259) == "a");
  CHECK(d.push(3 + 0xe2) == "");
  CHECK(d.push(3 + 0x96) == "");
  CHECK(d.push(259) == "\xef\xbf\xbd\xef\xbf\xbd a");
}
