// UTF-8: every character there is, every two-byte sequence, and what becomes of what is not UTF-8.
#include <doctest/doctest.h>

#include "tests/text/vectors.hpp"
#include "tinyllama/text/utf8.hpp"

using namespace tinyllama;
using namespace tinyllama::detail;

namespace {

std::string repaired(std::string_view bytes, Utf8Stream::Replace replace) {
  Utf8Stream s(replace);
  std::string out;
  s.push(bytes, out);
  s.finish(out);
  return out;
}

}  // namespace

TEST_CASE("utf8: every code point goes there and back") {
  int wrong = 0;
  for (char32_t c = 0; c < 0x110000; ++c) {
    if (c >= 0xd800 && c < 0xe000) continue;
    std::string s;
    append_utf8(s, c);
    const CodePoint p = code_point(s, 0);
    wrong += !p.valid || p.value != c || p.size != static_cast<int>(s.size());
  }
  CHECK(wrong == 0);
}

TEST_CASE("utf8: overlong forms, surrogates, lone and missing trail bytes are one invalid byte each") {
  for (const char* bad : {"\x80", "\xbf", "\xc0\xaf", "\xc1\xbf", "\xc3", "\xe0\x9f\xbf", "\xe2\x96", "\xed\xa0\x80", "\xed\xbf\xbf", "\xf0\x8f\xbf\xbf", "\xf4\x90\x80\x80",
                          "\xf5\x80\x80\x80", "\xff", "\xc3\x28", "\xe2\x28\xa1"}) {
    const CodePoint p = code_point(bad, 0);
    CHECK_MESSAGE((!p.valid && p.size == 1 && p.value == replacement_character), bad);
  }
}

TEST_CASE("utf8: two ways to replace") {
  using enum Utf8Stream::Replace;
  const std::string r(replacement_utf8);
  CHECK(repaired("a\xe2\x96" "b", each_byte) == "a" + r + r + "b");
  CHECK(repaired("a\xe2\x96" "b", longest_beginning) == "a" + r + "b");
  CHECK(repaired("\xf0\x9f\x98", each_byte) == r + r + r);
  CHECK(repaired("\xf0\x9f\x98", longest_beginning) == r);
  CHECK(repaired("\xed\xa0\x80", longest_beginning) == r + r + r);  // ED cannot be followed by A0
  CHECK(repaired("\xe2\xe2\x96\x81", longest_beginning) == r + "\xe2\x96\x81");
  CHECK(repaired("\xf0\x9f\x98\x80", each_byte) == "\xf0\x9f\x98\x80");
}

TEST_CASE("utf8: a stream's output is valid after every byte, whatever comes") {
  std::uint32_t state = 1;
  int invalid = 0;
  for (int round = 0; round < 2000; ++round) {
    Utf8Stream s(round % 2 ? Utf8Stream::Replace::each_byte : Utf8Stream::Replace::longest_beginning);
    std::string out;
    for (int i = 0; i < 12; ++i) {
      state = state * 1664525u + 1013904223u;
      constexpr unsigned char likely[] = {0xe2, 0x96, 0x81, 0xf0, 0x9f, 0x98, 0x80, 'a'};
      s.push(state >> 31 ? static_cast<unsigned char>(state >> 16) : likely[(state >> 20) % 8], out);
      invalid += !test::is_utf8(out);
    }
  }
  CHECK(invalid == 0);
}
