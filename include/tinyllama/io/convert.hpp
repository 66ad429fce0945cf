// A checkpoint written again in another file format, storage format or RoPE layout, a few rows in memory at a time.
#pragma once

#include <algorithm>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <system_error>
#include <vector>

#include "tinyllama/io/checkpoint.hpp"
#include "tinyllama/io/config_json.hpp"
#include "tinyllama/io/gguf.hpp"
#include "tinyllama/io/gguf_writer.hpp"
#include "tinyllama/io/mixture.hpp"
#include "tinyllama/io/safetensors.hpp"
#include "tinyllama/quant/codec.hpp"
#include "tinyllama/quant/e4m3.hpp"

namespace tinyllama {

/// What can be converted: a Checkpoint, a lit checkpoint, or a model in memory. `tensor` throws Error where the parameter is missing.
template <class S>
concept ModelSource = requires(const S& from, const Parameter& p) {
  { from.config } -> std::convertible_to<any_llama>;
  { from.rope } -> std::convertible_to<RopeLayout>;                           // the order of the rows of Q and K
  { from.tensor(p).row(index_t{}) } -> std::same_as<std::span<const std::byte>>;
  { from.tensor(p).format } -> std::convertible_to<Format>;
  { from.tensor(p).file } -> std::convertible_to<std::string>;                // file and name are for messages
  { from.tensor(p).name } -> std::convertible_to<std::string>;
  from.release(from.tensor(p));                                               // its rows were read
  { from.path } -> std::convertible_to<std::string>;
  { from.folder() } -> std::convertible_to<std::filesystem::path>;            // where tokenizer files lie
  { from.gguf() } -> std::same_as<const Gguf*>;                               // whose metadata has the tokenizer, or null
  { from.source } -> std::convertible_to<std::string_view>;
};

namespace detail {

/// The row of a matrix in layout `from` that is row r in layout `to`, for heads of `dim` rows:
/// rows i and i + dim/2 of a head in the half layout are its rows 2i and 2i + 1 in the interleaved one.
constexpr index_t permuted_row(index_t r, index_t dim, RopeLayout from, RopeLayout to) {
  if (from == to) return r;
  const index_t head = r / dim * dim, i = r % dim, half = dim / 2;
  if (to == RopeLayout::interleaved) return head + i / 2 + (i % 2) * half;
  return head + (i < half ? 2 * i : 2 * (i - half) + 1);
}

/// Streams the rows of tensors; counts what it has written.
template <ModelSource Source>
class RowCopier {
 public:
  RowCopier(const Source& from, std::uint64_t total, const Progress& progress) : from_(from), total_(total), progress_(progress) {}

  /// All rows of the parameter, in `format` and the row order of `rope`. Rows in the format they have already are copied bit by bit.
  void copy(const Parameter& p, Format format, RopeLayout rope, FileWriter& file) {
    copy(p, 0, p.rows, format, rope, file);
    from_.release(from_.tensor(p));
  }

  /// `rows` of them from row `first` on, into anything with write(bytes).
  template <class Sink>
  void copy(const Parameter& p, index_t first, index_t rows, Format format, RopeLayout rope, Sink& file) {
    const auto& t = from_.tensor(p);
    const bool rotated = p.slot == Slot::q || p.slot == Slot::k;
    const std::size_t size = row_bytes(format, p.columns);
    if (const int block = info(format).block; p.columns % block)
      throw Error(t.file, t.name, "rows of a multiple of " + std::to_string(block) + " weights for " + std::string(name(format)), std::to_string(p.columns));
    floats_.resize(static_cast<std::size_t>(p.columns));
    row_.resize(size);
    if (first == 0) scales_.clear();
    for (index_t i = first; i < first + rows; ++i) {
      const index_t r = rotated ? permuted_row(i, head_dim(from_.config), from_.rope, rope) : i;
      if (t.format == format) {
        file.write(t.row(r));
        if constexpr (requires { t.scale[0]; }) {
          if (format == Format::f8_e4m3) scales_.push_back(t.scale.empty() ? 1.0f : t.scale[static_cast<std::size_t>(r)]);
        }
      } else {
        decode_stored_row(t, r, floats_.data(), p.columns);
        if (format == Format::f8_e4m3) scales_.push_back(encode_e4m3_row(floats_, row_.data()));
        else encode_row(format, floats_.data(), row_.data(), p.columns);
        file.write(row_);
      }
      done_ += size;
      if (progress_ && done_ - reported_ >= (std::uint64_t{4} << 20)) progress_(reported_ = done_, total_);
    }
  }
  /// Of f8_e4m3: the scales of the rows of the parameter that came last.
  std::span<const float> scales() const { return scales_; }
  void finish() {
    if (progress_) progress_(done_, total_);
  }

 private:
  const Source& from_;
  std::uint64_t total_, done_ = 0, reported_ = 0;
  const Progress& progress_;
  std::vector<float> floats_, scales_;
  std::vector<std::byte> row_;
};

inline std::vector<Parameter> parameters_of(const any_llama& c) {
  std::vector<Parameter> all;
  for_each_parameter(c, [&](const Parameter& p) { all.push_back(p); });
  return all;
}

/// Files that a Hugging Face folder holds beside the weights and config.json.
inline constexpr const char* companion_files[] = {"tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                                                  "vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json"};

/// Whether tokenizer files may lie beside the source: a GGUF file has its own, and a llama2.c .bin names no folder's.
template <ModelSource Source>
bool has_companions(const Source& from) {
  return from.source != "gguf" && from.source != "llama2c" && !from.folder().empty();
}

/// Copies those companion files that are there.
inline void copy_companions(const std::filesystem::path& from, const std::filesystem::path& to) {
  namespace fs = std::filesystem;
  std::error_code error;
  if (fs::equivalent(from, to, error)) return;
  for (const char* const name : companion_files)
    if (fs::exists(from / name, error) && !fs::copy_file(from / name, to / name, fs::copy_options::overwrite_existing, error))
      throw Error((to / name).string(), "", "a file that can be written", error.message());
}

/// BOS and EOS for a config.json, as the source says.
template <ModelSource Source>
void read_special_ids(const Source& from, ConfigJsonOptions& out) {
  const auto small = [](std::uint64_t v) { return static_cast<std::int32_t>(std::min<std::uint64_t>(v, 0x7fffffff)); };
  if (const Gguf* g = from.gguf()) {
    if (const auto id = g->get_uint("tokenizer.ggml.bos_token_id")) out.bos = small(*id);
    if (const auto id = g->get_uint("tokenizer.ggml.eos_token_id")) out.eos = small(*id);
  } else if (has_companions(from)) {
    const std::filesystem::path folder = from.folder();
    std::error_code ignored;
    const char* name = "config.json";
    if (!std::filesystem::exists(folder / name, ignored)) name = "generation_config.json";  // lit's folders keep it
    if (!std::filesystem::exists(folder / name, ignored)) return;
    const json j = read_json(folder / name);
    const JsonObject o(j, name);
    if (const json* v = o.find("bos_token_id"); v && v->is_number_unsigned()) out.bos = small(v->get<std::uint64_t>());
    if (const json* v = o.find("eos_token_id"); v && v->is_number_unsigned()) out.eos = small(v->get<std::uint64_t>());
  }
}

}  // namespace detail

struct SaveSafetensorsOptions {
  Format format = Format::f32;                                  // f32, f16, bf16 or f8_e4m3
  std::uint64_t max_shard_bytes = std::uint64_t{5} << 30;       // a tensor is never cut
  Progress progress = {};
};

/// How a folder stores a parameter. Of f8_e4m3 it is the matrices of the layers, the rest is bf16: what vLLM's recipes do, and what checkpoints of Hugging Face have.
constexpr Format folder_format(Format f, const Parameter& p) { return f == Format::f8_e4m3 && p.role != Role::linear ? Format::bf16 : f; }

/// Writes a folder in Hugging Face layout (RoPE layout `half`): config.json, model.safetensors or shards with an index, and
/// the source's tokenizer files where it has such. Throws Error.
template <ModelSource Source>
void save_safetensors(const Source& from, const std::filesystem::path& folder, const SaveSafetensorsOptions& options = {}) {
  namespace fs = std::filesystem;
  if (info(options.format).safetensors.empty()) throw Error(folder.string(), "format", "f32, f16, bf16 or f8_e4m3 for safetensors", std::string(name(options.format)));
  std::error_code error;
  fs::create_directories(folder, error);
  if (!fs::is_directory(folder)) throw Error(folder.string(), "", "a folder that can be made", error ? error.message() : "a file");

  std::vector<std::vector<Parameter>> shards(1);
  std::uint64_t total = 0, shard_bytes = 0;
  const auto has_scales = [&](const Parameter& p) { return folder_format(options.format, p) == Format::f8_e4m3; };
  const auto bytes = [&](const Parameter& p) { return static_cast<std::uint64_t>(p.rows) * row_bytes(folder_format(options.format, p), p.columns); };
  for (const Parameter& p : detail::parameters_of(from.config)) {
    if (!shards.back().empty() && shard_bytes + bytes(p) > options.max_shard_bytes) {
      shards.emplace_back();
      shard_bytes = 0;
    }
    shards.back().push_back(p);
    shard_bytes += bytes(p);
    total += bytes(p);
  }

  ConfigJsonOptions config{options.format == Format::f32 ? "float32" : options.format == Format::f16 ? "float16" : "bfloat16", 1, 2, options.format == Format::f8_e4m3};
  detail::read_special_ids(from, config);
  detail::RowCopier<Source> rows(from, total, options.progress);
  detail::json index;
  index["metadata"]["total_size"] = total;
  const auto number = [](std::size_t n) { return std::string(5 - std::min<std::size_t>(5, std::to_string(n).size()), '0') + std::to_string(n); };
  for (std::size_t s = 0; s < shards.size(); ++s) {
    const std::string file_name = shards.size() == 1 ? "model.safetensors" : "model-" + number(s + 1) + "-of-" + number(shards.size()) + ".safetensors";
    std::vector<SafeTensorPlan> plan;
    std::vector<const Parameter*> of;  // of each tensor; none where it has the scales of the one before
    for (const Parameter& p : shards[s]) {
      const auto dtype = info(folder_format(options.format, p)).safetensors;
      plan.push_back({p.hf_name(), std::string(dtype), p.role == Role::gain ? std::vector{p.columns} : std::vector{p.rows, p.columns}, bytes(p)}), of.push_back(&p);
      if (has_scales(p)) plan.push_back({p.hf_name() + "_scale", "F32", {p.rows, 1}, static_cast<std::uint64_t>(p.rows) * sizeof(float)}), of.push_back(nullptr);
    }
    for (const SafeTensorPlan& t : plan) index["weight_map"][t.name] = file_name;
    write_safetensors(folder / file_name, plan, [&](std::size_t i, FileWriter& file) {
      if (of[i]) rows.copy(*of[i], folder_format(options.format, *of[i]), RopeLayout::half, file);
      else file.write(std::as_bytes(rows.scales()));
    });
  }
  const fs::path index_path = folder / "model.safetensors.index.json";
  if (shards.size() > 1) write_file_atomically(index_path, [&](FileWriter& file) { file.write(index.dump(2) + "\n"); });
  fs::remove(shards.size() > 1 ? folder / "model.safetensors" : index_path, error);  // of an earlier save, which readers would prefer or trip over
  write_file_atomically(folder / "config.json", [&](FileWriter& file) { file.write(config_json(from.config, config)); });

  if (detail::has_companions(from)) detail::copy_companions(from.folder(), folder);
  rows.finish();
}

struct SaveGgufOptions {
  Mixture mixture = Format::f16;
  std::string name = {};                        // general.name; of the source where empty
  const Vocabulary* vocabulary = nullptr;       // for a source that is no GGUF file; without it the file has no tokenizer
  Progress progress = {};
};

/// Writes one GGUF file (RoPE layout `interleaved`) that llama.cpp reads. A GGUF source's tokenizer is copied unless a
/// vocabulary is given. Throws Error, also where the vocabulary has more pieces than the embedding has rows.
template <ModelSource Source>
void save_gguf(const Source& from, const std::filesystem::path& path, const SaveGgufOptions& options = {}) {
  GgufMetadata metadata;
  set_config(metadata, from.config);
  std::string title = options.name;
  const Gguf* const source = from.gguf();
  if (title.empty() && source) title = source->get_string("general.name").value_or("");
  if (title.empty()) title = std::filesystem::path(from.path).lexically_normal().stem().string();
  metadata.set_string("general.name", title);
  metadata.set_uint("general.file_type", options.mixture.gguf_file_type);
  metadata.set_uint("general.quantization_version", 2);
  if (options.vocabulary) {
    if (options.vocabulary->pieces.size() > static_cast<std::size_t>(from.config.vocab))
      throw Error(path.string(), "vocabulary", "at most " + std::to_string(from.config.vocab) + " pieces", std::to_string(options.vocabulary->pieces.size()));
    set_vocabulary(metadata, *options.vocabulary);
  } else if (source) {
    for (const auto& [key, value] : source->metadata())
      if (key.starts_with("tokenizer.")) metadata.copy(key, value);
  }

  const std::vector<Parameter> parameters = detail::parameters_of(from.config);
  std::vector<GgufTensorPlan> plan;
  std::uint64_t total = 0;
  for (const Parameter& p : parameters) {
    plan.push_back({p.gguf_name(), storage_format(options.mixture, from.config, p), p.rows, p.columns, p.role == Role::gain});
    total += plan.back().bytes();
  }
  detail::RowCopier<Source> rows(from, total, options.progress);
  write_gguf(path, metadata, plan, [&](std::size_t i, FileWriter& file) { rows.copy(parameters[i], plan[i].format, RopeLayout::interleaved, file); });
  rows.finish();
}

}  // namespace tinyllama
