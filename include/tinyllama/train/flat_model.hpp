// A model whose weights lie in one float array, in the order of for_each_parameter: written to any file format, and filled from any.
#pragma once

#include <cstddef>
#include <cstring>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <utility>

#include "tinyllama/io/checkpoint.hpp"
#include "tinyllama/io/convert.hpp"

namespace tinyllama {

/// A source for save_safetensors, save_gguf and save_lit. The rows of Q and K are in the RoPE layout `half`.
/// The weights are the caller's, who keeps them alive.
class FlatModel {
 public:
  any_llama config;
  RopeLayout rope = RopeLayout::half;
  std::string path = "model", source = "memory";

  /// `weights`: [parameter_count(config)]. Tokenizer files, and the ids of BOS and EOS, come from `tokenizer_folder` where it is given. Throws Error.
  FlatModel(const any_llama& c, std::span<const float> weights, std::filesystem::path tokenizer_folder = {})
      : config(c), weights_(weights), folder_(std::move(tokenizer_folder)) {
    check(c, "config");
    std::size_t at = 0;
    for_each_parameter(c, [&](const Parameter& p) { offsets_[{p.layer, p.slot}] = std::exchange(at, at + static_cast<std::size_t>(p.size())); });
    if (at != weights.size()) throw Error("model in memory", "weights", std::to_string(at) + " floats", std::to_string(weights.size()));
  }

  struct Tensor {
    std::string file, name;
    std::span<const float> weights;
    index_t columns;
    Format format = Format::f32;
    std::span<const std::byte> row(index_t r) const {
      return std::as_bytes(weights.subspan(static_cast<std::size_t>(r * columns), static_cast<std::size_t>(columns)));
    }
  };
  Tensor tensor(const Parameter& p) const {
    const auto it = offsets_.find({p.layer, p.slot});
    if (it == offsets_.end()) throw Error(path, p.hf_name(), "a tensor of the model", "none");
    return {path, p.hf_name(), weights_.subspan(it->second, static_cast<std::size_t>(p.size())), p.columns};
  }
  void release(const Tensor&) const {}
  const Gguf* gguf() const { return nullptr; }
  const std::filesystem::path& folder() const { return folder_; }

 private:
  std::span<const float> weights_;
  std::filesystem::path folder_;
  std::map<std::pair<int, Slot>, std::size_t> offsets_;
};

/// The same as Weights::from reads it: a model to run.
struct FlatSource {
  const FlatModel& model;
  std::string path = "weights in memory";
  RopeLayout rope = RopeLayout::half;
  StoredTensor tensor(const Parameter& p) const {
    const FlatModel::Tensor t = model.tensor(p);
    return {p, t.file, t.name, Format::f32, p.rows, p.columns, std::as_bytes(t.weights)};
  }
  void release(std::span<const std::byte>) const {}
};

/// Decodes one tensor of a checkpoint of any format into `to`, [p.size()], with the rows of Q and K in the RoPE layout `half`. Throws Error.
template <ModelSource Source>
void read_flat(const Source& from, const Parameter& p, float* to) {
  const auto& t = from.tensor(p);
  const bool rotated = p.slot == Slot::q || p.slot == Slot::k;
  for (index_t r = 0; r < p.rows; ++r, to += p.columns)
    decode_stored_row(t, rotated ? detail::permuted_row(r, head_dim(from.config), from.rope, RopeLayout::half) : r, to, p.columns);
  from.release(t);
}
/// All of it into `weights`, [parameter_count(from.config)].
template <ModelSource Source>
void read_flat(const Source& from, std::span<float> weights) {
  const auto count = static_cast<std::size_t>(parameter_count(from.config));
  if (weights.size() != count) throw Error(from.path, "weights", "room for " + std::to_string(count) + " floats", std::to_string(weights.size()));
  float* out = weights.data();
  for_each_parameter(from.config, [&](const Parameter& p) {
    read_flat(from, p, out);
    out += p.size();
  });
}

}  // namespace tinyllama
