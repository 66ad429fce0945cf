// lit-gpt checkpoints, the form in which TinyLlama was trained: read as a source for the converters, and written from any other source.
#pragma once

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tinyllama/config/presets.hpp"
#include "tinyllama/io/convert.hpp"
#include "tinyllama/io/json.hpp"
#include "tinyllama/io/torch_file.hpp"

namespace tinyllama {

namespace detail {

/// Where the rows of Q, K or V lie in lit's attn.attn: for each group of heads its Q rows, then K, then V. Others lie where they are.
struct LitRows {
  index_t block, period, offset;    // row r is row r / block * period + offset + r % block of the fused matrix
  index_t operator()(index_t r) const { return r / block * period + offset + r % block; }
};
inline LitRows lit_rows(const any_llama& c, const Parameter& p) {
  const index_t dim = head_dim(c), q = c.heads / c.kv_heads * dim, period = q + 2 * dim;
  switch (p.slot) {
    case Slot::q: return {q, period, 0};
    case Slot::k: return {dim, period, q};
    case Slot::v: return {dim, period, q + dim};
    default: return {p.rows, p.rows, 0};
  }
}

/// lit's name without layer and ".weight"; Q, K and V share theirs. TinyLlama's own repository has the SwiGLU of xformers, others call its
/// parts fc_1, fc_2 and proj.
inline std::string_view lit_stem(Slot slot, bool swiglu = true) {
  switch (slot) {
    case Slot::embedding: return "transformer.wte";
    case Slot::attn_norm: return "norm_1";
    case Slot::q: case Slot::k: case Slot::v: return "attn.attn";
    case Slot::o: return "attn.proj";
    case Slot::ffn_norm: return "norm_2";
    case Slot::gate: return swiglu ? "mlp.swiglu.w1" : "mlp.fc_1";
    case Slot::up: return swiglu ? "mlp.swiglu.w2" : "mlp.fc_2";
    case Slot::down: return swiglu ? "mlp.swiglu.w3" : "mlp.proj";
    case Slot::final_norm: return "transformer.ln_f";
    case Slot::head: return "lm_head";
  }
  return "";
}
inline std::string lit_name(const Parameter& p, bool swiglu = true) {
  return (p.layer < 0 ? "" : "transformer.h." + std::to_string(p.layer) + ".") + std::string(lit_stem(p.slot, swiglu)) + ".weight";
}

/// The config in a lit_config.json; the fallbacks are those of lit-gpt's Config.
inline any_llama parse_lit_config(const json& j, std::string_view where) {
  const JsonObject o(j, where);
  const auto only = [&](std::string_view key, bool holds, std::string_view expected) {
    if (!holds) throw o.wrong(key, expected);
  };
  only("rotary_percentage", o.number("rotary_percentage", 0.25) == 1, "1");
  only("parallel_residual", !o.boolean("parallel_residual", true), "false");
  only("bias", !o.boolean("bias", true), "false: biases are not supported");
  const std::string norm_key = o.find("norm_class_name") ? "norm_class_name" : "_norm_class", norm = o.string(norm_key, "LayerNorm");
  only(norm_key, norm == "RMSNorm" || norm == "FusedRMSNorm", "RMSNorm or FusedRMSNorm");
  const std::string mlp_key = o.find("mlp_class_name") ? "mlp_class_name" : "_mlp_class";
  only(mlp_key, o.string(mlp_key, "GptNeoxMLP") == "LLaMAMLP", "LLaMAMLP");
  any_llama c;
  c.layers = o.integer("n_layer");
  c.hidden = o.integer("n_embd");
  c.heads = o.integer("n_head");
  c.kv_heads = o.integer("n_query_groups", c.heads);
  c.ffn = o.integer("intermediate_size");
  c.vocab = o.find("padded_vocab_size") ? o.integer("padded_vocab_size") : o.integer("vocab_size");
  c.context = o.integer("block_size", 4096);
  c.norm_eps = static_cast<float>(o.number("norm_eps", 1e-5));
  c.rope_base = static_cast<float>(o.number("rope_base", 10000));
  c.rope_scale = static_cast<float>(o.number(o.find("rope_condense_ratio") ? "rope_condense_ratio" : "condense_ratio", 1));
  check(c, where);
  only("head_size", o.integer("head_size", head_dim(c)) == head_dim(c), "n_embd / n_head = " + std::to_string(head_dim(c)));
  return c;
}

/// The text of a lit_config.json with the keys that TinyLlama's repository knows, and rope_base, which it does not, only where it must be.
inline std::string lit_config_json(const any_llama& c) {
  json j;
  const std::string_view preset = preset_name(c);
  j["name"] = preset == "tinyllama_1b" ? "tiny_LLaMA_1b" : preset == "tinyllama_120m" ? "tiny_LLaMA_120M" : "llama";
  j["block_size"] = c.context;
  j["vocab_size"] = j["padded_vocab_size"] = c.vocab;
  j["n_layer"] = c.layers;
  j["n_head"] = c.heads;
  j["n_embd"] = c.hidden;
  j["n_query_groups"] = c.kv_heads;
  j["intermediate_size"] = c.ffn;
  j["rotary_percentage"] = 1.0;
  j["parallel_residual"] = j["bias"] = j["shared_attention_norm"] = false;
  j["_norm_class"] = "FusedRMSNorm";
  j["norm_eps"] = shortest(c.norm_eps);
  j["_mlp_class"] = "LLaMAMLP";
  j["condense_ratio"] = shortest(c.rope_scale);
  if (c.rope_base != 10000.0f) j["rope_base"] = shortest(c.rope_base);
  return j.dump(2) + "\n";
}

}  // namespace detail

/// An open lit-gpt checkpoint: a source for save_safetensors, save_gguf, save_lit and read_flat. Copies share the mapping.
class LitCheckpoint {
 public:
  std::string path;
  any_llama config;
  RopeLayout rope = RopeLayout::half;
  std::string source = "lit";

  /// A parameter as it lies in the file.
  struct Tensor {
    std::string file, name;
    Format format;
    index_t columns;
    std::span<const std::byte> bytes;   // of Q, K and V: all three
    detail::LitRows rows;
    bool last_use;                      // of these bytes, in the order of for_each_parameter

    std::span<const std::byte> row(index_t r) const {
      const std::size_t n = row_bytes(format, columns);
      return bytes.subspan(static_cast<std::size_t>(rows(r)) * n, n);
    }
  };

  /// Throws Error where the parameter is of another config.
  Tensor tensor(const Parameter& p) const {
    const auto it = index_.find({p.layer, p.slot});
    if (it == index_.end()) throw Error(path, detail::lit_name(p), "a tensor of the model", "none");
    const TorchTensor& t = file_->tensors()[it->second];
    return {file_->name(), t.name, *t.format, p.columns, t.bytes, detail::lit_rows(config, p), p.slot != Slot::q && p.slot != Slot::k};
  }
  void release(const Tensor& t) const {
    if (t.last_use && file_->file()) file_->file()->release(t.bytes);
  }
  const Gguf* gguf() const { return nullptr; }
  std::filesystem::path folder() const { return folder_; }
  const TorchFile& file() const { return *file_; }

  /// Reads a file whose bytes the caller keeps alive. See open_lit.
  LitCheckpoint(std::shared_ptr<const TorchFile> file, const std::optional<any_llama>& given, std::filesystem::path folder = {})
      : path(file->name()), file_(std::move(file)), folder_(std::move(folder)) {
    config = given ? *given : guess();
    check(config, path);
    std::set<std::string_view> known;
    for_each_parameter(config, [&](const Parameter& p) {
      const TorchTensor& t = find(p);
      const bool fused = detail::lit_stem(p.slot) == "attn.attn";
      const index_t rows = fused ? config.hidden + 2 * static_cast<index_t>(config.kv_heads) * head_dim(config) : p.rows;
      const std::vector<index_t> shape = p.role == Role::gain ? std::vector{p.columns} : std::vector{rows, p.columns};
      if (t.shape != shape) throw Error(path, t.name, detail::shape_text(shape), detail::shape_text(t.shape));
      file_->format(t);
      index_.emplace(std::pair{p.layer, p.slot}, static_cast<std::size_t>(&t - file_->tensors().data()));
      known.insert(t.name);
    });
    for (const TorchTensor& t : file_->tensors()) {
      if (known.contains(t.name)) continue;
      if (t.name != "lm_head.weight")
        throw Error(path, t.name, "only the tensors of a Llama of " + std::to_string(config.layers) + " layers", "this one");
      const TorchTensor& e = *file_->find("transformer.wte.weight");  // tied, and saved all the same
      if (t.bytes.size() != e.bytes.size() || std::memcmp(t.bytes.data(), e.bytes.data(), e.bytes.size()) != 0)
        throw Error(path, t.name, "the embedding again, since the config says that they are tied", "other weights");
    }
  }

 private:
  const TorchTensor* find_any(const Parameter& p) const {
    const TorchTensor* t = file_->find(detail::lit_name(p));
    return t ? t : file_->find(detail::lit_name(p, false));
  }
  const TorchTensor& find(const Parameter& p) const {
    const TorchTensor* t = find_any(p);
    if (t) return *t;
    const bool hf = file_->find("model.embed_tokens.weight");
    throw Error(path, detail::lit_name(p), "the tensor", hf ? "Hugging Face's names: save it as safetensors" : "none");
  }
  index_t extent(Slot slot, int layer, std::size_t dimension) const {
    const TorchTensor& t = find({.slot = slot, .role = Role::linear, .layer = layer, .rows = 0, .columns = 0, .hf_stem = "", .gguf_stem = ""});
    if (t.shape.size() != 2) throw Error(path, t.name, "a matrix", detail::shape_text(t.shape));
    return t.shape[dimension];
  }

  /// The shapes say all but the number of heads, the context and the constants: those of the preset that has the shapes, whatever its vocabulary.
  any_llama guess() const {
    const index_t vocab = extent(Slot::embedding, -1, 0), hidden = extent(Slot::embedding, -1, 1);
    const index_t qkv = extent(Slot::q, 0, 0), ffn = extent(Slot::gate, 0, 0);
    int layers = 0;
    while (file_->find("transformer.h." + std::to_string(layers) + ".norm_1.weight")) ++layers;
    const TorchTensor *head = file_->find("lm_head.weight"), *embedding = file_->find("transformer.wte.weight");
    any_llama c;
    const bool found = presets::any([&]<class P>() {
      const index_t rows = P::hidden + 2 * static_cast<index_t>(P::kv_heads) * head_dim<P>();
      if (P::layers != layers || P::hidden != hidden || P::ffn != ffn || rows != qkv || vocab > std::numeric_limits<int>::max()) return false;
      c = describe<P>();
      return true;
    });
    if (!found)
      throw Error(path, "config", "lit_config.json beside the file, a config, or the shapes of a preset",
                  std::to_string(layers) + " layers, hidden " + std::to_string(hidden) + ", ffn " + std::to_string(ffn) + ", " + std::to_string(qkv) +
                      " rows of QKV");
    c.vocab = static_cast<int>(vocab);
    c.tied = !head || head->bytes.data() == embedding->bytes.data();
    return c;
  }

  std::shared_ptr<const TorchFile> file_;
  std::filesystem::path folder_;
  std::map<std::pair<int, Slot>, std::size_t> index_;
};

/// Whether a path ends as a file of torch.save does: in .pth, .pt or .ckpt.
inline bool has_torch_extension(const std::filesystem::path& path) {
  const std::string extension = path.extension().string();
  return extension == ".pth" || extension == ".pt" || extension == ".ckpt";
}

/// Whether there is something like a lit checkpoint: a folder with lit_model.pth, or a path that ends as a file of torch.save does.
inline bool is_lit(const std::filesystem::path& path) {
  std::error_code ignored;
  return std::filesystem::is_directory(path, ignored) ? std::filesystem::exists(path / "lit_model.pth", ignored) : has_torch_extension(path);
}

/// Opens a file of torch.save with a lit-gpt model of the Llama family, or a folder with lit_model.pth. The config is `config`; or that of
/// lit_config.json beside the file; or follows from the shapes where a preset has them. Reads no weight. Throws Error.
inline LitCheckpoint open_lit(const std::filesystem::path& path, std::optional<any_llama> config = std::nullopt) {
  namespace fs = std::filesystem;
  std::error_code ignored;
  const bool is_folder = fs::is_directory(path, ignored);
  const fs::path file = is_folder ? path / "lit_model.pth" : path;
  const fs::path folder = file.has_parent_path() ? file.parent_path() : fs::path(".");
  auto torch = std::make_shared<const TorchFile>(file);
  if (const fs::path json = folder / "lit_config.json"; !config && fs::exists(json, ignored)) {
    config = detail::parse_lit_config(detail::read_json(json), json.string());
    config->tied = !torch->find("lm_head.weight");  // the file has no word for it
  }
  return LitCheckpoint(std::move(torch), config, folder);
}

struct SaveLitOptions {
  Format format = Format::f32;                // f32, f16 or bf16
  std::string_view key = {};                  // "model": the form of a training checkpoint; empty: the tensors alone, as lit's converters write
  Progress progress = {};
};

/// Writes a model for lit-gpt: a path that ends in .pth, .pt or .ckpt becomes one file, any other a folder with lit_model.pth,
/// lit_config.json and the source's tokenizer files where it has such. A tied head is written out, since lit-gpt knows none. Throws Error.
template <ModelSource Source>
void save_lit(const Source& from, const std::filesystem::path& path, const SaveLitOptions& options = {}) {
  namespace fs = std::filesystem;
  const any_llama& c = from.config;
  const bool one_file = has_torch_extension(path);
  std::error_code error;
  if (!one_file) {
    fs::create_directories(path, error);
    if (!fs::is_directory(path)) throw Error(path.string(), "", "a folder that can be made", error ? error.message() : "a file");
  }
  std::vector<TorchTensorPlan> plan;
  std::vector<std::vector<Parameter>> parts;  // of each tensor: Q, K, V; or one
  std::uint64_t total = 0;
  std::vector<Parameter> parameters = detail::parameters_of(c);
  if (c.tied) parameters.push_back(Parameter(parameters.front()));
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    const Parameter& p = parameters[i];
    const bool tied_head = c.tied && i + 1 == parameters.size();
    total += static_cast<std::uint64_t>(p.rows) * row_bytes(options.format, p.columns);
    if (p.slot == Slot::k || p.slot == Slot::v) {
      plan.back().shape[0] += p.rows;
      parts.back().push_back(p);
      continue;
    }
    const std::vector<index_t> shape = p.role == Role::gain ? std::vector{p.columns} : std::vector{p.rows, p.columns};
    plan.push_back({tied_head ? "lm_head.weight" : detail::lit_name(p), options.format, shape});
    parts.push_back({p});
  }
  detail::RowCopier<Source> rows(from, total, options.progress);
  const auto content = [&](std::size_t i, auto& sink) {  // group by group its rows of Q, of K, of V
    const std::vector<Parameter>& part = parts[i];
    const index_t rounds = part.size() == 1 ? 1 : c.kv_heads;
    for (index_t g = 0; g < rounds; ++g)
      for (const Parameter& p : part) rows.copy(p, g * (p.rows / rounds), p.rows / rounds, options.format, RopeLayout::half, sink);
    for (const Parameter& p : part) from.release(from.tensor(p));
  };
  write_torch_file(one_file ? path : path / "lit_model.pth", plan, content, options.key);
  if (!one_file) {
    write_file_atomically(path / "lit_config.json", [&](FileWriter& file) { file.write(detail::lit_config_json(c)); });
    if (detail::has_companions(from)) detail::copy_companions(from.folder(), path);
  }
  rows.finish();
}

}  // namespace tinyllama
