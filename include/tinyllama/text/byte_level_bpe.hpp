// Byte-level BPE: words are merged from their bytes, by the list of merges. Every byte has a printable character (GPT-2's alphabet).
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "tinyllama/error.hpp"
#include "tinyllama/text/bpe_merge.hpp"
#include "tinyllama/text/pre_tokenize.hpp"
#include "tinyllama/text/utf8.hpp"
#include "tinyllama/text/vocabulary.hpp"

namespace tinyllama::detail {

/// Printable Latin-1 bytes stand for themselves; the other 68 are U+0100, U+0101, ... in order.
inline constexpr std::array<char32_t, 256> byte_alphabet = [] {
  std::array<char32_t, 256> t{};
  char32_t next = 0x100;
  for (char32_t b = 0; b < 256; ++b) t[b] = (b >= 0x21 && b <= 0x7e) || (b >= 0xa1 && b <= 0xac) || b >= 0xae ? b : next++;
  return t;
}();

/// The bytes that a piece in the byte alphabet stands for; nothing where a character is not of the alphabet.
inline std::optional<std::string> bytes_of(std::string_view piece) {
  static constexpr auto byte = [] {
    std::array<std::int16_t, 0x144> t{};
    t.fill(-1);
    for (std::size_t b = 0; b < 256; ++b) t[byte_alphabet[b]] = static_cast<std::int16_t>(b);
    return t;
  }();
  std::string bytes;
  for (std::size_t i = 0; i < piece.size();) {
    const CodePoint c = code_point(piece, i);
    if (!c.valid || c.value >= byte.size() || byte[c.value] < 0) return std::nullopt;
    bytes.push_back(static_cast<char>(static_cast<unsigned char>(byte[c.value])));
    i += static_cast<std::size_t>(c.size);
  }
  return bytes;
}

/// A merge as files write it, "a b": the one space parts the two.
inline std::pair<std::string, std::string> split_merge(const std::string& merge, std::size_t number, std::string_view file) {
  const std::size_t space = merge.find(' ', 1);
  if (space == std::string::npos || space + 1 == merge.size())
    throw Error(file, "merge " + std::to_string(number), "two pieces parted by a space", "'" + merge + "'");
  return {merge.substr(0, space), merge.substr(space + 1)};
}

/// Encodes as Hugging Face's tokenizers does. Takes any bytes: what is not UTF-8 is encoded byte by byte.
class ByteLevelBpe {
 public:
  explicit ByteLevelBpe(const Vocabulary& v)
      : pre_tokenizer_(v.pre_tokenizer), unk_(v.unk), space_prefix_(v.add_space_prefix), ignore_merges_(v.ignore_merges) {
    std::unordered_map<std::string_view, std::int32_t> ids;
    ids.reserve(v.pieces.size());
    for (std::size_t i = 0; i < v.pieces.size(); ++i)
      if (v.pieces[i].type != PieceType::unused && !ids.emplace(v.pieces[i].text, static_cast<std::int32_t>(i)).second)
        throw Error(v.source, "piece " + std::to_string(i), "each text once", "'" + v.pieces[i].text + "' again");
    const auto find = [&](std::string_view text) {
      const auto at = ids.find(text);
      return at == ids.end() ? -1 : at->second;
    };
    const auto control = [&](std::int32_t id) { return v.pieces[static_cast<std::size_t>(id)].type == PieceType::control; };
    for (std::size_t b = 0; b < 256; ++b) {
      std::string c;
      append_utf8(c, byte_alphabet[b]);
      byte_id_[b] = find(c);
      if (byte_id_[b] >= 0 && control(byte_id_[b])) byte_id_[b] = -1;
    }
    if (v.merges.size() >= std::numeric_limits<std::uint32_t>::max()) throw Error(v.source, "merges", "fewer than 2^32", std::to_string(v.merges.size()));
    merges_.reserve(v.merges.size());
    std::string joined;
    for (std::size_t rank = 0; rank < v.merges.size(); ++rank) {
      const auto& [left, right] = v.merges[rank];
      joined.assign(left).append(right);
      for (const std::string& part : {left, right, joined})
        if (find(part) < 0) throw Error(v.source, "merge " + std::to_string(rank), "parts and a result that are pieces", "'" + part + "', which is none");
      if (!control(find(joined))) merges_.insert(find(left), find(right), {static_cast<std::uint32_t>(rank), find(joined)});  // text never makes one
    }
    if (ignore_merges_)
      for (std::size_t i = 0; i < v.pieces.size(); ++i)
        if (v.pieces[i].type == PieceType::normal)
          if (auto bytes = bytes_of(v.pieces[i].text)) whole_.emplace(*std::move(bytes), static_cast<std::int32_t>(i));
  }

  /// Appends the ids of `text` to `out`. A byte without a piece becomes `unk`, or nothing where the vocabulary has none (SmolLM2 lacks 21 bytes).
  void encode(std::string_view text, bool prefix, std::vector<std::int32_t>& out) const {
    std::string prefixed;
    if (prefix && space_prefix_ && !text.empty() && text[0] != ' ') text = prefixed.append(" ").append(text);
    std::vector<Symbol> symbols;
    split_words(pre_tokenizer_, text, [&](std::string_view word) { encode_word(word, symbols, out); });
  }

 private:
  // Finds by string_view without building a string.
  struct Hash {
    using is_transparent = void;
    std::size_t operator()(std::string_view s) const { return std::hash<std::string_view>{}(s); }
  };

  void encode_word(std::string_view word, std::vector<Symbol>& symbols, std::vector<std::int32_t>& out) const {
    if (word.size() > static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max()))
      throw Error("encode", "word", "less than 2 GiB", std::to_string(word.size()) + " bytes");
    if (ignore_merges_)
      if (const auto whole = whole_.find(word); whole != whole_.end()) return out.push_back(whole->second);
    symbols.clear();
    for (const char c : word) {
      const std::int32_t byte = byte_id_[static_cast<unsigned char>(c)], id = byte < 0 ? unk_ : byte;
      if (id < 0) continue;
      const auto index = static_cast<std::int32_t>(symbols.size());
      symbols.push_back({id, 1, index - 1, index + 1});
    }
    if (symbols.empty()) return;
    symbols.back().next = -1;
    merge_symbols(symbols, merges_, [](auto, auto, auto) {});
    for (std::int32_t i = 0; i >= 0; i = symbols[static_cast<std::size_t>(i)].next) out.push_back(symbols[static_cast<std::size_t>(i)].id);
  }

  PreTokenizer pre_tokenizer_;
  std::int32_t unk_;
  bool space_prefix_, ignore_merges_;
  std::array<std::int32_t, 256> byte_id_{};
  MergeTable merges_;
  std::unordered_map<std::string, std::int32_t, Hash, std::equal_to<>> whole_;
};

}  // namespace tinyllama::detail
