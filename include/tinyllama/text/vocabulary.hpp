// A tokenizer's data, free of any file format: what tokenizer.model, tokenizer.json and GGUF are all read into.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace tinyllama {

/// Kind of a piece; the numbers are SentencePiece's, and GGUF's token_type.
enum class PieceType : std::uint8_t { normal = 1, unknown = 2, control = 3, user_defined = 4, unused = 5, byte = 6 };

struct Piece {
  std::string text;  // SentencePiece: with U+2581 for a space; byte-level: in GPT-2's byte alphabet; control pieces verbatim
  float score = 0;   // SentencePiece merges the pair with the highest score first; -infinity: no merge makes this piece
  PieceType type = PieceType::normal;
};

/// How text is cut before byte-level merges.
enum class PreTokenizer : std::uint8_t { none, gpt2, smollm, llama3 };

struct Vocabulary {
  enum class Kind : std::uint8_t { sentencepiece_bpe, byte_level_bpe };
  Kind kind = Kind::sentencepiece_bpe;
  std::vector<Piece> pieces;                                    // by id
  std::vector<std::pair<std::string, std::string>> merges;      // best first; for SentencePiece only from tokenizer.json, and then instead of scores
  PreTokenizer pre_tokenizer = PreTokenizer::none;
  std::int32_t bos = -1, eos = -1, unk = -1, pad = -1;
  bool add_bos = true, add_eos = false;                         // the file's policy for a whole prompt
  bool add_space_prefix = true;                                 // SentencePiece's dummy prefix; byte-level: Hugging Face's add_prefix_space
  bool byte_fallback = true;                                    // SentencePiece: what is no piece becomes its bytes, else `unk`
  bool ignore_merges = false;                                   // byte-level: a word that is a piece is taken whole (Llama 3)
  std::string unk_surface = " \u2047 ";                         // what `unk` decodes to (SentencePiece's own default)
  std::string chat_template;                                    // Jinja source as found, or empty
  std::string source;                                           // the file, for messages; may be empty
};

}  // namespace tinyllama
