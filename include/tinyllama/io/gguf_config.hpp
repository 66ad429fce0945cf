// The config in a GGUF file's metadata.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>

#include "tinyllama/config/parameters.hpp"
#include "tinyllama/io/gguf.hpp"

namespace tinyllama::detail {

/// A parameter outside the layers, for its names.
inline Parameter outer_parameter(Slot slot) {
  std::optional<Parameter> found;
  for_each_parameter(any_llama{}, [&](const Parameter& p) {
    if (p.slot == slot) found = p;
  });
  return *found;
}

/// The config in a GGUF file's metadata. Throws Error naming the key that is missing, wrong or not supported.
inline any_llama gguf_config(const Gguf& g) {
  const auto refuse = [&](std::string_view key, std::string_view expected, std::string_view found) { return Error(g.name(), key, expected, found); };
  const std::string architecture = g.get_string("general.architecture").value_or("nothing");
  if (architecture != "llama") throw refuse("general.architecture", "llama", architecture);
  const auto integer = [&](const char* key, std::optional<int> fallback = std::nullopt) {
    const auto v = g.get_uint(key);
    if (!v && fallback) return *fallback;
    if (!v) throw refuse(key, "an integer", "nothing");
    if (*v > static_cast<std::uint64_t>(std::numeric_limits<int>::max())) throw refuse(key, "a 32-bit integer", std::to_string(*v));
    return static_cast<int>(*v);
  };
  any_llama c;
  c.layers = integer("llama.block_count");
  c.hidden = integer("llama.embedding_length");
  c.heads = integer("llama.attention.head_count");
  c.kv_heads = integer("llama.attention.head_count_kv", c.heads);
  c.ffn = integer("llama.feed_forward_length");
  c.context = integer("llama.context_length");
  const auto eps = g.get_float("llama.attention.layer_norm_rms_epsilon");
  if (!eps) throw refuse("llama.attention.layer_norm_rms_epsilon", "a number", "nothing");
  c.norm_eps = static_cast<float>(*eps);
  c.rope_base = static_cast<float>(g.get_float("llama.rope.freq_base").value_or(10000.0));
  const std::string scaling = g.get_string("llama.rope.scaling.type").value_or("linear");
  if (scaling == "linear") c.rope_scale = static_cast<float>(g.get_float("llama.rope.scaling.factor").value_or(g.get_float("llama.rope.scale_linear").value_or(1.0)));
  else if (scaling != "none") throw refuse("llama.rope.scaling.type", "none or linear", scaling);
  if (c.rope_scale == 0) c.rope_scale = 1;  // llama.cpp writes 0 for "not given"

  const std::string embedding = outer_parameter(Slot::embedding).gguf_name();
  const GgufTensor* e = g.find(embedding);
  if (!e || e->dims.size() != 2) throw refuse(embedding, "a tensor of shape [vocab, " + std::to_string(c.hidden) + "]", e ? "another rank" : "none");
  c.vocab = static_cast<int>(std::min<index_t>(e->dims[1], std::numeric_limits<int>::max()));
  c.tied = !g.find(outer_parameter(Slot::head).gguf_name());
  check(c, g.name());

  for (const char* const key : {"llama.attention.key_length", "llama.attention.value_length", "llama.rope.dimension_count"})
    if (const int d = integer(key, head_dim(c)); d != head_dim(c)) throw refuse(key, "hidden / heads = " + std::to_string(head_dim(c)), std::to_string(d));
  if (const int n = integer("llama.expert_count", 0)) throw refuse("llama.expert_count", "0", std::to_string(n));
  if (const int n = integer("split.count", 1); n > 1) throw refuse("split.count", "a file in one piece (join it with gguf-split)", std::to_string(n));
  return c;
}

}  // namespace tinyllama::detail
