// The one list of a model's tensors: name, shape, role. Counting, loading, saving, initialising and optimizing visit it.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "tinyllama/config/presets.hpp"

namespace tinyllama {

enum class Role : std::uint8_t { embedding, gain, linear, head };

/// The tensors of a model, by what they are. `embedding`, `final_norm` and `head` stand outside the layers.
enum class Slot : std::uint8_t { embedding, attn_norm, q, k, v, o, ffn_norm, gate, up, down, final_norm, head };

/// One tensor: [rows, columns], or [columns] for a gain (rows = 1).
struct Parameter {
  Slot slot;
  Role role;
  int layer;                          // -1 outside the layers
  index_t rows, columns;
  std::string_view hf_stem, gguf_stem;  // the part of the name after the layer's prefix, without ".weight"
  constexpr index_t size() const { return rows * columns; }

  /// Hugging Face's name: "model.layers.3.self_attn.q_proj.weight".
  std::string hf_name() const {
    return (layer < 0 ? "" : "model.layers." + std::to_string(layer) + ".") + std::string(hf_stem) + ".weight";
  }
  /// GGUF's name: "blk.3.attn_q.weight".
  std::string gguf_name() const { return (layer < 0 ? "" : "blk." + std::to_string(layer) + ".") + std::string(gguf_stem) + ".weight"; }
};

/// Calls f(Parameter) for every tensor, in the order in which a token meets them. A tied head is no tensor of its own.
template <Config C, class F>
constexpr void for_each_parameter(const C& c, F&& f) {
  const index_t d = c.hidden, kv = static_cast<index_t>(c.kv_heads) * head_dim(c), n = c.ffn, vocab = c.vocab;
  f(Parameter{Slot::embedding, Role::embedding, -1, vocab, d, "model.embed_tokens", "token_embd"});
  for (int l = 0; l < c.layers; ++l) {
    f(Parameter{Slot::attn_norm, Role::gain, l, 1, d, "input_layernorm", "attn_norm"});
    f(Parameter{Slot::q, Role::linear, l, d, d, "self_attn.q_proj", "attn_q"});
    f(Parameter{Slot::k, Role::linear, l, kv, d, "self_attn.k_proj", "attn_k"});
    f(Parameter{Slot::v, Role::linear, l, kv, d, "self_attn.v_proj", "attn_v"});
    f(Parameter{Slot::o, Role::linear, l, d, d, "self_attn.o_proj", "attn_output"});
    f(Parameter{Slot::ffn_norm, Role::gain, l, 1, d, "post_attention_layernorm", "ffn_norm"});
    f(Parameter{Slot::gate, Role::linear, l, n, d, "mlp.gate_proj", "ffn_gate"});
    f(Parameter{Slot::up, Role::linear, l, n, d, "mlp.up_proj", "ffn_up"});
    f(Parameter{Slot::down, Role::linear, l, d, n, "mlp.down_proj", "ffn_down"});
  }
  f(Parameter{Slot::final_norm, Role::gain, -1, 1, d, "model.norm", "output_norm"});
  if (!c.tied) f(Parameter{Slot::head, Role::head, -1, vocab, d, "lm_head", "output"});
}

/// Number of weights.
template <Config C>
constexpr std::int64_t parameter_count(const C& c) {
  std::int64_t n = 0;
  for_each_parameter(c, [&](const Parameter& p) { n += p.size(); });
  return n;
}
template <StaticConfig C>
inline constexpr std::int64_t parameter_count_v = parameter_count(C{});
template <StaticConfig C>
constexpr std::int64_t parameter_count() { return parameter_count_v<C>; }

/// Number of tensors in a checkpoint.
template <Config C>
constexpr int tensor_count(const C& c = {}) {
  int n = 0;
  for_each_parameter(c, [&](const Parameter&) { ++n; });
  return n;
}

/// Weights that a token is multiplied with: all matrices but the embedding look-up; a tied head counts once, as the head.
template <Config C>
constexpr std::int64_t matmul_parameter_count(const C& c = {}) {
  std::int64_t n = c.tied ? static_cast<std::int64_t>(c.vocab) * c.hidden : 0;
  for_each_parameter(c, [&](const Parameter& p) { n += p.role == Role::linear || p.role == Role::head ? p.size() : 0; });
  return n;
}

/// FLOPs of one training token by the paper's convention: 6 N_matmul + 12 layers hidden context.
template <Config C>
constexpr std::int64_t training_flops_per_token(const C& c = {}) {
  return 6 * matmul_parameter_count(c) + std::int64_t{12} * c.layers * c.hidden * c.context;
}

/// FLOPs of one generated token at `position` tokens of context: 2 N_matmul + 4 layers hidden position.
template <Config C>
constexpr std::int64_t inference_flops_per_token(const C& c, std::int64_t position) {
  return 2 * matmul_parameter_count(c) + std::int64_t{4} * c.layers * c.hidden * position;
}

static_assert(parameter_count<tinyllama_1b>() == 1'100'048'384 && tensor_count<tinyllama_1b>() == 201);
static_assert(parameter_count<smollm2_135m>() == 134'515'008 && tensor_count<smollm2_135m>() == 272);
static_assert(matmul_parameter_count<tinyllama_1b>() == 1'034'420'224);

}  // namespace tinyllama
