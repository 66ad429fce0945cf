// Options and files that the training programs share.
#pragma once

#include <tinyllama/training.hpp>

#include <string>
#include <vector>

#include "common.hpp"

namespace example {

struct OptimizerOptions {
  tinyllama::TrainerOptions trainer;
  std::string decay = "matrices", precision = "bf16", checkpointing = "selective";
  std::vector<float> betas{0.9f, 0.95f};
  int threads = 0;

  void add_to(CLI::App& app) {
    app.add_option("--lr", trainer.peak_lr, "learning rate")->capture_default_str();
    app.add_option("--betas", betas, "AdamW's two averages")->delimiter(',')->expected(2);
    app.add_option("--eps", trainer.eps, "AdamW's epsilon")->capture_default_str();
    app.add_option("--weight-decay", trainer.weight_decay)->capture_default_str();
    app.add_option("--decay", decay, "what decays: matrices, or all (gains too)")->check(CLI::IsMember({"matrices", "all"}))->capture_default_str();
    app.add_option("--clip", trainer.clip, "of the gradient's global norm; 0: none")->capture_default_str();
    app.add_option("--precision", precision, "of the products: f32 or bf16")->check(CLI::IsMember({"f32", "bf16"}))->capture_default_str();
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
    o.precision = precision == "f32" ? Precision::f32 : Precision::bf16;
    o.checkpointing = checkpointing == "none" ? Checkpointing::none : checkpointing == "layer" ? Checkpointing::layer : Checkpointing::selective;
    return o;
  }
};

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
