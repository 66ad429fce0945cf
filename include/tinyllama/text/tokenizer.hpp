// Tokenizer: text to ids and back, a value built from a Vocabulary of either kind.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include "tinyllama/error.hpp"
#include "tinyllama/text/byte_level_bpe.hpp"
#include "tinyllama/text/decode_step.hpp"
#include "tinyllama/text/prefix_matcher.hpp"
#include "tinyllama/text/sentencepiece_bpe.hpp"
#include "tinyllama/text/vocabulary.hpp"

namespace tinyllama {

struct EncodeOptions {
  bool bos = false, eos = false;  // put the vocabulary's piece before, after
  bool special = false;           // control pieces written in the text are recognised; by default they are text like any other
  bool continuation = false;      // the text follows other text: no dummy space before it
};

/// Immutable; copies share their tables, and any number of threads may use one.
class Tokenizer {
 public:
  using EncodeOptions = tinyllama::EncodeOptions;

  /// Throws Error where the vocabulary contradicts itself: a text that two pieces have, merges of unknown pieces, a byte without a piece
  /// (SentencePiece), ids out of range. A user-defined piece of the form <|...|> is markup, and becomes a control piece.
  explicit Tokenizer(Vocabulary vocabulary) : state_(std::make_shared<const State>(std::move(vocabulary))) {}

  /// The ids of `text`. User-defined pieces are found in any text, as the reference tokenizers do; control pieces only if asked.
  /// Bytes that are not UTF-8: SentencePiece takes each for U+FFFD, byte-level BPE encodes them as they are.
  std::vector<std::int32_t> encode(std::string_view text, EncodeOptions options = {}) const {
    std::vector<std::int32_t> ids;
    if (options.bos) ids.push_back(required(bos(), "bos"));
    const detail::PrefixMatcher& found_in_text = options.special ? state_->special : state_->user_defined;
    bool prefix = !options.continuation;
    for (std::size_t i = 0; i < text.size();) {
      const auto found = found_in_text.search(text, i);
      const std::size_t end = found.first;
      const detail::PrefixMatcher::Match match = found.second;
      std::visit([&](const auto& model) { model.encode(text.substr(i, end - i), prefix, ids); }, state_->model);
      if (match.length > 0) ids.push_back(match.id);
      i = end + match.length;
      prefix = true;  // a text after a control piece starts anew
    }
    if (options.eos) ids.push_back(required(eos(), "eos"));
    return ids;
  }

  /// The text of `ids`, always UTF-8: what is not becomes U+FFFD in the reference's way. `special`: control pieces are shown.
  /// Throws Error for an id that is none.
  std::string decode(std::span<const std::int32_t> ids, bool special = false) const {
    detail::DecodeStep step(vocabulary(), special);
    std::string text;
    for (const std::int32_t id : ids) step.push(type(id), piece(id), text);
    step.finish(text);
    return text;
  }

  /// The bytes of one piece as they stand inside a text, perhaps a part of a character; of a control piece, how it is written.
  std::string_view piece(std::int32_t id) const {
    const std::size_t i = checked(id);
    return std::string_view(state_->bytes).substr(state_->offset[i], state_->offset[i + 1] - state_->offset[i]);
  }
  PieceType type(std::int32_t id) const { return vocabulary().pieces[checked(id)].type; }

  int size() const { return static_cast<int>(vocabulary().pieces.size()); }
  const Vocabulary& vocabulary() const { return state_->vocabulary; }
  std::int32_t bos() const { return vocabulary().bos; }  // -1: none
  std::int32_t eos() const { return vocabulary().eos; }  // -1: none

  /// The id of the piece that the vocabulary spells so: "</s>", "<|im_end|>". Control pieces come before others of the same text.
  std::optional<std::int32_t> find(std::string_view text) const {
    const auto at = state_->by_text.find(text);
    return at == state_->by_text.end() ? std::nullopt : std::optional(at->second);
  }

 private:
  struct State {
    explicit State(Vocabulary v) : vocabulary(normalised(std::move(v))), model(make_model(vocabulary)) {
      const bool byte_level = vocabulary.kind == Vocabulary::Kind::byte_level_bpe;
      std::vector<std::pair<std::string, std::int32_t>> user, control;
      offset.reserve(vocabulary.pieces.size() + 1);
      offset.push_back(0);
      for (std::size_t i = 0; i < vocabulary.pieces.size(); ++i) {
        const Piece& p = vocabulary.pieces[i];
        const auto id = static_cast<std::int32_t>(i);
        append_bytes(p, byte_level);
        offset.push_back(bytes.size());
        if (p.type == PieceType::user_defined && byte_level) user.emplace_back(p.text, id);  // SentencePiece finds them after normalising
        if (p.type == PieceType::control || p.type == PieceType::unknown) {
          control.emplace_back(p.text, id);
          if (!p.text.empty() && !by_text.emplace(p.text, id).second)
            throw Error(vocabulary.source, "piece " + std::to_string(i), "each text once", "'" + p.text + "' again");
        }
      }
      for (std::size_t i = 0; i < vocabulary.pieces.size(); ++i) by_text.emplace(vocabulary.pieces[i].text, static_cast<std::int32_t>(i));
      control.insert(control.end(), user.begin(), user.end());
      user_defined = detail::PrefixMatcher(std::move(user));
      special = detail::PrefixMatcher(std::move(control));
    }

    static Vocabulary normalised(Vocabulary v) {
      if (v.pieces.empty() || v.pieces.size() > static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max() / 4))
        throw Error(v.source, "pieces", "1 to 2^29", std::to_string(v.pieces.size()));
      const auto in_range = [&](std::string_view name, std::int32_t id) {
        if (id < -1 || id >= static_cast<std::int32_t>(v.pieces.size()))
          throw Error(v.source, name, "an id below " + std::to_string(v.pieces.size()) + ", or -1", std::to_string(id));
      };
      in_range("bos", v.bos), in_range("eos", v.eos), in_range("unk", v.unk), in_range("pad", v.pad);
      for (Piece& p : v.pieces)
        if (p.type == PieceType::user_defined && p.text.size() > 4 && p.text.starts_with("<|") && p.text.ends_with("|>")) p.type = PieceType::control;
      return v;
    }

    using Model = std::variant<detail::SentencePieceBpe, detail::ByteLevelBpe>;
    static Model make_model(const Vocabulary& v) {
      if (v.kind == Vocabulary::Kind::byte_level_bpe) return detail::ByteLevelBpe(v);
      return detail::SentencePieceBpe(v);
    }

    void append_bytes(const Piece& p, bool byte_level) {
      const bool plain = p.type == PieceType::normal || p.type == PieceType::unused || (p.type == PieceType::user_defined && !byte_level);
      if (byte_level) {
        const auto in_alphabet = plain ? detail::bytes_of(p.text) : std::nullopt;
        bytes.append(in_alphabet ? *in_alphabet : p.text);
      } else if (p.type == PieceType::byte) {
        bytes.push_back(static_cast<char>(static_cast<unsigned char>(detail::byte_of_piece(p.text))));
      } else if (p.type == PieceType::unknown) {
        bytes.append(vocabulary.unk_surface);
      } else if (plain) {
        for (std::size_t i = 0; i < p.text.size();) {
          const bool space = std::string_view(p.text).substr(i).starts_with(detail::space_symbol);
          bytes.push_back(space ? ' ' : p.text[i]);
          i += space ? detail::space_symbol.size() : 1;
        }
      } else {
        bytes.append(p.text);
      }
    }

    Vocabulary vocabulary;
    Model model;
    std::string bytes;                // of all pieces, one after another
    std::vector<std::size_t> offset;  // [size + 1]
    std::unordered_map<std::string_view, std::int32_t> by_text;
    detail::PrefixMatcher user_defined, special;  // byte-level: user_defined is found in any text
  };

  std::size_t checked(std::int32_t id) const {
    if (id < 0 || id >= size()) throw Error(vocabulary().source, "id", "0 to " + std::to_string(size() - 1), std::to_string(id));
    return static_cast<std::size_t>(id);
  }
  std::int32_t required(std::int32_t id, std::string_view name) const {
    if (id < 0) throw Error(vocabulary().source, name, "a piece of that role", "none in this vocabulary");
    return id;
  }
  std::shared_ptr<const State> state_;
};

}  // namespace tinyllama
