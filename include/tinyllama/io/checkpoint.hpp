// A model on disk, whatever the format: its config, and its tensors by parameter, mapped and checked against the config.
#pragma once

#include <array>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tinyllama/config/parameters.hpp"
#include "tinyllama/config/rope_layout.hpp"
#include "tinyllama/compiled.hpp"
#include "tinyllama/tensor/view.hpp"

namespace tinyllama {

/// One weight as it lies in a file: `rows` rows of row_bytes(format, columns) bytes each, not necessarily aligned.
struct StoredTensor {
  Parameter parameter;
  std::string file, name;             // as in the file
  Format format;
  index_t rows, columns;              // a gain is [1, columns]
  std::span<const std::byte> bytes;
  std::vector<float> scale = {};      // f8_e4m3: what each row is multiplied by; empty: 1

  std::span<const std::byte> row(index_t r) const {
    const std::size_t n = row_bytes(format, columns);
    return bytes.subspan(static_cast<std::size_t>(r) * n, n);
  }
};

class Gguf;

/// An open checkpoint. Copies share the mappings, which live as long as one copy does.
class Checkpoint {
 public:
  std::string path;
  any_llama config;
  RopeLayout rope = RopeLayout::half;  // the order of the rows of Q and K
  std::string source;                  // "safetensors", "gguf" or "llama2c"

  /// All tensors, in the order of for_each_parameter.
  std::span<const StoredTensor> tensors() const { return tensors_; }

  /// The tensor for a parameter of the caller's config. Throws Error where it is missing or of another shape.
  const StoredTensor& tensor(const Parameter& p) const {
    const auto it = index_.find({p.layer, p.slot});
    if (it == index_.end()) throw Error(path, stored_name(p), "a tensor of shape " + shape_of(p.rows, p.columns, p), "none");
    const StoredTensor& t = tensors_[it->second];
    if (t.rows != p.rows || t.columns != p.columns) throw Error(t.file, t.name, shape_of(p.rows, p.columns, p), shape_of(t.rows, t.columns, p));
    return t;
  }

  /// Gives the tensor's pages back to the system, for a loader that has copied them; they are read again when touched.
  void release(const StoredTensor& t) const { release(t.bytes); }
  void release(std::span<const std::byte> bytes) const;  // a part of one

  /// The GGUF file, where this is one: its metadata holds the tokenizer.
  const Gguf* gguf() const;

  /// The folder that holds the checkpoint, where tokenizer files lie beside it.
  std::filesystem::path folder() const { return folder_; }

 private:
  struct Files;  // the mappings

  static std::string shape_of(index_t rows, index_t columns, const Parameter& p) {
    return p.role == Role::gain && rows == 1 ? "[" + std::to_string(columns) + "]" : detail::shape_text(std::array{rows, columns});
  }
  std::string stored_name(const Parameter& p) const { return source == "gguf" ? p.gguf_name() : p.hf_name(); }

  /// `shape` is outermost first.
  void add(const Parameter& p, std::string file, std::string name, Format format, std::span<const index_t> shape, std::span<const std::byte> bytes) {
    const bool fits = p.role == Role::gain ? shape.size() == 1 && shape[0] == p.columns : shape.size() == 2 && shape[0] == p.rows && shape[1] == p.columns;
    if (!fits) throw Error(file, name, shape_of(p.rows, p.columns, p), detail::shape_text(shape));
    index_.emplace(std::pair{p.layer, p.slot}, tensors_.size());
    tensors_.push_back({p, std::move(file), std::move(name), format, p.rows, p.columns, bytes});
  }
  Error missing(const std::string& file, const std::string& name, const Parameter& p) const {
    return Error(file, name, "a tensor of shape " + shape_of(p.rows, p.columns, p), "none");
  }
  Error unexpected(const std::string& file, const std::string& name) const {
    return Error(file, name, "only the tensors of a Llama of " + std::to_string(config.layers) + " layers", "this one");
  }

  void read_gguf(Files& files);
  void read_safetensors(Files& files);
  void read_llama2c(Files& files);

  std::filesystem::path folder_;
  std::shared_ptr<const Files> files_;
  std::vector<StoredTensor> tensors_;
  std::map<std::pair<int, Slot>, std::size_t> index_;

  friend Checkpoint open_checkpoint(const std::filesystem::path&);
};

/// Opens a GGUF file, a folder in Hugging Face layout (model.safetensors, or shards with model.safetensors.index.json), one
/// .safetensors file with config.json beside it, or a llama2.c .bin. Reads no weight. Throws Error with the file, the tensor
/// or key, what was expected and what was found.
TINYLLAMA_COMPILED Checkpoint open_checkpoint(const std::filesystem::path& path);

}  // namespace tinyllama

#if TINYLLAMA_WITH_DEFINITIONS
#include "tinyllama/io/checkpoint_read.hpp"
#endif
