// UTF-8 as the tokenizers see it: one strict decoder, and a stream that holds back half characters and replaces bad ones.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace tinyllama {

inline constexpr char32_t replacement_character = 0xfffd;
inline constexpr std::string_view replacement_utf8 = "\xef\xbf\xbd";

namespace detail {

/// Length of the character that `lead` starts, 0 where none does (Unicode 16, table 3-7: no overlong forms, nothing above U+10FFFF).
constexpr int utf8_length(unsigned char lead) {
  return lead < 0x80 ? 1 : lead < 0xc2 ? 0 : lead < 0xe0 ? 2 : lead < 0xf0 ? 3 : lead < 0xf5 ? 4 : 0;
}

/// Whether `trail` may be byte number `i` (1..3) of a character that starts with `lead`.
constexpr bool utf8_trail(unsigned char lead, int i, unsigned char trail) {
  const unsigned low = i > 1 ? 0x80 : lead == 0xe0 ? 0xa0 : lead == 0xf0 ? 0x90 : 0x80;
  const unsigned high = i > 1 ? 0xbf : lead == 0xed ? 0x9f : lead == 0xf4 ? 0x8f : 0xbf;  // U+D800..DFFF are no characters
  return trail >= low && trail <= high;
}

/// One character of a text; a byte that starts none is `valid == false`, size 1.
struct CodePoint {
  char32_t value;
  int size;
  bool valid;
};

/// The character at `s[i]`; i < s.size().
constexpr CodePoint code_point(std::string_view s, std::size_t i) {
  const auto byte = [&](std::size_t k) { return static_cast<unsigned char>(s[k]); };
  const unsigned char lead = byte(i);
  if (lead < 0x80) return {lead, 1, true};
  const int n = utf8_length(lead);
  if (n == 0 || s.size() - i < static_cast<std::size_t>(n)) return {replacement_character, 1, false};
  char32_t c = lead & (0x7fu >> n);
  for (int k = 1; k < n; ++k) {
    const unsigned char trail = byte(i + static_cast<std::size_t>(k));
    if (!utf8_trail(lead, k, trail)) return {replacement_character, 1, false};
    c = (c << 6) | (trail & 0x3fu);
  }
  return {c, n, true};
}

constexpr void append_utf8(std::string& s, char32_t c) {
  const auto put = [&](char32_t b) { s.push_back(static_cast<char>(static_cast<unsigned char>(b))); };
  if (c < 0x80) return put(c);
  if (c < 0x800) return put(0xc0 | (c >> 6)), put(0x80 | (c & 0x3f));
  if (c < 0x10000) return put(0xe0 | (c >> 12)), put(0x80 | ((c >> 6) & 0x3f)), put(0x80 | (c & 0x3f));
  put(0xf0 | (c >> 18)), put(0x80 | ((c >> 12) & 0x3f)), put(0x80 | ((c >> 6) & 0x3f)), put(0x80 | (c & 0x3f));
}

/// Bytes come in, whole characters go out. What cannot become a character is U+FFFD: one for each byte (SentencePiece), or one for each
/// longest beginning of a character (Hugging Face's byte-level decoder, by Rust's from_utf8_lossy).
class Utf8Stream {
 public:
  enum class Replace : std::uint8_t { each_byte, longest_beginning };
  explicit Utf8Stream(Replace replace) : replace_(replace) {}

  void push(std::string_view bytes, std::string& out) {
    for (char c : bytes) push(static_cast<unsigned char>(c), out);
  }

  void push(unsigned char byte, std::string& out) {
    if (size_ > 0 && !utf8_trail(pending_[0], size_, byte)) finish(out);
    if (size_ == 0 && utf8_length(byte) == 0) {
      out.append(replacement_utf8);
      return;
    }
    pending_[static_cast<std::size_t>(size_++)] = byte;
    if (size_ < utf8_length(pending_[0])) return;
    out.append(reinterpret_cast<const char*>(pending_.data()), static_cast<std::size_t>(size_));
    size_ = 0;
  }

  /// No byte follows: what is held back is replaced.
  void finish(std::string& out) {
    for (int i = 0; i < (replace_ == Replace::each_byte ? size_ : size_ > 0 ? 1 : 0); ++i) out.append(replacement_utf8);
    size_ = 0;
  }

 private:
  std::array<unsigned char, 4> pending_{};
  int size_ = 0;
  Replace replace_;
};

}  // namespace detail
}  // namespace tinyllama
