// From a checkpoint on disk to a model on a device; the checkpoint's shape is checked against the config, or picks it.
#pragma once

#include <filesystem>

#include "tinyllama/io/checkpoint_tokenizer.hpp"
#include "tinyllama/model/model.hpp"

namespace tinyllama {

/// A model of config C from an open checkpoint. Error where the file's model is another: says which preset would fit.
template <Config C, Device D>
Model<C, D> load(D& dev, const Checkpoint& file, const LoadOptions& options = {}) {
  C config{};
  if constexpr (StaticConfig<C>) {
    if (!same_model(describe(config), file.config)) {
      const std::string_view fit = preset_name(file.config);
      const auto text = [](const any_llama& c) {
        return std::to_string(c.layers) + " layers, hidden " + std::to_string(c.hidden) + ", " + std::to_string(c.heads) + " heads, " + std::to_string(c.kv_heads) +
               " KV heads, ffn " + std::to_string(c.ffn) + ", vocab " + std::to_string(c.vocab) + (c.tied ? ", tied" : ", not tied") + ", rope base " +
               std::to_string(c.rope_base) + (c.rope_scale != 1.0f ? " scaled by " + std::to_string(c.rope_scale) : "") + ", norm eps " + std::to_string(c.norm_eps * 1e6f) + "e-6";
      };
      throw Error(file.path, "config", text(describe(config)), text(file.config) + (fit.empty() ? " (no preset fits: use any_llama)" : " (the preset " + std::string(fit) + " fits)"));
    }
  } else {
    config = file.config;
  }
  return Model<C, D>(Weights<C, D>::from(dev, config, file, options), options.tokenizer ? checkpoint_tokenizer(file) : std::nullopt);
}

/// The same from a GGUF file, a folder in Hugging Face layout, or a llama2.c checkpoint.
template <Config C, Device D>
Model<C, D> load(D& dev, const std::filesystem::path& path, const LoadOptions& options = {}) {
  return load<C>(dev, open_checkpoint(path), options);
}

/// Loads `file` as the preset that fits it, else as any_llama, and calls f(model): the run-time choice of a compile-time shape.
template <Device D, class F>
void load_any(D& dev, const Checkpoint& file, const LoadOptions& options, F&& f) {
  const bool found = presets::any([&]<class C>() {
    if (!same_model(describe<C>(), file.config) || C::context != file.config.context) return false;
    f(load<C>(dev, file, options));
    return true;
  });
  if (!found) f(load<any_llama>(dev, file, options));
}

/// The plan of this very file: the formats of its tensors.
template <class D = Cpu>
MemoryPlan memory_plan(const Checkpoint& file, const PlanOptions& options) {
  return memory_plan<D>(file.config, options, [&](const Parameter& p) { return file.tensor(p).format; });
}

}  // namespace tinyllama
