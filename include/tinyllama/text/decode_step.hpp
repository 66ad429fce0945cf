// Decoding, one piece at a time: what SentencePiece (or Hugging Face's byte-level decoder) makes of a sequence, as it comes.
#pragma once

#include <string>
#include <string_view>

#include "tinyllama/text/utf8.hpp"
#include "tinyllama/text/vocabulary.hpp"

namespace tinyllama::detail {

class DecodeStep {
 public:
  /// `special`: control pieces appear as they are written, instead of not at all.
  DecodeStep(const Vocabulary& v, bool special)
      : utf8_(v.kind == Vocabulary::Kind::byte_level_bpe ? Utf8Stream::Replace::longest_beginning : Utf8Stream::Replace::each_byte),
        byte_level_(v.kind == Vocabulary::Kind::byte_level_bpe), special_(special), strip_(!byte_level_ && v.add_space_prefix) {}

  /// `bytes` as Tokenizer::piece gives them. Appends what has become certain.
  void push(PieceType type, std::string_view bytes, std::string& out) {
    const bool hidden = type == PieceType::control && !special_;
    if (byte_level_) {  // all bytes form one text
      if (!hidden) utf8_.push(bytes, out);
      return;
    }
    const std::size_t before = out.size();
    if (type == PieceType::byte) {  // neighbouring byte pieces form a text of their own
      utf8_.push(bytes, out);
    } else {
      utf8_.finish(out);
      started_ = started_ || out.size() > before;
      // The dummy prefix goes from the first piece that shows, once. The order of these lines is SentencePiece's.
      if (stripped_ || started_) strip_ = false;
      stripped_ = false;
      if (!hidden) {
        if (strip_ && type != PieceType::control && type != PieceType::unknown && bytes.starts_with(' ')) bytes.remove_prefix(1), stripped_ = true;
        utf8_.push(bytes, out);
        utf8_.finish(out);
      }
    }
    started_ = started_ || out.size() > before;
  }

  void finish(std::string& out) { utf8_.finish(out); }

 private:
  Utf8Stream utf8_;
  bool byte_level_, special_;
  bool strip_;             // a leading space would still be the dummy prefix
  bool stripped_ = false;  // the last piece lost one
  bool started_ = false;   // there is text
};

}  // namespace tinyllama::detail
