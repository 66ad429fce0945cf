// config.json of a Llama-family model in Hugging Face layout, to a config and back.
#pragma once

#include <charconv>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <string_view>

#include "tinyllama/config/config.hpp"
#include "tinyllama/io/json.hpp"

namespace tinyllama {

namespace detail {

/// rope_theta and the linear factor; newer files hold both in "rope_parameters".
inline void read_rope(const JsonObject& o, std::string_view where, any_llama& c) {
  c.rope_base = static_cast<float>(o.number("rope_theta", 10000.0));
  for (const char* const key : {"rope_scaling", "rope_parameters"}) {
    const json* found = o.find(key);
    if (!found) continue;
    if (!found->is_object()) throw o.wrong(key, "an object");
    const JsonObject r(*found, where);
    c.rope_base = static_cast<float>(r.number("rope_theta", c.rope_base));
    const std::string type = r.string("rope_type", r.string("type", "default"));
    if (type == "linear") c.rope_scale = static_cast<float>(r.number("factor"));
    else if (type != "default") throw Error(where, key, "default or linear RoPE scaling", type);
  }
}

/// The shortest decimal that reads back as `x`: 1e-05, where the float's exact value would be 9.99999974e-06.
inline double shortest(float x) {
  char text[64];
  *std::to_chars(text, text + sizeof text - 1, x).ptr = '\0';
  return std::strtod(text, nullptr);
}

inline any_llama parse_config(const json& j, std::string_view where) {
  const JsonObject o(j, where);
  const auto only = [&](std::string_view key, bool holds, std::string_view expected) {
    if (!holds) throw o.wrong(key, expected);
  };
  const std::string type = o.string("model_type", "");
  only("model_type", type == "llama" || type == "mistral", "llama or mistral");
  only("hidden_act", o.string("hidden_act", "silu") == "silu", "silu");
  for (const char* const key : {"attention_bias", "mlp_bias"}) only(key, !o.boolean(key, false), "false: biases are not supported");
  if (const json* q = o.find("quantization_config")) {  // what its tensors are, their dtypes say
    const std::string method = q->is_object() ? JsonObject(*q, where).string("quant_method", "") : "";
    only("quantization_config", method == "compressed-tensors" || method == "fp8", "none, or 8-bit floats of compressed-tensors: of others use a GGUF file");
  }
  only("partial_rotary_factor", o.number("partial_rotary_factor", 1.0) == 1.0, "1");

  any_llama c;
  c.layers = o.integer("num_hidden_layers");
  c.hidden = o.integer("hidden_size");
  c.heads = o.integer("num_attention_heads");
  c.kv_heads = o.integer("num_key_value_heads", c.heads);
  c.ffn = o.integer("intermediate_size");
  c.vocab = o.integer("vocab_size");
  c.context = o.integer("max_position_embeddings", 2048);  // the fallbacks are LlamaConfig's
  c.norm_eps = static_cast<float>(o.number("rms_norm_eps", 1e-6));
  c.tied = o.boolean("tie_word_embeddings", false);
  read_rope(o, where, c);
  check(c, where);
  only("head_dim", o.integer("head_dim", head_dim(c)) == head_dim(c), "hidden_size / num_attention_heads = " + std::to_string(head_dim(c)));
  only("sliding_window", !o.find("sliding_window") || o.integer("sliding_window") >= c.context, "null or at least max_position_embeddings");
  return c;
}

}  // namespace detail

/// The config in a config.json. Throws Error naming the key that is missing, wrong or not supported.
inline any_llama read_config_json(const std::filesystem::path& path) { return detail::parse_config(detail::read_json(path), path.string()); }

/// The same from text; `where` is for messages.
inline any_llama parse_config_json(std::string_view text, std::string_view where = "config.json") {
  const detail::json j = detail::parse_json(text, where);
  if (!j.is_object()) throw Error(where, "JSON", "an object", std::string(j.type_name()));
  return detail::parse_config(j, where);
}

/// What else a config.json holds.
struct ConfigJsonOptions {
  std::string_view dtype = "float32";     // of the weights beside it: float32, float16, bfloat16
  std::int32_t bos = 1, eos = 2;
  bool e4m3 = false;                      // the matrices of the layers are f8_e4m3 with a scale a row, as compressed-tensors describes it
};

/// The text of a config.json that transformers reads.
inline std::string config_json(const any_llama& c, const ConfigJsonOptions& options = {}) {
  detail::json j;
  j["architectures"] = detail::json::array({"LlamaForCausalLM"});
  j["model_type"] = "llama";
  j["hidden_act"] = "silu";
  j["torch_dtype"] = options.dtype;
  j["attention_bias"] = false;
  j["mlp_bias"] = false;
  if (options.bos >= 0) j["bos_token_id"] = options.bos;
  if (options.eos >= 0) j["eos_token_id"] = options.eos;
  j["vocab_size"] = c.vocab;
  j["hidden_size"] = c.hidden;
  j["intermediate_size"] = c.ffn;
  j["num_hidden_layers"] = c.layers;
  j["num_attention_heads"] = c.heads;
  j["num_key_value_heads"] = c.kv_heads;
  j["head_dim"] = head_dim(c);
  j["max_position_embeddings"] = c.context;
  j["rms_norm_eps"] = detail::shortest(c.norm_eps);
  j["rope_theta"] = detail::shortest(c.rope_base);
  if (c.rope_scale != 1.0f) j["rope_scaling"] = {{"type", "linear"}, {"rope_type", "linear"}, {"factor", detail::shortest(c.rope_scale)}};  // both spellings are read
  j["tie_word_embeddings"] = c.tied;
  if (options.e4m3) {
    const auto eight = [](const char* strategy, bool dynamic) {
      return detail::json{{"num_bits", 8}, {"type", "float"}, {"symmetric", true}, {"strategy", strategy}, {"dynamic", dynamic}};
    };
    j["quantization_config"] = {{"quant_method", "compressed-tensors"}, {"format", "float-quantized"}, {"quantization_status", "compressed"}, {"ignore", {"lm_head"}},
                                {"config_groups", {{"group_0", {{"targets", {"Linear"}}, {"weights", eight("channel", false)}, {"input_activations", eight("token", true)}}}}}};
  }
  return j.dump(2) + "\n";
}

}  // namespace tinyllama
