// A model with LoRA adapters to generate with: merged while it is loaded, whatever format the base has.
#pragma once

#include <filesystem>
#include <utility>
#include <vector>

#include "tinyllama/io/checkpoint_tokenizer.hpp"
#include "tinyllama/model/model.hpp"
#include "tinyllama/train/adapter_file.hpp"
#include "tinyllama/train/flat_model.hpp"
#include "tinyllama/train/merge.hpp"

namespace tinyllama {

/// The model of `file` with the adapters of a folder in PEFT's layout. Its weights are f32: rounding them again would lose what the adapters add.
/// Throws Error where the adapters are another model's.
template <Device D>
Model<any_llama, D> load_adapted(D& dev, const Checkpoint& file, const std::filesystem::path& adapters, const LoadOptions& options = {}) {
  const LoadedAdapters loaded = load_adapters(adapters, file.config);
  std::vector<float> weights(static_cast<std::size_t>(parameter_count(file.config)));
  read_flat(file, weights);
  if constexpr (D::host_memory) merge_adapters(dev, file.config, loaded.options, weights, loaded.flat);
  else merge_adapters(Cpu(), file.config, loaded.options, weights, loaded.flat);
  const FlatModel flat(file.config, weights);
  return Model<any_llama, D>(Weights<any_llama, D>::from(dev, file.config, FlatSource{flat}, options), options.tokenizer ? checkpoint_tokenizer(file) : std::nullopt);
}

}  // namespace tinyllama
