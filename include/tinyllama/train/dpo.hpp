// Direct preference optimization (arXiv 2305.18290): the better answer becomes likelier than the worse, compared with where the model began.
//
//   loss = -log sigmoid(beta ((log p(chosen) - log r(chosen)) - (log p(rejected) - log r(rejected)))),  r: the reference, as it was before
#pragma once

#include <array>
#include <cmath>
#include <span>
#include <vector>

#include "tinyllama/train/preferences.hpp"
#include "tinyllama/train/trainer.hpp"

namespace tinyllama {

/// Log-probabilities of a pair's answers.
struct PairLogProbabilities {
  float chosen = 0, rejected = 0;
};

/// What a step of DPO did, means over its pairs.
struct DpoReport {
  float loss = 0;
  float margin = 0;    ///< beta times the difference of the log-ratios
  float accuracy = 0;  ///< share of pairs whose margin is above 0
};

namespace detail {

/// A pair as a batch of two sequences.
struct PairBatch {
  std::vector<std::int32_t> inputs, targets;
  std::vector<Sequence> batch;
  explicit PairBatch(const PreferencePair& p) {
    for (const Sample* s : {&p.chosen, &p.rejected}) {
      batch.push_back({.first_row = static_cast<index_t>(inputs.size()), .tokens = s->tokens()});
      inputs.insert(inputs.end(), s->ids.begin(), s->ids.end());
      targets.insert(targets.end(), s->targets.begin(), s->targets.end());
    }
  }
  PairLogProbabilities of(std::span<const float> losses) const {
    const auto split = static_cast<std::size_t>(batch[1].first_row);
    double sums[2] = {0, 0};
    for (std::size_t i = 0; i < losses.size(); ++i) sums[i >= split] += static_cast<double>(losses[i]);
    return {static_cast<float>(-sums[0]), static_cast<float>(-sums[1])};
  }
};

}  // namespace detail

/// Log-probabilities under the trainer's present weights. Of the reference: call it before the first step.
template <Config C, class D>
PairLogProbabilities log_probabilities(Trainer<C, D>& trainer, const PreferencePair& pair) {
  const detail::PairBatch b(pair);
  return b.of(trainer.losses(b.inputs, b.targets, b.batch));
}

/// One optimizer step on some pairs; `reference`: what log_probabilities() gave for each before training. With peers each rank is given all pairs of the step, and
/// works on its own (fsdp: not supported). Throws Error where the two differ in number.
template <Config C, class D>
DpoReport dpo_step(Trainer<C, D>& trainer, std::span<const PreferencePair> pairs, std::span<const PairLogProbabilities> reference, float beta = 0.1f) {
  if (pairs.empty() || pairs.size() != reference.size())
    throw Error("dpo_step", "reference", std::to_string(pairs.size()) + ", one for each pair", std::to_string(reference.size()));
  Peers<D>* const peers = trainer.peers();
  if (trainer.sharding() == Sharding::fsdp) throw Error("dpo_step", "sharding", "ddp or zero1", "fsdp");
  const auto ranks = static_cast<std::size_t>(peers ? peers->ranks() : 1), rank = static_cast<std::size_t>(peers ? peers->rank() : 0);
  std::array<double, 3> sums{};  // loss, margin, accuracy
  std::vector<float> weights;
  const std::size_t first = pairs.size() * rank / ranks, last = pairs.size() * (rank + 1) / ranks;
  trainer.begin_step(static_cast<std::int64_t>(last - first));
  const float each = 1.0f / static_cast<float>(pairs.size());
  for (std::size_t i = first; i < last; ++i) {
    const detail::PairBatch b(pairs[i]);
    const PairLogProbabilities now = b.of(trainer.losses(b.inputs, b.targets, b.batch));
    const float z = beta * ((now.chosen - reference[i].chosen) - (now.rejected - reference[i].rejected));
    // -log sigmoid(z) and its derivative, without overflow.
    sums[0] += static_cast<double>(each * (z > 0 ? std::log1p(std::exp(-z)) : std::log1p(std::exp(z)) - z));
    sums[1] += static_cast<double>(each * z), sums[2] += z > 0 ? static_cast<double>(each) : 0.0;
    const float slope = each * beta / (1.0f + std::exp(z));  // of the loss by -log p(chosen); by that of the rejected its opposite
    weights.assign(b.inputs.size(), slope);
    std::fill(weights.begin() + b.batch[1].first_row, weights.end(), -slope);
    trainer.accumulate(b.inputs, b.targets, b.batch, std::span<const float>(weights));
  }
  std::int64_t counted = 0;
  for (const PreferencePair& p : pairs) counted += p.chosen.counted() + p.rejected.counted();
  trainer.end_step(counted);
  if (peers) peers->sum(sums);
  return {static_cast<float>(sums[0]), static_cast<float>(sums[1]), static_cast<float>(sums[2])};
}

}  // namespace tinyllama
