// llama2.c's tokenizer.bin (tok512.bin): pieces with scores, spaces as spaces, read into a Vocabulary.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>

#include "tinyllama/error.hpp"
#include "tinyllama/text/sentencepiece_bpe.hpp"
#include "tinyllama/text/vocabulary.hpp"

namespace tinyllama {

/// int32 longest text; then for each piece, to the end of the file: float score, int32 length, text. Ids 0, 1, 2 are <unk>, <s>, </s>.
inline Vocabulary read_tokenizer_llama2c(std::string_view bytes, std::string_view name) {
  Vocabulary v;
  v.source = name;
  v.byte_fallback = false;
  std::size_t at = 0;
  const auto take = [&](std::size_t n) {
    if (n > bytes.size() - at)
      throw Error(name, "piece " + std::to_string(v.pieces.size()), std::to_string(n) + " bytes",
                  std::to_string(bytes.size() - at) + " (truncated or damaged)");
    return bytes.substr(std::exchange(at, at + n), n);
  };
  const auto value = [&]<class T>(T& x) { std::memcpy(&x, take(sizeof x).data(), sizeof x); };
  std::int32_t longest = 0;
  value(longest);
  while (at < bytes.size()) {
    const std::size_t id = v.pieces.size();
    Piece p;
    std::int32_t length = 0;
    value(p.score);
    value(length);
    // the longest text is that of the learned pieces; <s> and </s> stand between line breaks here
    if (length < 1 || (id > 258 && length > longest))
      throw Error(name, "piece " + std::to_string(id),
                  "1 to " + std::to_string(longest) + " bytes", std::to_string(length) + ": not a tokenizer of llama2.c");
    p.text = detail::with_space_symbols(take(static_cast<std::size_t>(length)));
    if (id < 3) p = {id == 0 ? "<unk>" : id == 1 ? "<s>" : "</s>", 0, id == 0 ? PieceType::unknown : PieceType::control};
    else if (id < 259 && detail::byte_of_piece(p.text) == static_cast<int>(id) - 3) p.type = PieceType::byte, v.byte_fallback = true;
    v.pieces.push_back(std::move(p));
  }
  if (v.pieces.size() < 3) throw Error(name, "pieces", "at least <unk>, <s> and </s>", std::to_string(v.pieces.size()));
  v.unk = 0, v.bos = 1, v.eos = 2;
  return v;
}

}  // namespace tinyllama
