// StreamDecoder: ids in, text out as soon as it is whole characters.
#pragma once

#include <cstdint>
#include <string>

#include "tinyllama/text/decode_step.hpp"
#include "tinyllama/text/tokenizer.hpp"

namespace tinyllama {

/// All that push and finish return, one after another, is Tokenizer::decode of all the ids; each part is UTF-8 by itself.
class StreamDecoder {
 public:
  /// `special`: control pieces are shown.
  explicit StreamDecoder(const Tokenizer& tokenizer, bool special = false)
      : tokenizer_(tokenizer), special_(special), step_(tokenizer.vocabulary(), special) {}

  /// The text that has become whole with this id, perhaps none. Throws Error for an id that is none.
  std::string push(std::int32_t id) {
    std::string text;
    step_.push(tokenizer_.type(id), tokenizer_.piece(id), text);
    return text;
  }

  /// What was held back: a character that never became whole is U+FFFD. The decoder then starts anew.
  std::string finish() {
    std::string text;
    step_.finish(text);
    step_ = detail::DecodeStep(tokenizer_.vocabulary(), special_);
    return text;
  }

 private:
  Tokenizer tokenizer_;
  bool special_;
  detail::DecodeStep step_;
};

}  // namespace tinyllama
