// The shapes that have names (arXiv 2401.02385; model cards of SmolLM2; llama2.c's stories).
#pragma once

#include <string_view>

#include "tinyllama/config/config.hpp"

namespace tinyllama {

struct tinyllama_1b : llama_defaults {
  static constexpr std::string_view name = "tinyllama_1b";
  static constexpr int layers = 22, hidden = 2048, heads = 32, kv_heads = 4, ffn = 5632, vocab = 32000, context = 2048;
};

struct tinyllama_120m : llama_defaults {
  static constexpr std::string_view name = "tinyllama_120m";
  static constexpr int layers = 12, hidden = 768, heads = 12, kv_heads = 1, ffn = 2048, vocab = 32000, context = 2048;
};

/// Context 8192 through linear position interpolation.
struct code_tinyllama_1b : tinyllama_1b {
  static constexpr std::string_view name = "code_tinyllama_1b";
  static constexpr int context = 8192;
  static constexpr float rope_scale = 4.0f;
};

struct smollm2_135m : llama_defaults {
  static constexpr std::string_view name = "smollm2_135m";
  static constexpr int layers = 30, hidden = 576, heads = 9, kv_heads = 3, ffn = 1536, vocab = 49152, context = 8192;
  static constexpr float rope_base = 100000.0f;
  static constexpr bool tied = true;
};

struct stories_260k : llama_defaults {
  static constexpr std::string_view name = "stories_260k";
  static constexpr int layers = 5, hidden = 64, heads = 8, kv_heads = 4, ffn = 172, vocab = 512, context = 512;
  static constexpr bool tied = true;
};

struct stories_15m : llama_defaults {
  static constexpr std::string_view name = "stories_15m";
  static constexpr int layers = 6, hidden = 288, heads = 6, kv_heads = 6, ffn = 768, vocab = 32000, context = 256;
  static constexpr bool tied = true;
};

template <class... C>
struct preset_list {
  /// Calls `f.template operator()<C>()` for each preset until one call returns true; returns whether one did.
  template <class F>
  static constexpr bool any(F&& f) { return (f.template operator()<C>() || ...); }
};

/// The list of presets: a new one is added here. FIRST(preset), then OTHER(preset) for each of the rest.
#define TINYLLAMA_PRESETS(FIRST, OTHER) \
  FIRST(tinyllama_1b) OTHER(tinyllama_120m) OTHER(code_tinyllama_1b) OTHER(smollm2_135m) OTHER(stories_260k) OTHER(stories_15m)

#define TINYLLAMA_FIRST(C) C
#define TINYLLAMA_OTHER(C) , C
using presets = preset_list<TINYLLAMA_PRESETS(TINYLLAMA_FIRST, TINYLLAMA_OTHER)>;
#undef TINYLLAMA_FIRST
#undef TINYLLAMA_OTHER

/// Whether tensors of one shape fit the other: context and constants of the positions may differ, as they do between fine-tunes.
constexpr bool same_shape(const any_llama& a, const any_llama& b) {
  return a.layers == b.layers && a.hidden == b.hidden && a.heads == b.heads && a.kv_heads == b.kv_heads && a.ffn == b.ffn && a.vocab == b.vocab && a.tied == b.tied;
}

/// Whether the file's model computes what the config's does: shape, norm and positions (to f32 rounding); the context length may differ.
constexpr bool same_model(const any_llama& a, const any_llama& b) {
  const auto near = [](float x, float y) { return (x > y ? x - y : y - x) <= 1e-4f * (x > 0 ? x : -x); };
  return same_shape(a, b) && near(a.norm_eps, b.norm_eps) && near(a.rope_base, b.rope_base) && near(a.rope_scale, b.rope_scale);
}

/// Name of the preset that computes the same, or "" where none does.
constexpr std::string_view preset_name(const any_llama& c) {
  std::string_view found;
  presets::any([&]<class C>() {
    if (!same_model(describe<C>(), c)) return false;
    found = C::name;
    return true;
  });
  return found;
}

}  // namespace tinyllama
