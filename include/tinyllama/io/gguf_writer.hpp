// Writing GGUF v3: metadata put together in memory, tensors streamed.
#pragma once

#include <cstdint>
#include <cstring>
#include <filesystem>
#include <limits>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "tinyllama/config/config.hpp"
#include "tinyllama/io/file.hpp"
#include "tinyllama/io/gguf.hpp"
#include "tinyllama/text/vocabulary.hpp"

namespace tinyllama {

/// The key-value part of a GGUF file. Setting a key a second time throws Error.
class GgufMetadata {
 public:
  void set_uint(std::string_view key, std::uint32_t v) { begin(key, GgufType::u32), put(v); }
  void set_float(std::string_view key, float v) { begin(key, GgufType::f32), put(v); }
  void set_bool(std::string_view key, bool v) { begin(key, GgufType::boolean), put(static_cast<std::uint8_t>(v)); }
  void set_string(std::string_view key, std::string_view v) { begin(key, GgufType::string), put_string(v); }
  void set_strings(std::string_view key, std::span<const std::string> v) {
    begin_array(key, GgufType::string, v.size());
    for (const std::string& s : v) put_string(s);
  }
  void set_floats(std::string_view key, std::span<const float> v) {
    begin_array(key, GgufType::f32, v.size());
    for (float x : v) put(x);
  }
  void set_ints(std::string_view key, std::span<const std::int32_t> v) {
    begin_array(key, GgufType::i32, v.size());
    for (std::int32_t x : v) put(x);
  }
  /// A value of another file, as it lies there.
  void copy(std::string_view key, const GgufValue& v) {
    begin(key, v.type);
    bytes_.append(reinterpret_cast<const char*>(v.raw.data()), v.raw.size());
  }
  bool has(std::string_view key) const { return keys_.contains(key); }
  std::uint64_t count() const { return keys_.size(); }
  const std::string& bytes() const { return bytes_; }

 private:
  template <class T>
  void put(T v) {
    char raw[sizeof(T)];
    std::memcpy(raw, &v, sizeof v);
    bytes_.append(raw, sizeof raw);
  }
  void put_string(std::string_view s) {
    put(static_cast<std::uint64_t>(s.size()));
    bytes_.append(s);
  }
  void begin(std::string_view key, GgufType type) {
    if (!keys_.emplace(key).second) throw Error("GGUF metadata", key, "the key once", "it twice");
    put_string(key);
    put(static_cast<std::uint32_t>(type));
  }
  void begin_array(std::string_view key, GgufType element, std::size_t n) {
    begin(key, GgufType::array);
    put(static_cast<std::uint32_t>(element));
    put(static_cast<std::uint64_t>(n));
  }
  std::set<std::string, std::less<>> keys_;
  std::string bytes_;
};

/// A tensor to be written.
struct GgufTensorPlan {
  std::string name;
  Format format;
  index_t rows, columns;   // rows = 1 and `vector`: one dimension
  bool vector = false;
  std::uint64_t bytes() const { return static_cast<std::uint64_t>(rows) * row_bytes(format, columns); }
};

/// Writes one file, atomically. `content(i, FileWriter&)` is called once for each tensor, in order, and writes exactly its bytes.
template <class Content>
void write_gguf(const std::filesystem::path& path, const GgufMetadata& metadata, std::span<const GgufTensorPlan> tensors, Content&& content) {
  for (const GgufTensorPlan& t : tensors)
    if (!info(t.format).in_gguf()) throw Error(path.string(), t.name, "a format that GGUF has", std::string(name(t.format)));
  constexpr std::uint64_t alignment = 32;  // the default of the format, and enough for a vector register
  const auto padding = [](std::uint64_t at) { return (alignment - at % alignment) % alignment; };
  write_file_atomically(path, [&](FileWriter& file) {
    const auto put_string = [&](std::string_view s) {
      file.write_value(static_cast<std::uint64_t>(s.size()));
      file.write(s);
    };
    file.write("GGUF");
    file.write_value(std::uint32_t{3});
    file.write_value(static_cast<std::uint64_t>(tensors.size()));
    file.write_value(metadata.count());
    file.write(metadata.bytes());
    std::uint64_t offset = 0;
    for (const GgufTensorPlan& t : tensors) {
      put_string(t.name);
      file.write_value(std::uint32_t{t.vector ? 1u : 2u});
      file.write_value(static_cast<std::uint64_t>(t.columns));
      if (!t.vector) file.write_value(static_cast<std::uint64_t>(t.rows));
      file.write_value(info(t.format).ggml);
      file.write_value(offset);
      offset += t.bytes() + padding(t.bytes());
    }
    file.write_zeros(padding(file.position()));
    for (std::size_t i = 0; i < tensors.size(); ++i) {
      const std::uint64_t start = file.position();
      content(i, file);
      if (file.position() - start != tensors[i].bytes())
        throw Error(path.string(), tensors[i].name, std::to_string(tensors[i].bytes()) + " bytes written", std::to_string(file.position() - start));
      file.write_zeros(padding(tensors[i].bytes()));
    }
  });
}

namespace detail {

/// llama.cpp's names of the rules by which byte-level vocabularies cut text.
constexpr std::string_view gguf_pre_tokenizer(PreTokenizer p) {
  switch (p) {
    case PreTokenizer::gpt2: return "gpt-2";
    case PreTokenizer::smollm: return "smollm";
    case PreTokenizer::llama3: return "llama-bpe";
    case PreTokenizer::none: break;
  }
  return "default";
}

}  // namespace detail

/// Writes a tokenizer into metadata under the keys that llama.cpp reads.
inline void set_vocabulary(GgufMetadata& m, const Vocabulary& v) {
  const bool spm = v.kind == Vocabulary::Kind::sentencepiece_bpe;
  m.set_string("tokenizer.ggml.model", spm ? "llama" : "gpt2");
  m.set_string("tokenizer.ggml.pre", spm ? "default" : detail::gguf_pre_tokenizer(v.pre_tokenizer));
  std::vector<std::string> tokens;
  std::vector<float> scores;
  std::vector<std::int32_t> types;
  for (const Piece& p : v.pieces) {
    tokens.push_back(p.text);
    scores.push_back(p.score);
    types.push_back(static_cast<std::int32_t>(p.type));
  }
  m.set_strings("tokenizer.ggml.tokens", tokens);
  if (spm) m.set_floats("tokenizer.ggml.scores", scores);
  m.set_ints("tokenizer.ggml.token_type", types);
  if (!spm) {
    std::vector<std::string> merges;
    for (const auto& [left, right] : v.merges) merges.push_back(left + " " + right);
    m.set_strings("tokenizer.ggml.merges", merges);
  }
  const auto id = [&](std::string_view key, std::int32_t value) {
    if (value >= 0) m.set_uint(key, static_cast<std::uint32_t>(value));
  };
  id("tokenizer.ggml.bos_token_id", v.bos);
  id("tokenizer.ggml.eos_token_id", v.eos);
  id("tokenizer.ggml.unknown_token_id", v.unk);
  id("tokenizer.ggml.padding_token_id", v.pad);
  m.set_bool("tokenizer.ggml.add_bos_token", v.add_bos);
  m.set_bool("tokenizer.ggml.add_eos_token", v.add_eos);
  m.set_bool("tokenizer.ggml.add_space_prefix", v.add_space_prefix);
  if (!v.chat_template.empty()) m.set_string("tokenizer.chat_template", v.chat_template);
}

/// The config under the keys that llama.cpp reads.
inline void set_config(GgufMetadata& m, const any_llama& c) {
  const auto size = [&](std::string_view key, int v) { m.set_uint(key, static_cast<std::uint32_t>(v)); };
  m.set_string("general.architecture", "llama");
  size("llama.vocab_size", c.vocab);
  size("llama.context_length", c.context);
  size("llama.embedding_length", c.hidden);
  size("llama.block_count", c.layers);
  size("llama.feed_forward_length", c.ffn);
  size("llama.attention.head_count", c.heads);
  size("llama.attention.head_count_kv", c.kv_heads);
  m.set_float("llama.attention.layer_norm_rms_epsilon", c.norm_eps);
  size("llama.rope.dimension_count", head_dim(c));
  m.set_float("llama.rope.freq_base", c.rope_base);
  if (c.rope_scale != 1.0f) {
    m.set_string("llama.rope.scaling.type", "linear");
    m.set_float("llama.rope.scaling.factor", c.rope_scale);
  }
}

}  // namespace tinyllama
