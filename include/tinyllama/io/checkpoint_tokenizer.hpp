// The tokenizer that belongs to a checkpoint.
#pragma once

#include <optional>

#include "tinyllama/io/checkpoint.hpp"
#include "tinyllama/text/tokenizer.hpp"

namespace tinyllama {

/// Of a GGUF file's metadata, or of the tokenizer files beside a checkpoint; none where there are none. Throws Error where it does not fit.
TINYLLAMA_COMPILED std::optional<Tokenizer> checkpoint_tokenizer(const Checkpoint& file);

}  // namespace tinyllama

#if TINYLLAMA_WITH_DEFINITIONS
#include "tinyllama/io/tokenizer_file.hpp"

namespace tinyllama {

TINYLLAMA_COMPILED std::optional<Tokenizer> checkpoint_tokenizer(const Checkpoint& file) {
  std::optional<Vocabulary> v;
  if (const Gguf* g = file.gguf()) {
    if (g->has("tokenizer.ggml.model")) v = read_tokenizer_gguf(*g);
  } else if (detail::is_file(file.folder() / "tokenizer.json") || detail::is_file(file.folder() / "tokenizer.model")) {
    v = load_vocabulary(file.folder());
  }
  if (!v) return std::nullopt;
  if (static_cast<int>(v->pieces.size()) > file.config.vocab)
    throw Error(file.path, "tokenizer", "at most " + std::to_string(file.config.vocab) + " pieces", std::to_string(v->pieces.size()));
  return Tokenizer(std::move(*v));
}

}  // namespace tinyllama
#endif
