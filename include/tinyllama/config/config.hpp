// What a model is: a config is a type with static constexpr members; `any_llama` is the same with values known at run time.
#pragma once

#include <concepts>
#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>

#include "tinyllama/tensor/view.hpp"

namespace tinyllama {

/// The members that every config has. Code reads them through an object (`c.hidden`), so that they may be static constexpr or not.
template <class C>
concept Config = requires(const C& c) {
  { c.layers } -> std::convertible_to<int>;
  { c.hidden } -> std::convertible_to<int>;
  { c.heads } -> std::convertible_to<int>;
  { c.kv_heads } -> std::convertible_to<int>;   // "KV groups" in the paper
  { c.ffn } -> std::convertible_to<int>;
  { c.vocab } -> std::convertible_to<int>;
  { c.context } -> std::convertible_to<int>;
  { c.norm_eps } -> std::convertible_to<float>;
  { c.rope_base } -> std::convertible_to<float>;
  { c.rope_scale } -> std::convertible_to<float>;  // linear position interpolation: positions are divided by it
  { c.tied } -> std::convertible_to<bool>;         // the output head is the embedding
};

/// A config whose shape is a compile-time constant.
template <class C>
concept StaticConfig = Config<C> && std::is_pointer_v<decltype(&C::hidden)>;  // of a member that is not static, this is a pointer to member

/// What one gets by not saying otherwise: the paper's choices.
struct llama_defaults {
  static constexpr float norm_eps = 1e-5f, rope_base = 10000.0f, rope_scale = 1.0f;
  static constexpr bool tied = false;
};

/// Elements of a head.
template <Config C>
constexpr int head_dim(const C& c = {}) { return c.hidden / c.heads; }

/// A shape that is known at run time only, as read from a file. Everything that takes a config takes it too; its extents are `dyn`.
struct any_llama {
  int layers = 0, hidden = 0, heads = 1, kv_heads = 1, ffn = 0, vocab = 0, context = 0;
  float norm_eps = 1e-5f, rope_base = 10000.0f, rope_scale = 1.0f;
  bool tied = false;
  bool operator==(const any_llama&) const = default;
};

/// The same numbers as values.
template <Config C>
constexpr any_llama describe(const C& c = {}) {
  return {c.layers, c.hidden, c.heads, c.kv_heads, c.ffn, c.vocab, c.context, c.norm_eps, c.rope_base, c.rope_scale, c.tied};
}

/// Extents for View: static where the config is.
template <Config C>
struct extents {
  static constexpr index_t hidden = dyn, ffn = dyn, vocab = dyn, q = dyn, kv = dyn, qkv = dyn, gate_up = dyn;
};
template <StaticConfig C>
struct extents<C> {
  static constexpr index_t hidden = C::hidden, ffn = C::ffn, vocab = C::vocab;
  static constexpr index_t q = C::hidden, kv = C::kv_heads * (C::hidden / C::heads), qkv = q + 2 * kv, gate_up = 2 * C::ffn;
  static_assert(C::layers > 0 && C::hidden > 0 && C::ffn > 0 && C::vocab > 0 && C::context > 0, "config: every size is positive");
  static_assert(C::hidden % C::heads == 0, "config: heads divides hidden");
  static_assert(C::heads % C::kv_heads == 0, "config: kv_heads divides heads");
  static_assert((C::hidden / C::heads) % 2 == 0, "config: rope needs an even head dimension");
};

/// Throws Error where a run-time shape could not be a model. `where` names the file.
inline void check(const any_llama& c, std::string_view where) {
  const auto positive = [&](std::string_view key, int v, int most) {
    if (v <= 0 || v > most) throw Error(where, key, "between 1 and " + std::to_string(most), std::to_string(v));
  };
  positive("layers", c.layers, 1024);
  positive("hidden", c.hidden, 1 << 17);
  positive("heads", c.heads, 4096);
  positive("kv_heads", c.kv_heads, 4096);
  positive("ffn", c.ffn, 1 << 20);
  positive("vocab", c.vocab, 1 << 22);
  positive("context", c.context, 1 << 26);
  if (c.hidden % c.heads) throw Error(where, "heads", "a divisor of hidden = " + std::to_string(c.hidden), std::to_string(c.heads));
  if (c.heads % c.kv_heads) throw Error(where, "kv_heads", "a divisor of heads = " + std::to_string(c.heads), std::to_string(c.kv_heads));
  if (c.hidden / c.heads % 2) throw Error(where, "head dimension", "an even number", std::to_string(c.hidden / c.heads));
  if (!(c.norm_eps > 0 && c.norm_eps < 1)) throw Error(where, "norm_eps", "between 0 and 1", std::to_string(c.norm_eps));
  if (!(c.rope_base > 1 && c.rope_base < 1e12f)) throw Error(where, "rope_base", "above 1", std::to_string(c.rope_base));
  if (!(c.rope_scale > 0 && c.rope_scale < 1e6f)) throw Error(where, "rope_scale", "above 0", std::to_string(c.rope_scale));
}

}  // namespace tinyllama
