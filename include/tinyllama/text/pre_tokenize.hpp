// Cuts text into words before byte-level merges: the regular expressions of GPT-2, SmolLM and Llama 3 as scanners over character classes.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <string_view>

#include "tinyllama/text/unicode_categories.hpp"
#include "tinyllama/text/utf8.hpp"
#include "tinyllama/text/vocabulary.hpp"

namespace tinyllama::detail {

enum class CharClass : std::uint8_t { other, letter, number, space };

inline CharClass char_class(char32_t c) {
  static constexpr auto ascii = [] {
    std::array<CharClass, 128> t{};
    for (std::size_t i = 0; i < 128; ++i)
      t[i] = (i >= 'a' && i <= 'z') || (i >= 'A' && i <= 'Z') ? CharClass::letter
             : i >= '0' && i <= '9'                          ? CharClass::number
             : i == ' ' || (i >= 9 && i <= 13)               ? CharClass::space
                                                             : CharClass::other;
    return t;
  }();
  if (c < 128) return ascii[c];
  const auto among = [c](const auto& ranges) {
    const auto r = std::upper_bound(ranges.begin(), ranges.end(), c, [](char32_t x, const CodeRange& range) { return x < range.first; });
    return r != ranges.begin() && c <= std::prev(r)->last;
  };
  if (among(letter_ranges)) return CharClass::letter;
  if (among(number_ranges)) return CharClass::number;
  const bool space = c == 0x85 || c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f ||
                     c == 0x205f || c == 0x3000;  // the property White_Space
  return space ? CharClass::space : CharClass::other;
}

/// Positions of one text seen as classes; a byte that is not UTF-8 is `other`, by itself.
class Scanner {
 public:
  explicit Scanner(std::string_view text) : text_(text) {}
  bool at_end(std::size_t i) const { return i >= text_.size(); }
  bool is(std::size_t i, CharClass c) const { return !at_end(i) && char_class(code_point(text_, i).value) == c; }
  bool newline(std::size_t i) const { return !at_end(i) && (text_[i] == '\r' || text_[i] == '\n'); }
  std::size_t next(std::size_t i) const { return i + static_cast<std::size_t>(code_point(text_, i).size); }
  std::size_t run(std::size_t i, CharClass c) const {
    while (is(i, c)) i = next(i);
    return i;
  }

  /// Length of 's 't 're 've 'm 'll 'd at i, or 0. Ignoring case, s is also U+017F (long s), as Unicode's case folding has it.
  std::size_t contraction(std::size_t i, bool ignore_case) const {
    if (at_end(i) || text_[i] != '\'') return 0;
    const auto letter = [&](std::size_t k) {
      const char c = i + k < text_.size() ? text_[i + k] : '\0';
      return ignore_case && c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
    };
    const char a = letter(1), b = letter(2);
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return 2;
    if ((a == 'r' && b == 'e') || (a == 'v' && b == 'e') || (a == 'l' && b == 'l')) return 3;
    return ignore_case && text_.substr(i + 1).starts_with("\xc5\xbf") ? 3 : 0;
  }

  /// `\s+(?!\S)|\s+`: white space up to a following word, to which its last character is left.
  std::size_t spaces(std::size_t i) const {
    std::size_t last = i, end = i;
    while (is(end, CharClass::space)) last = end, end = next(end);
    return at_end(end) || last == i ? end : last;
  }

 private:
  std::string_view text_;
};

/// End of the word at i by GPT-2's pattern:
/// 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
inline std::size_t gpt2_word(std::string_view text, std::size_t i) {
  const Scanner s(text);
  if (const std::size_t n = s.contraction(i, false)) return i + n;
  const std::size_t start = text[i] == ' ' ? i + 1 : i;
  for (const CharClass c : {CharClass::letter, CharClass::number, CharClass::other})
    if (s.is(start, c)) return s.run(start, c);
  return s.spaces(i);
}

/// End of the word at i by Llama 3's pattern:
/// (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
inline std::size_t llama3_word(std::string_view text, std::size_t i) {
  const Scanner s(text);
  if (const std::size_t n = s.contraction(i, true)) return i + n;
  if (s.is(i, CharClass::letter)) return s.run(i, CharClass::letter);
  if (s.is(i, CharClass::number)) {
    std::size_t end = s.next(i);
    for (int k = 1; k < 3 && s.is(end, CharClass::number); ++k) end = s.next(end);
    return end;
  }
  if (!s.newline(i) && s.is(s.next(i), CharClass::letter)) return s.run(s.next(i), CharClass::letter);
  if (const std::size_t start = text[i] == ' ' ? i + 1 : i; s.is(start, CharClass::other)) {
    std::size_t end = s.run(start, CharClass::other);
    while (s.newline(end)) ++end;
    return end;
  }
  std::size_t line_end = i;  // after the last line break of the white space
  for (std::size_t k = i; s.is(k, CharClass::space); k = s.next(k))
    if (s.newline(k)) line_end = k + 1;
  return line_end > i ? line_end : s.spaces(i);
}

/// Calls `word(part)` for each part of `text`, in order; together they are the text.
template <class Word>
void split_words(PreTokenizer how, std::string_view text, Word&& word) {
  const auto each = [&](std::string_view part, auto&& end_of_word) {
    for (std::size_t i = 0; i < part.size();) {
      const std::size_t end = end_of_word(part, i);
      word(part.substr(i, end - i));
      i = end;
    }
  };
  switch (how) {
    case PreTokenizer::none:
      if (!text.empty()) word(text);
      return;
    case PreTokenizer::gpt2: return each(text, gpt2_word);
    case PreTokenizer::llama3: return each(text, llama3_word);
    case PreTokenizer::smollm: {  // each number is a word; what lies between is cut by itself, so white space before a number ends a text
      const Scanner s(text);
      for (std::size_t i = 0; i < text.size();) {
        std::size_t end = i;
        while (!s.at_end(end) && !s.is(end, CharClass::number)) end = s.next(end);
        each(text.substr(i, end - i), gpt2_word);
        i = s.at_end(end) ? end : s.next(end);
        if (i > end) word(text.substr(end, i - end));
      }
      return;
    }
  }
}

}  // namespace tinyllama::detail
