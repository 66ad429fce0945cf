// SentencePiece's BPE model: merges run over the whole text, spaces included, by the score of the piece that they make.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "tinyllama/error.hpp"
#include "tinyllama/text/bpe_merge.hpp"
#include "tinyllama/text/prefix_matcher.hpp"
#include "tinyllama/text/utf8.hpp"
#include "tinyllama/text/vocabulary.hpp"

namespace tinyllama::detail {

inline constexpr std::string_view space_symbol = "\xe2\x96\x81";  // U+2581, a space inside a piece

/// The value of a byte piece's text, "<0x0A>", or -1.
constexpr int byte_of_piece(std::string_view text) {
  const auto digit = [](char c) { return c >= '0' && c <= '9' ? c - '0' : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1; };
  if (text.size() != 6 || !text.starts_with("<0x") || text[5] != '>' || digit(text[3]) < 0 || digit(text[4]) < 0) return -1;
  return digit(text[3]) * 16 + digit(text[4]);
}

/// How a text stands in the vocabulary: each space is U+2581.
inline std::string with_space_symbols(std::string_view text) {
  std::string s;
  for (const char c : text) c == ' ' ? s.append(space_symbol) : s.append(1, c);
  return s;
}

/// Encodes as sentencepiece 0.1.97 does with the identity normaliser.
class SentencePieceBpe {
 public:
  explicit SentencePieceBpe(const Vocabulary& v) : unk_(v.unk), dummy_prefix_(v.add_space_prefix), byte_fallback_(v.byte_fallback) {
    byte_id_.fill(-1);
    std::unordered_map<std::string_view, std::int32_t> ids;
    std::vector<std::pair<std::string, std::int32_t>> user_defined;
    ids.reserve(v.pieces.size() * 2);
    for (std::size_t i = 0; i < v.pieces.size(); ++i) {
      const Piece& p = v.pieces[i];
      const auto id = static_cast<std::int32_t>(i);
      types_.push_back(p.type);
      length_.push_back(static_cast<std::uint32_t>(p.text.size()));
      if (p.type == PieceType::byte) add_byte(v, p, id);
      if (p.type == PieceType::user_defined) user_defined.emplace_back(p.text, id);
      if (!in_text(p)) continue;
      if (std::isnan(p.score)) throw Error(v.source, "score of piece " + std::to_string(i), "a number", "NaN");
      if (p.text.size() > longest_piece && p.type != PieceType::user_defined)
        throw Error(v.source, "piece " + std::to_string(i), "at most " + std::to_string(longest_piece) + " bytes", std::to_string(p.text.size()));
      if (!ids.emplace(p.text, id).second) throw Error(v.source, "piece " + std::to_string(i), "each text once", "'" + p.text + "' again");
    }
    user_defined_ = PrefixMatcher(std::move(user_defined));
    if (byte_fallback_)
      for (int b = 0; b < 256; ++b)
        if (byte_id_[static_cast<std::size_t>(b)] < 0) throw Error(v.source, "pieces", "one for each byte", "none for byte " + std::to_string(b));
    if (!byte_fallback_ && unk_ < 0) throw Error(v.source, "pieces", "an unknown piece or byte pieces", "neither");
    learn_characters(v, ids);
    learn_merges(v, ids);
  }

  /// Appends the ids of `text` to `out`. A byte that is not UTF-8 counts as U+FFFD.
  void encode(std::string_view text, bool dummy_prefix, std::vector<std::int32_t>& out) const {
    if (text.empty()) return;
    std::string normal;
    normal.reserve(text.size() + text.size() / 4 + 4);
    if (dummy_prefix && dummy_prefix_) normal.append(space_symbol);
    for (std::size_t i = 0; i < text.size();) {
      const CodePoint c = code_point(text, i);
      normal.append(!c.valid ? replacement_utf8 : c.value == ' ' ? space_symbol : text.substr(i, static_cast<std::size_t>(c.size)));
      i += static_cast<std::size_t>(c.size);
    }
    if (normal.size() > static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max()))
      throw Error("encode", "text", "less than 2 GiB", std::to_string(text.size()) + " bytes");

    const std::size_t before = out.size();
    std::vector<Symbol> symbols;
    std::size_t begin = 0;  // of symbols[0]
    for (std::size_t i = 0; i < normal.size();) {
      const auto [id, length] = symbol_at(normal, i);
      // Where no piece has these two characters side by side, no merge crosses: what lies before is merged by itself, while it is in cache
      // (1 MB of prose: 0.1 s, against 1.4 s in one go).
      if (!symbols.empty() && !neighbours_.find(symbols.back().id, id)) {
        merge_and_emit(symbols, std::string_view(normal).substr(begin, i - begin), before, out);
        symbols.clear();
        begin = i;
      }
      const auto index = static_cast<std::int32_t>(symbols.size());
      symbols.push_back({id, length, index - 1, index + 1});
      i += static_cast<std::size_t>(length);
    }
    merge_and_emit(symbols, std::string_view(normal).substr(begin), before, out);
  }

 private:
  static constexpr std::size_t longest_piece = 1024;  // SentencePiece trains up to 16 characters; bounds the work on a hostile file

  static bool in_text(const Piece& p) {
    return p.type == PieceType::normal || p.type == PieceType::user_defined || (p.type == PieceType::unused && !p.text.empty());
  }
  bool is_piece(std::int32_t id) const { return id >= 0 && static_cast<std::size_t>(id) < types_.size(); }
  bool unused(std::int32_t id) const { return is_piece(id) && types_[static_cast<std::size_t>(id)] == PieceType::unused; }

  void add_byte(const Vocabulary& v, const Piece& p, std::int32_t id) {
    const int b = byte_of_piece(p.text);
    if (b < 0) throw Error(v.source, "byte piece " + std::to_string(id), "<0x00> to <0xFF>", "'" + p.text + "'");
    if (byte_id_[static_cast<std::size_t>(b)] >= 0) throw Error(v.source, "byte piece " + std::to_string(id), "each byte once", "'" + p.text + "' again");
    byte_id_[static_cast<std::size_t>(b)] = id;
  }

  std::int32_t character(char32_t c) const {
    if (c < 128) return ascii_[c];
    const auto found = characters_.find(c);
    return found == characters_.end() ? -1 : found->second;
  }

  // A character that is no piece, but part of one, takes part in merges: it gets an id above the pieces'.
  void learn_characters(const Vocabulary& v, std::unordered_map<std::string_view, std::int32_t>& ids) {
    ascii_.fill(-1);
    auto next = static_cast<std::int32_t>(v.pieces.size());
    for (const Piece& p : v.pieces) {
      if (!in_text(p) || p.text.size() > longest_piece) continue;
      for (std::size_t i = 0; i < p.text.size();) {
        const CodePoint c = code_point(p.text, i);
        const auto text = std::string_view(p.text).substr(i, static_cast<std::size_t>(c.size));
        i += static_cast<std::size_t>(c.size);
        if (!c.valid) break;
        const auto [place, fresh] = ids.emplace(text, next);
        if (fresh) ++next, length_.push_back(static_cast<std::uint32_t>(c.size));
        (c.value < 128 ? ascii_[c.value] : characters_[c.value]) = place->second;
      }
    }
  }

  // Every way in which a piece falls into two others is a merge; its rank is that of the score. A list of merges, as Hugging Face
  // converts a model to, differs in the order of pieces of the same score (Llama: the runs of spaces).
  void learn_merges(const Vocabulary& v, const std::unordered_map<std::string_view, std::int32_t>& ids) {
    merges_.reserve(std::max(v.merges.size(), v.pieces.size() * 3));
    std::string joined;
    for (std::size_t rank = 0; rank < v.merges.size(); ++rank) {
      const auto& [left, right] = v.merges[rank];
      joined.assign(left).append(right);
      const auto l = ids.find(left), r = ids.find(right), j = ids.find(joined);
      if (l == ids.end() || r == ids.end() || j == ids.end() || !is_piece(j->second))
        throw Error(v.source, "merge " + std::to_string(rank), "parts and a result that are pieces", "'" + left + "' and '" + right + "'");
      merges_.insert(l->second, r->second, {static_cast<std::uint32_t>(rank), j->second});
    }
    std::vector<float> scores;
    for (const Piece& p : v.pieces)
      if (in_text(p)) scores.push_back(p.score);
    std::sort(scores.begin(), scores.end(), [](float a, float b) { return a > b; });
    scores.erase(std::unique(scores.begin(), scores.end()), scores.end());
    for (std::size_t id = 0; id < v.pieces.size(); ++id) {
      const Piece& p = v.pieces[id];
      if (!in_text(p) || p.text.size() > longest_piece || p.score == -std::numeric_limits<float>::infinity()) continue;
      has_unused_ = has_unused_ || p.type == PieceType::unused;
      std::int32_t previous = -1;
      for (std::size_t i = 0; i < p.text.size();) {
        const CodePoint c = code_point(p.text, i);
        const std::int32_t id_of_character = c.valid ? character(c.value) : -1;
        if (previous >= 0 && id_of_character >= 0) neighbours_.insert(previous, id_of_character, {});
        previous = id_of_character;
        i += static_cast<std::size_t>(c.size);
      }
      const auto rank = std::lower_bound(scores.begin(), scores.end(), p.score, [](float a, float b) { return a > b; }) - scores.begin();
      const std::string_view text = p.text;
      for (std::size_t cut = 1; v.merges.empty() && cut < text.size(); ++cut) {
        if ((static_cast<unsigned char>(text[cut]) & 0xc0) == 0x80) continue;
        const auto left = ids.find(text.substr(0, cut)), right = ids.find(text.substr(cut));
        if (left != ids.end() && right != ids.end())
          merges_.insert(left->second, right->second, {static_cast<std::uint32_t>(rank), static_cast<std::int32_t>(id)});
      }
    }
  }

  // A user-defined piece, or one character; the id is negative where it never joins another.
  std::pair<std::int32_t, std::int32_t> symbol_at(std::string_view text, std::size_t i) const {
    if (const auto m = user_defined_.match(text, i); m.length > 0) return {-2 - m.id, static_cast<std::int32_t>(m.length)};
    const CodePoint c = code_point(text, i);
    return {character(c.value), c.size};
  }

  // Unused pieces take part in merges, and come apart again at the end, into the pair that made them: always the same one, for what happens
  // inside a stretch of text until it is one piece depends on ranks alone.
  using Origins = std::unordered_map<std::int32_t, std::pair<std::int32_t, std::int32_t>>;

  void merge_and_emit(std::vector<Symbol>& symbols, std::string_view text, std::size_t before, std::vector<std::int32_t>& out) const {
    symbols.back().next = -1;
    Origins origins;
    merge_symbols(symbols, merges_, [&](std::int32_t left, std::int32_t right, std::int32_t joined) {
      if (has_unused_ && unused(joined)) origins[joined] = {left, right};
    });
    for (std::int32_t i = 0; i >= 0; i = symbols[static_cast<std::size_t>(i)].next) {
      const Symbol& s = symbols[static_cast<std::size_t>(i)];
      emit(s.id, text.substr(0, static_cast<std::size_t>(s.length)), origins, before, out);
      text.remove_prefix(static_cast<std::size_t>(s.length));
    }
  }

  void emit(std::int32_t id, std::string_view text, const Origins& origins, std::size_t before, std::vector<std::int32_t>& out) const {
    if (id <= -2) return out.push_back(-2 - id);
    if (const auto parts = unused(id) ? origins.find(id) : origins.end(); parts != origins.end()) {
      const auto [left, right] = parts->second;
      const std::size_t cut = length_[static_cast<std::size_t>(left)];
      emit(left, text.substr(0, cut), origins, before, out);
      return emit(right, text.substr(cut), origins, before, out);
    }
    if (is_piece(id)) return out.push_back(id);
    if (byte_fallback_) {
      for (char b : text) out.push_back(byte_id_[static_cast<unsigned char>(b)]);
    } else if (out.size() == before || out.back() != unk_) {  // a run of unknown characters is one unknown piece
      out.push_back(unk_);
    }
  }

  std::int32_t unk_;
  bool dummy_prefix_, byte_fallback_, has_unused_ = false;
  std::array<std::int32_t, 256> byte_id_{};
  std::array<std::int32_t, 128> ascii_{};
  std::unordered_map<char32_t, std::int32_t> characters_;
  std::vector<PieceType> types_;       // by id
  std::vector<std::uint32_t> length_;  // bytes, by id, and by the ids of lone characters
  PrefixMatcher user_defined_;
  MergeTable merges_, neighbours_;  // neighbours_: pairs of characters that stand side by side in some piece
};

}  // namespace tinyllama::detail
