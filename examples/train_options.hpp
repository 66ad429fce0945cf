// Options and files that the training programs share.
#pragma once

#if defined(TINYLLAMA_CUDA)
#include <tinyllama/cuda_training.hpp>
#else
#include <tinyllama/training.hpp>
#endif

#include <string>
#include <vector>

#include "ranks.hpp"

namespace example {

struct OptimizerOptions {
  tinyllama::TrainerOptions trainer;
  std::string device = "cpu", decay = "matrices", precision = "bf16", moments = "f32", checkpointing = "selective";
  std::vector<float> betas{0.9f, 0.95f};
  int threads = 0;

  void add_to(CLI::App& app) {
#if defined(TINYLLAMA_CUDA)
    app.add_option("--device", device, "where it runs: cpu or cuda")->check(CLI::IsMember({"cpu", "cuda"}))->capture_default_str();
#else
    app.add_option("--device", device, "where it runs: cpu (this program was built without CUDA)")->check(CLI::IsMember({"cpu"}));
#endif
    app.add_option("--lr", trainer.peak_lr, "learning rate")->capture_default_str();
    app.add_option("--betas", betas, "AdamW's two averages")->delimiter(',')->expected(2);
    app.add_option("--eps", trainer.eps, "AdamW's epsilon")->capture_default_str();
    app.add_option("--weight-decay", trainer.weight_decay)->capture_default_str();
    app.add_option("--decay", decay, "what decays: matrices, or all (gains too)")->check(CLI::IsMember({"matrices", "all"}))->capture_default_str();
    app.add_option("--clip", trainer.clip, "of the gradient's global norm; 0: none")->capture_default_str();
    app.add_option("--precision", precision, "of the products: f32 or bf16; on a card fp8 too")->check(CLI::IsMember({"f32", "bf16", "fp8"}))->capture_default_str();
    app.add_option("--moments", moments, "how AdamW's averages are stored: f32, bf16 (half the memory) or int8 (a quarter)")->check(CLI::IsMember({"f32", "bf16", "int8"}))->capture_default_str();
    app.add_option("--checkpointing", checkpointing, "what backward computes again: none, selective or layer")
        ->check(CLI::IsMember({"none", "selective", "layer"}))->capture_default_str();
    app.add_option("--seed", trainer.seed)->capture_default_str();
    app.add_option("--threads", threads, "threads; 0: one for each core")->check(CLI::NonNegativeNumber);
  }
  tinyllama::TrainerOptions parsed() const {
    using namespace tinyllama;
    TrainerOptions o = trainer;
    o.beta1 = betas[0], o.beta2 = betas[1];
    o.decay = decay == "all" ? WeightDecay::all : WeightDecay::matrices;
    o.precision = precision == "f32" ? Precision::f32 : precision == "bf16" ? Precision::bf16 : Precision::fp8;
    for (const MomentFormat& f : moment_formats)
      if (f.name == moments) o.moments = f.moments;
    o.checkpointing = checkpointing == "none" ? Checkpointing::none : checkpointing == "layer" ? Checkpointing::layer : Checkpointing::selective;
    return o;
  }

  /// f(dev) on this rank's device, in the precision that was asked for.
  template <class F>
  void with_device(const Ranks& ranks, F&& f) const {
    if (device == "cpu") {
      tinyllama::Cpu dev({.threads = ranks.threads(threads), .kernels = nullptr});
      return f(dev);
    }
#if defined(TINYLLAMA_CUDA)
    const int card = ranks.card(tinyllama::cuda::card_count());
    if (precision == "f32") {
      tinyllama::CudaF32 dev({.card = card});
      return f(dev);
    }
    tinyllama::Cuda dev({.card = card});
    f(dev);
#endif
  }
};

/// "avx512" or the card's name; and threads, 0 on a card.
template <class D>
std::string instruction_set(const D& dev) {
  if constexpr (requires { dev.instruction_set(); }) return std::string(dev.instruction_set());
  else return dev.name();
}
template <class D>
int threads_of(const D& dev) {
  if constexpr (requires { dev.threads(); }) return dev.threads();
  else return 0;
}

/// The most memory that was in use: of the device, or where that is the host's of the process.
template <class D>
std::size_t peak_bytes(const D& dev) {
  if constexpr (requires { dev.most_bytes_in_use(); }) return dev.most_bytes_in_use();
  else return status_bytes("VmHWM");
}

/// A flat array in the order of for_each_parameter as tensors under their Hugging Face names.
inline void write_parameters(const std::filesystem::path& path, const tinyllama::any_llama& c, std::span<const float> values) {
  std::vector<tinyllama::SafeTensor> tensors;
  tinyllama::for_each_parameter(c, [&](const tinyllama::Parameter& p) {
    const auto part = values.first(static_cast<std::size_t>(p.size()));
    values = values.subspan(part.size());
    tinyllama::SafeTensor t{p.hf_name(), "F32", {p.rows, p.columns}, std::as_bytes(part)};
    if (p.role == tinyllama::Role::gain) t.shape = {p.columns};
    tensors.push_back(std::move(t));
  });
  tinyllama::write_safetensors(path, tensors);
}

}  // namespace example
