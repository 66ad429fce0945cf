// Command-line options that several of the programs take.
#pragma once

#if defined(TINYLLAMA_CUDA)
#include <tinyllama/cuda.hpp>
#else
#include <tinyllama/tinyllama.hpp>
#endif
#include <tinyllama/train/adapted.hpp>

#include <string>

#include "common.hpp"

namespace example {

struct ModelOptions {
  std::string path, adapter, packed, compute = "auto", cache = "f16", device = "cpu";
  int threads = 0;

  void add_to(CLI::App& app) {
#if defined(TINYLLAMA_CUDA)
    app.add_option("--device", device, "where it runs: cpu, cuda (bf16 between products), or cuda_f32")->check(CLI::IsMember({"cpu", "cuda", "cuda_f32"}));
#else
    app.add_option("--device", device, "where it runs: cpu (this program was built without CUDA)")->check(CLI::IsMember({"cpu"}));
#endif
    app.add_option("--model", path, "a GGUF file or a folder in Hugging Face layout")->required();
    app.add_option("--adapter", adapter, "a folder of LoRA adapters in PEFT's layout, added to the model");
    app.add_option("--packed", packed, "a file that keeps the packed weights: written at the first start, mapped at the next");
    app.add_option("--threads", threads, "threads; 0: one for each core")->check(CLI::NonNegativeNumber);
    app.add_option("--dtype", compute, "arithmetic of the matrix products: auto, f32, bf16 or int8 (block formats)")->check(CLI::IsMember({"auto", "f32", "bf16", "int8"}));
    app.add_option("--cache", cache, "format of the KV cache")->check(CLI::IsMember({"f32", "f16", "bf16", "f8_e4m3", "q8_0"}));
  }
  tinyllama::Compute compute_format() const {
    using tinyllama::Compute;
    return compute == "f32" ? Compute::f32 : compute == "bf16" ? Compute::bf16 : compute == "int8" ? Compute::int8 : Compute::automatic;
  }
  tinyllama::Format cache_format() const { return tinyllama::parse_format(cache); }
  tinyllama::LoadOptions load(bool quiet = false) const {
    return {.compute = compute_format(), .cache = cache_format(), .packed = packed, .progress = quiet ? std::function<void(std::size_t, std::size_t)>() : progress("loading")};
  }
};

namespace detail {
template <class D, class F>
void load_on(D& dev, const tinyllama::Checkpoint& file, const ModelOptions& m, const tinyllama::LoadOptions& options, F&& f) {
  if (!m.adapter.empty()) f(tinyllama::load_adapted(dev, file, m.adapter, options));
  else if constexpr (D::host_memory) tinyllama::load_any(dev, file, options, f);
  else f(tinyllama::load<tinyllama::any_llama>(dev, file, options));
}
}  // namespace detail

/// f(model) on the device that was asked for: on the CPU the preset that fits the file; with adapters, and on a card, whose kernels take sizes at run time, a
/// model of any shape.
template <class F>
void with_model(const tinyllama::Checkpoint& file, const ModelOptions& m, const tinyllama::LoadOptions& options, F&& f) {
  if (m.device == "cpu") {
    tinyllama::Cpu dev({.threads = m.threads, .kernels = nullptr});
    return detail::load_on(dev, file, m, options, f);
  }
#if defined(TINYLLAMA_CUDA)
  if (m.device == "cuda_f32") {
    tinyllama::CudaF32 dev;
    return detail::load_on(dev, file, m, options, f);
  }
  tinyllama::Cuda dev;
  detail::load_on(dev, file, m, options, f);
#endif
}

inline void add_generate_options(CLI::App& app, tinyllama::GenerateOptions& o) {
  app.add_option("--max-tokens", o.max_tokens, "tokens at most")->check(CLI::NonNegativeNumber)->capture_default_str();
  app.add_option("--temperature", o.temperature, "0: greedy")->capture_default_str();
  app.add_option("--top-k", o.top_k, "keep the k most probable; 0: all")->capture_default_str();
  app.add_option("--top-p", o.top_p, "keep the most probable whose sum reaches p")->capture_default_str();
  app.add_option("--min-p", o.min_p, "drop what is less probable than p times the best")->capture_default_str();
  app.add_option("--repetition-penalty", o.repetition_penalty)->capture_default_str();
  app.add_option("--presence-penalty", o.presence_penalty)->capture_default_str();
  app.add_option("--frequency-penalty", o.frequency_penalty)->capture_default_str();
  app.add_option("--seed", o.seed, "the same seed gives the same text")->capture_default_str();
  app.add_option("--stop", o.stop_strings, "end before this text (may be repeated)");
  app.add_option("--chunk", o.chunk, "tokens of a prefill step; 0: as many as suit the device")->check(CLI::NonNegativeNumber)->capture_default_str();
}

}  // namespace example
