// How each kind of checkpoint becomes a Checkpoint: GGUF, safetensors with config.json, llama2.c.
#pragma once

#include <algorithm>
#include <cstring>
#include <optional>
#include <set>

#include "tinyllama/io/checkpoint.hpp"
#include "tinyllama/io/config_json.hpp"
#include "tinyllama/io/gguf.hpp"
#include "tinyllama/io/gguf_config.hpp"
#include "tinyllama/io/llama2c.hpp"
#include "tinyllama/io/safetensors.hpp"
#include "tinyllama/quant/codec.hpp"

namespace tinyllama {

struct Checkpoint::Files {
  std::optional<Gguf> gguf;
  std::vector<Safetensors> shards;
  std::optional<MappedFile> raw;
  std::vector<const MappedFile*> mappings() const {
    std::vector<const MappedFile*> all;
    if (gguf && gguf->file()) all.push_back(gguf->file());
    for (const Safetensors& s : shards)
      if (s.file()) all.push_back(s.file());
    if (raw) all.push_back(&*raw);
    return all;
  }
};

TINYLLAMA_COMPILED void Checkpoint::release(std::span<const std::byte> bytes) const {
  for (const MappedFile* f : files_->mappings()) f->release(bytes);
}

TINYLLAMA_COMPILED const Gguf* Checkpoint::gguf() const { return files_->gguf ? &*files_->gguf : nullptr; }

namespace detail {

/// A shard's name in an index: a plain file name, so that a hostile index cannot reach out of its folder.
inline bool plain_file_name(std::string_view s) {
  return !s.empty() && s != "." && s != ".." && s.find_first_of(std::string_view("/\\\0", 3)) == std::string_view::npos;
}

/// One factor a row from X.weight_scale: of the whole matrix, [] or [1], or of each row, [rows] or [rows, 1].
inline std::vector<float> row_scales(const Safetensors& file, const SafeTensor& t, index_t rows) {
  const bool one = t.shape.empty() || t.shape == std::vector<index_t>{1}, each = t.shape == std::vector<index_t>{rows} || t.shape == std::vector<index_t>{rows, 1};
  if (!one && !each) throw Error(file.name(), t.name, "a scale of shape [], [1], [" + std::to_string(rows) + "] or [" + std::to_string(rows) + ", 1]", shape_text(t.shape));
  const std::optional<Format> format = format_of_safetensors(t.dtype);
  if (!format || !is_plain(*format)) throw Error(file.name(), t.name, "a scale of dtype F32, F16 or BF16", t.dtype);
  std::vector<float> scale(static_cast<std::size_t>(one ? 1 : rows));
  decode_row(*format, t.bytes.data(), scale.data(), static_cast<index_t>(scale.size()));
  scale.resize(static_cast<std::size_t>(rows), scale.front());
  return scale;
}

}  // namespace detail

TINYLLAMA_COMPILED void Checkpoint::read_gguf(Files& files) {
  const Gguf& g = *files.gguf;
  source = "gguf";
  rope = RopeLayout::interleaved;
  config = detail::gguf_config(g);
  if (const GgufTensor* t = g.find("rope_freqs.weight"))
    throw Error(g.name(), t->name, "plain or linear RoPE", "frequency factors (Llama 3 scaling), which are not supported");
  std::set<std::string_view> known;
  for_each_parameter(config, [&](const Parameter& p) {
    const std::string name = p.gguf_name();
    const GgufTensor* t = g.find(name);
    if (!t) throw missing(g.name(), name, p);
    known.insert(t->name);
    const std::vector<index_t> shape(t->dims.rbegin(), t->dims.rend());
    const Format format = g.format(*t);
    if (p.role == Role::gain && is_quantised(format)) throw Error(g.name(), name, "f32, f16 or bf16", std::string(tinyllama::name(format)));
    add(p, g.name(), name, format, shape, t->bytes);
  });
  for (const GgufTensor& t : g.tensors())
    if (!known.contains(t.name)) throw unexpected(g.name(), t.name);
}

TINYLLAMA_COMPILED void Checkpoint::read_safetensors(Files& files) {
  source = "safetensors";
  rope = RopeLayout::half;
  config = read_config_json(folder_ / "config.json");
  std::map<std::string_view, std::pair<const Safetensors*, const SafeTensor*>> all;
  for (const Safetensors& s : files.shards)
    for (const SafeTensor& t : s.tensors())
      if (!all.emplace(t.name, std::pair{&s, &t}).second) throw Error(s.name(), t.name, "the tensor in one shard", "it in " + all[t.name].first->name() + " too");
  const std::string& where = files.shards.size() == 1 ? files.shards[0].name() : path;
  std::set<std::string_view> known;
  for_each_parameter(config, [&](const Parameter& p) {
    const std::string name = p.hf_name();
    const auto it = all.find(name);
    if (it == all.end()) throw missing(where, name, p);
    const auto& [file, t] = it->second;
    known.insert(t->name);
    const Format format = file->format(*t);
    if (p.role == Role::gain && !is_plain(format)) throw Error(file->name(), name, "f32, f16 or bf16", std::string(tinyllama::name(format)));
    add(p, file->name(), name, format, t->shape, t->bytes);
    if (format != Format::f8_e4m3) return;
    if (const auto scale = all.find(name + "_scale"); scale != all.end()) {
      known.insert(scale->first);
      tensors_.back().scale = detail::row_scales(*scale->second.first, *scale->second.second, p.rows);
    }
    // The scale of activations that a calibration found: ours follow each row of them.
    if (const auto unused = all.find(name.substr(0, name.size() - std::string_view("weight").size()) + "input_scale"); unused != all.end()) known.insert(unused->first);
  });
  const std::string head = detail::outer_parameter(Slot::head).hf_name();
  for (const auto& [name, at] : all) {
    const auto& [file, t] = at;
    if (known.contains(name) || name.ends_with("rotary_emb.inv_freq")) continue;  // a buffer that old versions of transformers saved
    if (name != head) throw unexpected(file->name(), t->name);
    const StoredTensor& embedding = tensors_.front();  // tied, and saved all the same
    const bool same = t->bytes.size() == embedding.bytes.size() && file->format(*t) == embedding.format &&
                      std::memcmp(t->bytes.data(), embedding.bytes.data(), t->bytes.size()) == 0;
    if (!same) throw Error(file->name(), head, "the embedding again, since config.json says tie_word_embeddings", "other weights");
  }
}

TINYLLAMA_COMPILED void Checkpoint::read_llama2c(Files& files) {
  source = "llama2c";
  rope = RopeLayout::interleaved;
  const Llama2c file = tinyllama::read_llama2c(path, files.raw->bytes());
  config = file.config;
  for_each_parameter(config, [&](const Parameter& p) {
    for (const auto& [q, bytes] : file.tensors)
      if (q.slot == p.slot && q.layer == p.layer)
        add(p, path, p.hf_name(), Format::f32, p.role == Role::gain ? std::vector{p.columns} : std::vector{p.rows, p.columns}, bytes);
  });
}

namespace detail {

/// The shards that an index lists, each opened once, each holding what the index says.
inline std::vector<Safetensors> open_shards(const std::filesystem::path& index) {
  const json j = read_json(index);
  const json* map = JsonObject(j, index.string()).find("weight_map");
  if (!map || !map->is_object()) throw Error(index.string(), "weight_map", "an object of tensor names and file names", map ? json_text(*map) : "nothing");
  std::map<std::string, std::vector<std::string>> by_file;
  for (const auto& [tensor, file] : map->items()) {
    if (!file.is_string() || !plain_file_name(file.get_ref<const std::string&>())) throw Error(index.string(), tensor, "a file name without a folder", json_text(file));
    by_file[file.get<std::string>()].push_back(tensor);
  }
  std::vector<Safetensors> shards;
  for (const auto& [file, tensors] : by_file) shards.emplace_back(index.parent_path() / file);  // a missing file is told before what follows from it
  auto shard = shards.begin();
  for (const auto& [file, tensors] : by_file) {
    const std::string says = ", as " + index.filename().string() + " says";
    for (const std::string& t : tensors)
      if (!shard->find(t)) throw Error(shard->name(), t, "the tensor" + says, "none");
    if (shard->tensors().size() != tensors.size()) throw Error(shard->name(), "", std::to_string(tensors.size()) + " tensors" + says, std::to_string(shard->tensors().size()));
    ++shard;
  }
  return shards;
}

}  // namespace detail

TINYLLAMA_COMPILED Checkpoint open_checkpoint(const std::filesystem::path& path) {
  namespace fs = std::filesystem;
  std::error_code ignored;
  Checkpoint c;
  c.path = path.string();
  auto files = std::make_shared<Checkpoint::Files>();
  if (fs::is_directory(path, ignored)) {
    c.folder_ = path;
    const fs::path one = path / "model.safetensors", index = path / "model.safetensors.index.json";
    if (fs::exists(one, ignored)) files->shards.emplace_back(one);
    else if (fs::exists(index, ignored)) files->shards = detail::open_shards(index);
    else throw Error(c.path, "", "model.safetensors or model.safetensors.index.json in the folder",
                     fs::exists(path / "pytorch_model.bin", ignored) ? "pytorch_model.bin: save it as safetensors" : "neither");
    c.read_safetensors(*files);
  } else {
    c.folder_ = path.has_parent_path() ? path.parent_path() : fs::path(".");
    if (path.filename() == "model.safetensors.index.json") {
      files->shards = detail::open_shards(path);
      c.read_safetensors(*files);
    } else if (path.extension() == ".safetensors") {
      files->shards.emplace_back(path);
      c.read_safetensors(*files);
    } else {
      MappedFile file(path);
      const auto bytes = file.bytes();
      const auto begins = [&](std::string_view magic) { return bytes.size() >= magic.size() && std::memcmp(bytes.data(), magic.data(), magic.size()) == 0; };
      if (begins("GGUF") || path.extension() == ".gguf") {
        files->gguf.emplace(path);
        c.read_gguf(*files);
      } else if (path.extension() == ".bin" && !begins("PK")) {
        files->raw.emplace(std::move(file));
        c.read_llama2c(*files);
      } else {
        throw Error(c.path, "", "a GGUF file, a safetensors file or folder, or a llama2.c .bin", "something else");
      }
    }
  }
  c.files_ = std::move(files);
  return c;
}

}  // namespace tinyllama
