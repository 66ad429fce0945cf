// Words: each alternative of the three patterns, and that the words of any bytes are those bytes.
#include <doctest/doctest.h>

#include <random>

#include "tests/text/vectors.hpp"
#include "tinyllama/text/pre_tokenize.hpp"

using namespace tinyllama;

namespace {

std::vector<std::string> words(PreTokenizer how, std::string_view text) {
  std::vector<std::string> out;
  detail::split_words(how, text, [&](std::string_view w) { out.emplace_back(w); });
  return out;
}
using Words = std::vector<std::string>;

}  // namespace

TEST_CASE("pre_tokenize: GPT-2") {
  using enum PreTokenizer;
  CHECK(words(gpt2, "it's IT'S we'll") == Words{"it", "'s", " IT", "'", "S", " we", "'ll"});
  CHECK(words(gpt2, "a  b") == Words{"a", " ", " b"});
  CHECK(words(gpt2, "a   ") == Words{"a", "   "});
  CHECK(words(gpt2, "a\n\nb") == Words{"a", "\n", "\n", "b"});
  CHECK(words(gpt2, "x 123, y") == Words{"x", " 123", ",", " y"});
  CHECK(words(gpt2, "caf\xc3\xa9!? \xe4\xb8\xad\xe6\x96\x87") == Words{"caf\xc3\xa9", "!?", " \xe4\xb8\xad\xe6\x96\x87"});
  CHECK(words(gpt2, "e\xcc\x81") == Words{"e", "\xcc\x81"});  // a combining accent is no letter
  CHECK(words(gpt2, "").empty());
}

TEST_CASE("pre_tokenize: SmolLM parts every number, also from the white space before it") {
  using enum PreTokenizer;
  CHECK(words(smollm, "x 12") == Words{"x", " ", "1", "2"});
  CHECK(words(smollm, "a  1b") == Words{"a", "  ", "1", "b"});
  CHECK(words(smollm, "\xc2\xb2\xe2\x85\xa7") == Words{"\xc2\xb2", "\xe2\x85\xa7"});  // superscript two, Roman eight
}

TEST_CASE("pre_tokenize: Llama 3") {
  using enum PreTokenizer;
  CHECK(words(llama3, "IT'S 12345") == Words{"IT", "'S", " ", "123", "45"});
  CHECK(words(llama3, "(a) -b") == Words{"(a", ")", " -", "b"});
  CHECK(words(llama3, "a;\n\n b") == Words{"a", ";\n\n", " b"});
  CHECK(words(llama3, "a \n \n  b") == Words{"a", " \n \n", " ", " b"});
  CHECK(words(llama3, "\tx\r\ny") == Words{"\tx", "\r\n", "y"});
  CHECK(words(llama3, "'\xc5\xbf") == Words{"'\xc5\xbf"});  // U+017F is an s for Unicode's case folding
}

TEST_CASE("pre_tokenize: nothing is lost, whatever the bytes") {
  std::mt19937 random(1);
  int wrong = 0;
  for (int round = 0; round < 3000; ++round) {
    std::string text;
    for (unsigned i = random() % 20; i > 0; --i) {
      constexpr std::string_view parts[] = {" ", "\n", "a", "1", "'s", "\xe2\x80\x83", "\xff", "\xe2", "!", "\xc3\xa9", "\r"};
      text += parts[random() % std::size(parts)];
    }
    for (const PreTokenizer how : {PreTokenizer::none, PreTokenizer::gpt2, PreTokenizer::smollm, PreTokenizer::llama3}) {
      std::string all;
      for (const std::string& w : words(how, text)) {
        wrong += w.empty();
        all += w;
      }
      wrong += all != text;
    }
  }
  CHECK(wrong == 0);
}

TEST_CASE("pre_tokenize: the tables are sorted, disjoint ranges") {
  const auto sorted = [](const auto& ranges) {
    for (std::size_t i = 0; i < ranges.size(); ++i)
      if (ranges[i].first > ranges[i].last || (i > 0 && ranges[i].first <= ranges[i - 1].last)) return false;
    return true;
  };
  CHECK(sorted(detail::letter_ranges));
  CHECK(sorted(detail::number_ranges));
  int letters = 0, numbers = 0, spaces = 0;
  for (char32_t c = 0; c < 0x110000; ++c) {
    const auto k = detail::char_class(c);
    letters += k == detail::CharClass::letter, numbers += k == detail::CharClass::number, spaces += k == detail::CharClass::space;
  }
  CHECK(letters == 141028);  // as the reference's \p{L}, \p{N} and \s count them, Unicode 16
  CHECK(numbers == 1911);
  CHECK(spaces == 25);
  for (char32_t c = 0; c < 128; ++c) {  // the ASCII table repeats the beginning of the others
    const bool letter = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z');
    CHECK((detail::char_class(c) == detail::CharClass::letter) == letter);
  }
}
