// The longest string of a set at a position, against looking at each of them.
#include <doctest/doctest.h>

#include <random>

#include "tinyllama/text/prefix_matcher.hpp"

using tinyllama::detail::PrefixMatcher;

TEST_CASE("prefix_matcher: the longest wins, empty strings are left out") {
  const PrefixMatcher m({{"ab", 1}, {"abcd", 2}, {"", 3}, {"b", 4}});
  CHECK(m.match("abcde", 0).id == 2);
  CHECK(m.match("abce", 0).id == 1);
  CHECK(m.match("abce", 1).id == 4);
  CHECK(m.match("abce", 2).length == 0);
  CHECK(m.match("a", 0).length == 0);
  CHECK(m.match("", 0).length == 0);
  CHECK(m.search("xxabc", 0).first == 2);
  CHECK(m.search("xx", 0).first == 2);
  CHECK(PrefixMatcher().search("abc", 0).first == 3);
}

TEST_CASE("prefix_matcher: as looking at each of them") {
  std::mt19937 random(1);
  int wrong = 0, found = 0;
  const auto word = [&](unsigned most) {
    std::string s;
    for (unsigned n = 1 + random() % most; n > 0; --n) s.push_back(static_cast<char>("ab\xff"[random() % 3]));
    return s;
  };
  for (int round = 0; round < 300; ++round) {
    std::vector<std::pair<std::string, std::int32_t>> entries;
    for (std::int32_t i = 0; i < 12; ++i) entries.emplace_back(word(5), i);
    const PrefixMatcher m(entries);
    const std::string text = word(30);
    for (std::size_t at = 0; at < text.size(); ++at) {
      std::size_t longest = 0;
      for (const auto& e : entries)
        if (text.compare(at, e.first.size(), e.first) == 0) longest = std::max(longest, e.first.size());
      const auto match = m.match(text, at);
      wrong += match.length != longest || (longest > 0 && entries[static_cast<std::size_t>(match.id)].first != text.substr(at, longest));
      found += longest > 0;
    }
  }
  CHECK(wrong == 0);
  CHECK(found > 1000);
}
