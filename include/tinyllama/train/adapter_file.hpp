// LoRA adapters in PEFT's layout: adapter_config.json and adapter_model.safetensors.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <initializer_list>
#include <map>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "tinyllama/config/parameters.hpp"
#include "tinyllama/io/config_json.hpp"
#include "tinyllama/io/file.hpp"
#include "tinyllama/io/json.hpp"
#include "tinyllama/io/safetensors.hpp"
#include "tinyllama/quant/codec.hpp"
#include "tinyllama/train/adapters.hpp"

namespace tinyllama {

namespace detail {

/// "q_proj" of "self_attn.q_proj".
inline std::string_view module_of(std::string_view hf_stem) { return hf_stem.substr(hf_stem.rfind('.') + 1); }

/// PEFT's names: "base_model.model." before the module's, without ".weight".
inline std::string adapter_name(const Parameter& p, char which) {
  std::string name = "base_model.model." + p.hf_name();
  name.resize(name.size() - std::string_view(".weight").size());
  return name + ".lora_" + which + ".weight";
}

/// The matrices that target_modules names, as PEFT matches them: by the last parts of a name, "q_proj" or "self_attn.q_proj", or by all of it, as it
/// writes all-linear down. Throws Error for a module that has no adapter here, and where a matrix is named in some layers only.
inline AdapterSlots slots_of(const json& modules, const any_llama& c, std::string_view where) {
  std::map<std::string, std::pair<Slot, bool>, std::less<>> known;  // and whether it is one layer's
  for_each_parameter(c, [&](const Parameter& p) {
    if (p.role != Role::linear) return;
    const std::string whole = p.hf_name();
    known.emplace(module_of(p.hf_stem), std::pair{p.slot, false});
    known.emplace(p.hf_stem, std::pair{p.slot, false});
    known.emplace(whole.substr(0, whole.size() - std::string_view(".weight").size()), std::pair{p.slot, true});
  });
  AdapterSlots slots;
  std::map<Slot, std::set<std::string>> by_layer;
  for (const json& m : modules) {
    const auto it = m.is_string() ? known.find(m.get<std::string>()) : known.end();
    if (it == known.end()) throw Error(where, "target_modules", "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj or down_proj", json_text(m));
    if (it->second.second) by_layer[it->second.first].insert(it->first);
    else slots.add(it->second.first);
  }
  for (const auto& [slot, names] : by_layer) {
    if (!slots.contains(slot) && std::cmp_not_equal(names.size(), c.layers))
      throw Error(where, "target_modules", "a matrix in all " + std::to_string(c.layers) + " layers or in none",
                  std::to_string(names.size()) + " with " + *names.begin());
    slots.add(slot);
  }
  return slots;
}

/// Throws Error where a key asks for what is not supported; what these keys say by default changes nothing.
inline void check_adapter_extras(const json& j, const JsonObject& o, std::string_view where) {
  const auto only = [&](std::string_view key, bool ok, const std::string& expected) {
    if (!ok) throw Error(where, key, expected, json_text(*o.find(key)) + " (not supported)");
  };
  only("bias", o.string("bias", "none") == "none", "none");
  for (const char* key : {"fan_in_fan_out", "use_dora", "use_rslora", "lora_bias", "use_qalora"}) only(key, !o.boolean(key, false), "false");
  // These change the model, or which matrices are adapted, where they are not empty: null, [] and {}.
  for (const char* key : {"rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform", "layer_replication", "exclude_modules",
                          "target_parameters", "trainable_token_indices", "megatron_config", "alora_invocation_tokens", "arrow_config", "kasa_config",
                          "velora_config", "monteclora_config", "use_bdlora"}) {
    const auto it = j.find(key);
    only(key, it == j.end() || it->empty(), "nothing");
  }
  // PiSSA, OLoRA, CorDA, LoftQ and their like change the base model's own weights at the start; these begin with A alone.
  const json* init = o.find("init_lora_weights");
  only("init_lora_weights", !init || init->is_boolean() || *init == "gaussian" || *init == "eva" || *init == "orthogonal",
       "true, false, gaussian, eva or orthogonal");
}

inline LoraOptions parse_adapter_config(const json& j, const any_llama& c, std::string_view where) {
  const JsonObject o(j, where);
  if (o.string("peft_type", "") != "LORA") throw o.wrong("peft_type", "LORA");
  if (const std::string task = o.string("task_type", "CAUSAL_LM"); task != "CAUSAL_LM") throw o.wrong("task_type", "CAUSAL_LM");
  check_adapter_extras(j, o, where);
  LoraOptions out;
  out.rank = o.integer("r");
  out.alpha = static_cast<float>(o.number("lora_alpha"));
  out.dropout = static_cast<float>(o.number("lora_dropout", 0.0));
  const json* modules = o.find("target_modules");
  if (modules && modules->is_string() && *modules == "all-linear") out.slots = AdapterSlots::every();
  else if (modules && modules->is_array()) out.slots = slots_of(*modules, c, where);
  else throw o.wrong("target_modules", "a list of modules, or all-linear");
  return out;
}

inline json adapter_config_json(const LoraOptions& options, std::string_view base) {
  json modules = json::array();
  for_each_parameter(any_llama{.layers = 1}, [&](const Parameter& p) {
    if (options.slots.contains(p.slot)) modules.push_back(module_of(p.hf_stem));
  });
  json j = {{"peft_type", "LORA"},           {"task_type", "CAUSAL_LM"},      {"r", options.rank},           {"bias", "none"},
            {"fan_in_fan_out", false},       {"inference_mode", true},        {"init_lora_weights", true},   {"use_rslora", false},
            {"use_dora", false},             {"modules_to_save", nullptr},    {"rank_pattern", json::object()}, {"alpha_pattern", json::object()},
            {"layers_to_transform", nullptr}, {"layers_pattern", nullptr},    {"revision", nullptr},         {"auto_mapping", nullptr}};
  j["base_model_name_or_path"] = base.empty() ? json(nullptr) : json(base);
  j["target_modules"] = std::move(modules);
  // PEFT declares alpha an integer.
  if (options.alpha == std::floor(options.alpha) && options.alpha < 1e9f) j["lora_alpha"] = static_cast<std::int64_t>(options.alpha);
  else j["lora_alpha"] = shortest(options.alpha);
  j["lora_dropout"] = shortest(options.dropout);
  return j;
}

}  // namespace detail

/// Writes `flat`, the array of for_each_adapter, as PEFT's folder: adapter_config.json and adapter_model.safetensors in f32, so that PEFT and what
/// reads its files can use it. `base` names the model that the adapters belong to. Each file appears when it is complete, the tensors first.
/// Throws Error for a wrong length and for a place that cannot be written.
template <Config C>
void save_adapters(const std::filesystem::path& folder, const C& c, const LoraOptions& options, std::span<const float> flat,
                   std::string_view base = "") {
  check(options, c, folder.string());
  if (static_cast<std::int64_t>(flat.size()) != adapter_parameter_count(c, options))
    throw Error(folder.string(), "adapters", std::to_string(adapter_parameter_count(c, options)) + " weights", std::to_string(flat.size()));
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) throw Error(folder.string(), "", "a folder that can be made", error.message());
  std::vector<SafeTensor> tensors;
  const auto add = [&](const Parameter& p, char which, index_t offset, index_t rows, index_t columns) {
    const auto part = flat.subspan(static_cast<std::size_t>(offset), static_cast<std::size_t>(rows * columns));
    tensors.push_back({detail::adapter_name(p, which), "F32", {rows, columns}, std::as_bytes(part)});
  };
  for_each_adapter(c, options, [&](const Adapter& a) {
    add(a.target, 'A', a.a, a.rank, a.target.columns);
    add(a.target, 'B', a.b, a.target.rows, a.rank);
  });
  write_safetensors(folder / "adapter_model.safetensors", tensors);
  const std::string text = detail::adapter_config_json(options, base).dump(2) + "\n";
  write_file_atomically(folder / "adapter_config.json", [&](FileWriter& file) { file.write(text); });
}

/// Adapters as read: their options, the flat array of for_each_adapter, and the name of their base model ("" where the file has none).
struct LoadedAdapters {
  LoraOptions options;
  std::vector<float> flat;
  std::string base;
};

/// Reads PEFT's folder; tensors may be f32, f16 or bf16. Throws Error naming file and key or tensor where the adapters are not for this config, are
/// damaged, incomplete or more than the config says, or ask for what is not supported (DoRA, rsLoRA, ranks that differ, biases).
template <Config C>
LoadedAdapters load_adapters(const std::filesystem::path& folder, const C& c) {
  const std::filesystem::path config = folder / "adapter_config.json";
  const detail::json j = detail::read_json(config);
  LoadedAdapters out;
  out.options = detail::parse_adapter_config(j, describe(c), config.string());
  out.base = detail::JsonObject(j, config.string()).string("base_model_name_or_path", "");
  check(out.options, c, config.string());

  const Safetensors file(folder / "adapter_model.safetensors");
  out.flat.resize(static_cast<std::size_t>(adapter_parameter_count(c, out.options)));
  std::vector<std::string> names;
  const auto read = [&](const Parameter& p, char which, index_t offset, index_t rows, index_t columns) {
    names.push_back(detail::adapter_name(p, which));
    const std::array shape{rows, columns};
    const SafeTensor* t = file.find(names.back());
    if (!t) throw Error(file.name(), names.back(), "a tensor of shape " + detail::shape_text(shape), "none");
    if (!std::equal(shape.begin(), shape.end(), t->shape.begin(), t->shape.end()))
      throw Error(file.name(), t->name, detail::shape_text(shape), detail::shape_text(t->shape));
    decode_row(file.format(*t), t->bytes.data(), out.flat.data() + offset, rows * columns);
  };
  for_each_adapter(c, out.options, [&](const Adapter& a) {
    read(a.target, 'A', a.a, a.rank, a.target.columns);
    read(a.target, 'B', a.b, a.target.rows, a.rank);
  });
  std::sort(names.begin(), names.end());
  for (const SafeTensor& t : file.tensors())
    if (!std::binary_search(names.begin(), names.end(), t.name))
      throw Error(file.name(), t.name, "only adapters of the target modules, in " + std::to_string(static_cast<int>(c.layers)) + " layers",
                  "this one");
  return out;
}

}  // namespace tinyllama
