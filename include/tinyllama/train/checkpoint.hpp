// Checkpoints of a training run: ROOT/step-00001234/ holds the model in Hugging Face layout and, beside it, all that a run needs to go on bit by bit.
#pragma once

#include <algorithm>
#include <charconv>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tinyllama/io/checkpoint.hpp"
#include "tinyllama/io/config_json.hpp"
#include "tinyllama/io/safetensors.hpp"
#include "tinyllama/train/atomic_folder.hpp"
#include "tinyllama/train/flat_model.hpp"

namespace tinyllama {

/// A part of the training state: moments of the optimizer, adapters.
struct NamedArray {
  std::string name;
  std::span<const float> values;
};
struct MutableNamedArray {
  std::string name;
  std::span<float> values;
};

struct SaveCheckpointOptions {
  int keep = 3;                               // the newest so many stay; 0: all
  Format format = Format::f32;                // of the model's tensors; for f16 and bf16 the f32 weights go into the training state
  std::filesystem::path tokenizer = {};       // a folder in Hugging Face layout, or a tokenizer.model or tokenizer.json, to be copied into it
  std::function<void(const std::filesystem::path& folder)> also = {};  // writes further files into it, such as adapters in a layout of their own
};

/// What load_checkpoint does not write into arrays.
struct LoadedCheckpoint {
  std::int64_t step;
  std::string state;  // the JSON object that was given to save_checkpoint
};

namespace detail {

inline constexpr const char* state_json_file = "training_state.json";
inline constexpr const char* state_arrays_file = "training_state.safetensors";
inline constexpr const char* state_shards = "training_state-";  // 00001-of-00002.safetensors: of runs on several ranks (train/sharded_checkpoint.hpp)
inline constexpr const char* state_format = "tinyllama training state 1";
inline constexpr const char* step_prefix = "step-";
inline constexpr const char* master_weights = "parameters";

/// 64 bits that change with any changed word: each step is a bijection of its lane, and so is the end. Four lanes keep up with the memory.
inline std::string checksum(std::span<const std::byte> bytes) {
  constexpr std::uint64_t odd = 0x9e3779b97f4a7c15u;
  const auto step = [](std::uint64_t h, std::uint64_t word) {
    h = (h ^ word) * odd;
    return h ^ h >> 32;  // the product alone carries upwards only: two flipped bits could cancel out
  };
  std::uint64_t lanes[4] = {1, 2, 3, 4}, word = 0;
  std::size_t i = 0;
  for (; i + 32 <= bytes.size(); i += 32)
    for (std::size_t k = 0; k < 4; ++k) {
      std::memcpy(&word, bytes.data() + i + 8 * k, 8);
      lanes[k] = step(lanes[k], word);
    }
  std::uint64_t h = bytes.size();
  for (const std::uint64_t lane : lanes) h = step(h, lane);
  for (; i < bytes.size(); ++i) h = step(h, std::to_integer<std::uint64_t>(bytes[i]));
  std::string text(16, '0');
  for (int digit = 15; digit >= 0; --digit, h >>= 4) text[static_cast<std::size_t>(digit)] = "0123456789abcdef"[h & 15];
  return text;
}

inline std::string step_digits(std::int64_t step) {
  const std::string digits = std::to_string(step);
  return std::string(8 - std::min<std::size_t>(8, digits.size()), '0') + digits;
}

inline std::optional<std::int64_t> step_of(const std::string& folder_name) {
  if (!folder_name.starts_with(step_prefix)) return std::nullopt;
  const char* const end = folder_name.data() + folder_name.size();
  std::int64_t step = -1;
  const auto [at, error] = std::from_chars(folder_name.data() + std::strlen(step_prefix), end, step);
  const bool ours = error == std::errc() && at == end && step >= 0 && folder_name == step_prefix + step_digits(step);
  return ours ? std::optional(step) : std::nullopt;
}

/// The first member in which the configs differ, by its key in config.json.
inline void check_same_config(const any_llama& expected, const any_llama& found, const std::string& where) {
  const auto same = [&](std::string_view key, auto e, auto f) {
    if (e == f) return;
    const auto text = [](auto v) {
      char digits[64];
      return std::string(digits, std::to_chars(digits, digits + sizeof digits, v).ptr);
    };
    throw Error(where, key, text(e) + ", as in the model to be trained", text(f) + ": a checkpoint of another config");
  };
  same("num_hidden_layers", expected.layers, found.layers);
  same("hidden_size", expected.hidden, found.hidden);
  same("num_attention_heads", expected.heads, found.heads);
  same("num_key_value_heads", expected.kv_heads, found.kv_heads);
  same("intermediate_size", expected.ffn, found.ffn);
  same("vocab_size", expected.vocab, found.vocab);
  same("max_position_embeddings", expected.context, found.context);
  same("rms_norm_eps", expected.norm_eps, found.norm_eps);
  same("rope_theta", expected.rope_base, found.rope_base);
  same("rope_scaling factor", expected.rope_scale, found.rope_scale);
  same("tie_word_embeddings", static_cast<int>(expected.tied), static_cast<int>(found.tied));
}

/// A folder's tokenizer files, or one tokenizer.model or tokenizer.json, whatever its name.
inline void copy_tokenizer(const std::filesystem::path& from, const std::filesystem::path& folder) {
  std::error_code error;
  if (std::filesystem::is_directory(from, error)) return copy_companions(from, folder);
  const std::string extension = from.extension().string();
  if (extension != ".model" && extension != ".json")
    throw Error(from.string(), "tokenizer", "a folder, a tokenizer.model or a tokenizer.json", "another kind of file");
  const MappedFile file(from);
  write_file_atomically(folder / ("tokenizer" + extension), [&](FileWriter& out) { out.write(file.bytes()); });
}

/// `bytes` where they have the checksum that stands under `name`.
inline std::span<const std::byte> checked(const std::string& file, const std::string& name, std::span<const std::byte> bytes,
                                          const json& checksums, const std::string& state_file) {
  const auto it = checksums.find(name);
  if (it == checksums.end() || !it->is_string()) throw Error(state_file, name, "a checksum", it == checksums.end() ? "none" : json_text(*it));
  const std::string found = checksum(bytes);
  if (*it != found) throw Error(file, name, "content of checksum " + json_text(*it), found + ": the file was damaged");
  return bytes;
}

inline const json& object_at(const json& j, const char* key, const std::string& where) {
  const auto it = j.find(key);
  if (it == j.end() || !it->is_object()) throw Error(where, key, "an object", it == j.end() ? "nothing" : json_text(*it));
  return *it;
}

}  // namespace detail

/// The complete checkpoints under `root`, oldest first: step and folder. None where there is no such folder.
inline std::vector<std::pair<std::int64_t, std::filesystem::path>> list_checkpoints(const std::filesystem::path& root) {
  std::vector<std::pair<std::int64_t, std::filesystem::path>> all;
  std::error_code error;
  for (auto it = std::filesystem::directory_iterator(root, error); it != std::filesystem::directory_iterator(); it.increment(error)) {
    const auto step = detail::step_of(it->path().filename().string());
    std::error_code ignored;  // a folder has its name once all of it is there; this tells one that somebody emptied
    const auto has = [&](const char* file) { return std::filesystem::exists(it->path() / file, ignored); };
    const auto sharded = [&] {
      const std::filesystem::directory_iterator files(it->path(), ignored);
      return std::any_of(begin(files), end(files), [](const auto& file) { return file.path().filename().string().starts_with(detail::state_shards); });
    };
    if (step && has(detail::state_json_file) && (has(detail::state_arrays_file) || sharded())) all.emplace_back(*step, it->path());
  }
  std::sort(all.begin(), all.end());
  return all;
}

/// The folder of the newest (highest step) complete checkpoint under `root`, or nothing.
inline std::optional<std::filesystem::path> latest_checkpoint(const std::filesystem::path& root) {
  const auto all = list_checkpoints(root);
  return all.empty() ? std::nullopt : std::optional(all.back().second);
}

namespace detail {
/// Older checkpoints beyond `keep` go; never that of `step`: a run that went back saves below the newest.
inline void keep_newest(const AtomicFolder& folder, const std::filesystem::path& root, int keep, std::int64_t step) {
  if (keep <= 0) return;
  auto all = list_checkpoints(root);
  std::erase_if(all, [&](const auto& c) { return c.first == step; });
  for (std::size_t i = 0; i + static_cast<std::size_t>(keep) <= all.size(); ++i) folder.remove(all[i].second.filename().string());
}
}  // namespace detail

/// Writes ROOT/step-NNNNNNNN: config.json, model.safetensors, tokenizer files, training_state.safetensors (the arrays) and
/// training_state.json (step, checksums, `state`). All of it is on the disk before it gets that name; then older ones beyond
/// `keep` go. One of the same step is replaced.
/// `parameters`: [parameter_count(config)] in the order of for_each_parameter; or empty, where the model does not change (adapters), and
/// then no model is written. `state`: a JSON object, kept as it is. Returns the folder.
/// Throws Error, for instance where the disk is full; then the root is as before.
inline std::filesystem::path save_checkpoint(const std::filesystem::path& root, std::int64_t step, const any_llama& config,
                                             std::span<const float> parameters, std::span<const NamedArray> arrays,
                                             std::string_view state, const SaveCheckpointOptions& options = {}) {
  namespace fs = std::filesystem;
  if (step < 0) throw Error(root.string(), "step", "0 or more", std::to_string(step));
  detail::json j;
  j["format"] = detail::state_format;
  j["step"] = step;
  j["state"] = detail::parse_json(state, "training state");
  if (!j["state"].is_object()) throw Error("training state", "JSON", "an object", std::string(j["state"].type_name()));
  detail::json& model_checksums = j["checksums"]["model"] = detail::json::object();
  detail::json& array_checksums = j["checksums"]["arrays"] = detail::json::object();

  std::vector<SafeTensor> tensors;
  const auto add = [&](const std::string& name, std::span<const float> values) {
    const auto bytes = std::as_bytes(values);
    tensors.push_back({name, "F32", {static_cast<index_t>(values.size())}, bytes});
    array_checksums[name] = detail::checksum(bytes);
  };
  for (const NamedArray& a : arrays) {
    if (a.name.empty() || a.name == detail::master_weights || a.name == "__metadata__")
      throw Error(root.string(), "array", "a name of its own", "'" + a.name + "'");
    add(a.name, a.values);
  }

  AtomicFolder folder(root, detail::step_prefix, detail::step_digits(step));
  std::error_code error;
  if (!options.tokenizer.empty() && !fs::exists(options.tokenizer, error))
    throw Error(options.tokenizer.string(), "tokenizer", "a file or folder", "none");
  const bool tokenizer_folder = fs::is_directory(options.tokenizer, error);  // save_safetensors copies its files
  if (parameters.empty()) {
    write_file_atomically(folder.path() / "config.json", [&](FileWriter& file) { file.write(config_json(config)); });
  } else {
    const FlatModel model(config, parameters, tokenizer_folder ? options.tokenizer : fs::path());
    save_safetensors(model, folder.path(), {.format = options.format});
    const auto add_tensor = [&](const Parameter& p) { model_checksums[p.hf_name()] = detail::checksum(std::as_bytes(model.tensor(p).weights)); };
    if (options.format == Format::f32) for_each_parameter(config, add_tensor);
    else add(detail::master_weights, parameters);
  }
  if (!options.tokenizer.empty() && (parameters.empty() || !tokenizer_folder)) detail::copy_tokenizer(options.tokenizer, folder.path());
  write_safetensors(folder.path() / detail::state_arrays_file, tensors);
  write_file_atomically(folder.path() / detail::state_json_file, [&](FileWriter& file) { file.write(j.dump(2) + "\n"); });
  if (options.also) options.also(folder.path());
  folder.commit();

  detail::keep_newest(folder, root, options.keep, step);
  return folder.final_path();
}

/// Reads a checkpoint back into arrays of the caller, which must be those that were saved: the same config, names and sizes.
/// Everything is checked, by checksum too, before anything is written. Throws Error naming file and tensor or key: another
/// config, an array that is missing, renamed, left over or of another size, damaged or truncated files.
inline LoadedCheckpoint load_checkpoint(const std::filesystem::path& folder, const any_llama& config, std::span<float> parameters,
                                        std::span<const MutableNamedArray> arrays) {
  using detail::json;
  const std::string state_file = (folder / detail::state_json_file).string(), config_file = (folder / "config.json").string();
  detail::check_same_config(config, read_config_json(config_file), config_file);
  const json j = detail::read_json(state_file);
  const detail::JsonObject o(j, state_file);
  if (o.string("format", "") != detail::state_format) throw o.wrong("format", detail::state_format);
  const json* const step = o.find("step");
  if (!step || !step->is_number_unsigned()) throw o.wrong("step", "0 or more");
  const json& checksums = detail::object_at(j, "checksums", state_file);
  const json& model_checksums = detail::object_at(checksums, "model", state_file);
  const json& array_checksums = detail::object_at(checksums, "arrays", state_file);

  const Safetensors file(folder / detail::state_arrays_file);
  std::vector<std::pair<std::span<const std::byte>, float*>> copies;
  std::string names;
  std::vector<std::string_view> known;
  const auto take = [&](const std::string& name, std::span<float> to) {
    const SafeTensor* t = file.find(name);
    if (!t) throw Error(file.name(), name, "an array of " + std::to_string(to.size()) + " floats", "none");
    const bool fits = t->dtype == "F32" && t->shape.size() == 1 && t->shape[0] == static_cast<index_t>(to.size());
    if (!fits) throw Error(file.name(), name, "F32 [" + std::to_string(to.size()) + "]", t->dtype + " " + detail::shape_text(t->shape));
    copies.emplace_back(detail::checked(file.name(), name, t->bytes, array_checksums, state_file), to.data());
    known.push_back(t->name);
    names.append(names.empty() ? "" : ", ").append(name);
  };
  for (const MutableNamedArray& a : arrays) take(a.name, a.values);

  std::optional<Checkpoint> model;
  if (file.find(detail::master_weights)) {
    take(detail::master_weights, parameters);
  } else if (!parameters.empty()) {
    model = open_checkpoint(folder);
    const auto count = static_cast<std::size_t>(parameter_count(config));
    if (parameters.size() != count)
      throw Error(model->path, "parameters", "room for " + std::to_string(count) + " floats", std::to_string(parameters.size()));
    float* to = parameters.data();
    for_each_parameter(config, [&](const Parameter& p) {
      const StoredTensor& t = model->tensor(p);
      if (t.format != Format::f32)
        throw Error(t.file, t.name, "f32, or '" + std::string(detail::master_weights) + "' among the arrays", std::string(name(t.format)));
      copies.emplace_back(detail::checked(t.file, t.name, t.bytes, model_checksums, state_file), to);
      to += p.size();
    });
  } else if (!model_checksums.empty()) {
    throw Error(folder.string(), "parameters", "room for the model's weights", "0 floats");
  }
  for (const SafeTensor& t : file.tensors())
    if (std::find(known.begin(), known.end(), t.name) == known.end())
      throw Error(file.name(), t.name, names.empty() ? "no array" : "only " + names, "this one");

  LoadedCheckpoint loaded{step->get<std::int64_t>(), detail::object_at(j, "state", state_file).dump()};
  for (const auto& [bytes, to] : copies) {
    if (!bytes.empty()) std::memcpy(to, bytes.data(), bytes.size());
  }
  return loaded;
}

}  // namespace tinyllama
