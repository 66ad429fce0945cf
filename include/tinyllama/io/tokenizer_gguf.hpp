// The tokenizer inside a GGUF file (keys tokenizer.*), read into a Vocabulary.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tinyllama/error.hpp"
#include "tinyllama/io/gguf.hpp"
#include "tinyllama/text/byte_level_bpe.hpp"
#include "tinyllama/text/sentencepiece_bpe.hpp"
#include "tinyllama/text/vocabulary.hpp"

namespace tinyllama {
namespace detail {

/// llama.cpp's names of pre-tokenizers that are one of ours.
inline PreTokenizer pre_tokenizer_named(const std::string& name, const std::string& file) {
  for (std::string_view s : {"gpt-2", "phi-2", "mpt", "olmo", "jina-es", "jina-de"})
    if (name == s) return PreTokenizer::gpt2;
  for (std::string_view s : {"smollm", "starcoder", "refact", "command-r", "codeshell"})
    if (name == s) return PreTokenizer::smollm;
  for (std::string_view s : {"llama-bpe", "llama3", "llama-v3"})
    if (name == s) return PreTokenizer::llama3;
  throw Error(file, "tokenizer.ggml.pre", "gpt-2, smollm, llama-bpe or a name for the same", name.empty() ? "nothing" : "'" + name + "'");
}

}  // namespace detail

/// Throws Error naming the file and key where a tokenizer is absent, damaged or of a kind that is not supported.
inline Vocabulary read_tokenizer_gguf(const Gguf& file) {
  Vocabulary v;
  v.source = file.name();
  const auto fail = [&](std::string_view key, std::string_view expected, const std::string& found) { return Error(file.name(), key, expected, found); };
  const std::string model = file.get_string("tokenizer.ggml.model").value_or("");
  if (model == "llama") v.kind = Vocabulary::Kind::sentencepiece_bpe;
  else if (model == "gpt2") v.kind = Vocabulary::Kind::byte_level_bpe;
  else throw fail("tokenizer.ggml.model", "llama or gpt2", model.empty() ? "nothing" : "'" + model + "'");
  const bool byte_level = v.kind == Vocabulary::Kind::byte_level_bpe;

  std::vector<std::string> tokens = file.get_strings("tokenizer.ggml.tokens");
  const std::vector<float> scores = file.get_floats("tokenizer.ggml.scores");
  const std::vector<std::int32_t> types = file.get_ints("tokenizer.ggml.token_type");
  const auto same_size = [&](std::string_view key, std::size_t n, bool optional) {
    if (n != tokens.size() && !(optional && n == 0)) throw fail(key, std::to_string(tokens.size()) + " elements, as there are tokens", std::to_string(n));
  };
  if (tokens.empty()) throw fail("tokenizer.ggml.tokens", "at least one", "none");
  same_size("tokenizer.ggml.scores", scores.size(), byte_level);
  same_size("tokenizer.ggml.token_type", types.size(), byte_level);

  v.byte_fallback = false;
  v.pieces.resize(tokens.size());
  for (std::size_t i = 0; i < tokens.size(); ++i) {
    Piece& p = v.pieces[i];
    const std::int32_t type = types.empty() ? 1 : types[i];
    if (type < 1 || type > 6) throw fail("tokenizer.ggml.token_type", "1 to 6", std::to_string(type) + " for token " + std::to_string(i));
    p.type = static_cast<PieceType>(type);
    p.text = p.type == PieceType::user_defined && !byte_level ? detail::with_space_symbols(tokens[i]) : std::move(tokens[i]);
    if (!scores.empty()) p.score = scores[i];
    v.byte_fallback = v.byte_fallback || p.type == PieceType::byte;
  }
  const auto id = [&](const char* key) {
    const std::uint64_t n = file.get_uint(key).value_or(0xffffffffu);
    if (n == 0xffffffffu) return std::int32_t{-1};  // llama.cpp's "none"
    if (n >= v.pieces.size()) throw fail(key, "an id below " + std::to_string(v.pieces.size()), std::to_string(n));
    return static_cast<std::int32_t>(n);
  };
  v.bos = id("tokenizer.ggml.bos_token_id");
  v.eos = id("tokenizer.ggml.eos_token_id");
  v.pad = id("tokenizer.ggml.padding_token_id");
  bool policy_bos = !byte_level;  // llama.cpp's defaults
  if (byte_level) {
    // unknown_token_id is not for encoding here: Hugging Face's byte-level models, as llama.cpp, drop a byte that has no piece.
    v.pre_tokenizer = detail::pre_tokenizer_named(file.get_string("tokenizer.ggml.pre").value_or(""), file.name());
    v.ignore_merges = v.pre_tokenizer == PreTokenizer::llama3;
    policy_bos = v.pre_tokenizer == PreTokenizer::llama3;
    const std::vector<std::string> merges = file.get_strings("tokenizer.ggml.merges");
    v.merges.reserve(merges.size());
    for (std::size_t i = 0; i < merges.size(); ++i) v.merges.push_back(detail::split_merge(merges[i], i, file.name()));
  } else {
    v.unk = id("tokenizer.ggml.unknown_token_id");
  }
  v.add_bos = file.get_bool("tokenizer.ggml.add_bos_token").value_or(policy_bos);
  v.add_eos = file.get_bool("tokenizer.ggml.add_eos_token").value_or(false);
  v.add_space_prefix = file.get_bool("tokenizer.ggml.add_space_prefix").value_or(!byte_level);
  v.chat_template = file.get_string("tokenizer.chat_template").value_or("");
  return v;
}

}  // namespace tinyllama
