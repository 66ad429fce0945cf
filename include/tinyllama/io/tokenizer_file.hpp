// load_vocabulary: the tokenizer of a checkpoint, whatever it is stored in.
#pragma once

#include <cstddef>
#include <filesystem>
#include <string>
#include <string_view>
#include <system_error>

#include "tinyllama/error.hpp"
#include "tinyllama/io/file.hpp"
#include "tinyllama/io/gguf.hpp"
#include "tinyllama/io/json.hpp"
#include "tinyllama/io/tokenizer_gguf.hpp"
#include "tinyllama/io/tokenizer_json.hpp"
#include "tinyllama/io/tokenizer_llama2c.hpp"
#include "tinyllama/io/tokenizer_model.hpp"
#include "tinyllama/text/tokenizer.hpp"

namespace tinyllama {
namespace detail {

inline bool is_file(const std::filesystem::path& path) {
  std::error_code ignored;
  return std::filesystem::is_regular_file(path, ignored);
}
inline std::string_view text_of(const MappedFile& file) { return {reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()}; }

}  // namespace detail

/// Reads a tokenizer.model, tokenizer.json, GGUF file or llama2.c tokenizer.bin, told apart by content, or a folder with one of them.
/// Beside the first two, tokenizer_config.json and chat_template.jinja are read where they stand. Throws Error naming the file.
inline Vocabulary load_vocabulary(const std::filesystem::path& path) {
  std::error_code ignored;
  if (std::filesystem::is_directory(path, ignored)) {
    // tokenizer.json first: it has the pieces that were added after SentencePiece's training.
    for (const char* name : {"tokenizer.json", "tokenizer.model"})
      if (detail::is_file(path / name)) return load_vocabulary(path / name);
    std::filesystem::path gguf;
    for (const auto& entry : std::filesystem::directory_iterator(path, ignored))
      if (entry.path().extension() == ".gguf" && (gguf.empty() || entry.path() < gguf)) gguf = entry.path();
    if (!gguf.empty()) return load_vocabulary(gguf);
    throw Error(path.string(), "folder", "tokenizer.json, tokenizer.model or a .gguf file", "none of them");
  }
  const MappedFile file(path);
  const std::string_view text = detail::text_of(file);
  if (text.starts_with("GGUF")) return read_tokenizer_gguf(Gguf(path));
  const std::string name = path.string();
  const std::size_t first = text.find_first_not_of(" \t\r\n");
  Vocabulary v;
  if (path.extension() == ".json" || (first != text.npos && text[first] == '{' && path.extension() != ".model")) v = read_tokenizer_json(text, name);
  else if (path.extension() == ".model" || text[0] == '\x0a') v = read_tokenizer_model(text, name);  // field 1, a message: the first piece
  else if (path.extension() == ".bin") return read_tokenizer_llama2c(text, name);
  else throw Error(name, "", "tokenizer.model, tokenizer.json, a GGUF file or a llama2.c tokenizer (.bin)", "another kind of file");

  const std::filesystem::path folder = path.parent_path(), config = folder / "tokenizer_config.json", jinja = folder / "chat_template.jinja";
  if (detail::is_file(config)) apply_tokenizer_config(v, detail::read_json(config), config.string());
  if (detail::is_file(jinja)) v.chat_template = detail::text_of(MappedFile(jinja));
  return v;
}

/// The same, ready for use.
inline Tokenizer load_tokenizer(const std::filesystem::path& path) { return Tokenizer(load_vocabulary(path)); }

}  // namespace tinyllama
