// Bytes that training needs, as constants: weights, gradients, moments, activations, scratch.
#pragma once

#include <algorithm>

#include "tinyllama/model/training_activations.hpp"

namespace tinyllama {

/// In what the products of training multiply; sums, weights, gradients and moments are f32 with either.
enum class Precision : std::uint8_t { f32, bf16 };

/// What the plan is for.
struct TrainingPlanOptions {
  index_t batch = 1;              ///< rows of a micro-batch
  index_t tokens = 2048;          ///< of each
  Checkpointing checkpointing = Checkpointing::selective;
  Precision precision = Precision::bf16;
  index_t logits_rows = 512;
  int threads = 1;                ///< each has scratch of its own
};

/// In bytes.
struct TrainingPlan {
  std::size_t weights = 0, gradients = 0, moments = 0, activations = 0, scratch = 0;
  constexpr std::size_t total() const { return weights + gradients + moments + activations + scratch; }
};

/// The plan of training all weights.
template <Config C>
constexpr TrainingPlan training_plan(const C& c, const TrainingPlanOptions& o) {
  const auto n = static_cast<std::size_t>(parameter_count(c)) * sizeof(float);
  const index_t T = o.batch * o.tokens, R = std::min(T, o.logits_rows), d = c.hidden, f = 2 * index_t{c.ffn}, qkv = d + 2 * static_cast<index_t>(c.kv_heads) * head_dim(c);
  TrainingPlan plan{n, n, 2 * n, training_buffer_bytes<Cpu>(c, {T, R, o.checkpointing}), 0};
  const auto product = [&](index_t m, index_t k) { plan.scratch = std::max(plan.scratch, gemm_scratch(m, k, o.threads, o.precision == Precision::bf16)); };
  for (const index_t k : {d, f / 2, qkv, f}) product(T, k);           // forward, and the gradients of inputs
  for (const index_t m : {qkv, d, f}) product(m, T);                  // of weights
  product(R, index_t{c.vocab}), product(index_t{c.vocab}, R);
  plan.scratch = std::max(plan.scratch, static_cast<std::size_t>(o.threads) * detail::whole_lines(flash_scratch(o.tokens, head_dim(c), true)));
  return plan;
}
template <StaticConfig C>
constexpr TrainingPlan training_plan(const TrainingPlanOptions& o = {}) { return training_plan(C{}, o); }

}  // namespace tinyllama
