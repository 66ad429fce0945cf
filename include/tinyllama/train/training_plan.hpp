// Bytes that training needs, as constants: weights, gradients, moments, activations, scratch.
#pragma once

#include <algorithm>

#include "tinyllama/model/training_activations.hpp"
#include "tinyllama/train/partition.hpp"

namespace tinyllama {

/// In what the products of training multiply; sums, weights, gradients and moments are f32 with any. fp8, on a card alone: those of the layers' matrices in 8-bit
/// floats, e4m3 of weights and activations, e5m2 of gradients, with one scale a matrix that follows the step before; all else in bf16.
enum class Precision : std::uint8_t { f32, bf16, fp8 };

/// What the plan is for.
struct TrainingPlanOptions {
  index_t batch = 1;              ///< rows of a micro-batch
  index_t tokens = 2048;          ///< of each
  Checkpointing checkpointing = Checkpointing::selective;
  Precision precision = Precision::bf16;
  index_t logits_rows = 512;
  int threads = 1;                ///< each has scratch of its own
  Sharding sharding = Sharding::none;
  int ranks = 1;                  ///< the plan is that of one of them
};

/// In bytes.
struct TrainingPlan {
  std::size_t weights = 0, gradients = 0, moments = 0, activations = 0, scratch = 0, communication = 0;
  constexpr std::size_t total() const { return weights + gradients + moments + activations + scratch + communication; }
};

/// The plan of training all weights.
template <Config C>
constexpr TrainingPlan training_plan(const C& c, const TrainingPlanOptions& o) {
  const PartitionSizes cut = partition_sizes(c, o.ranks);
  const auto bytes = [](index_t floats) { return static_cast<std::size_t>(floats) * sizeof(float); };
  const bool zero1 = o.sharding == Sharding::zero1, fsdp = o.sharding == Sharding::fsdp;
  const std::size_t n = fsdp ? bytes(cut.own) : bytes(parameter_count(c)), moments = zero1 || fsdp ? bytes(cut.own) : n;
  const index_t T = o.batch * o.tokens, R = std::min(T, o.logits_rows), d = c.hidden, f = 2 * index_t{c.ffn}, qkv = d + 2 * static_cast<index_t>(c.kv_heads) * head_dim(c);
  TrainingPlan plan{n, n, 2 * moments, training_buffer_bytes<Cpu>(c, {T, R, o.checkpointing}), 0, 0};
  if (zero1) plan.communication = bytes(cut.own);
  if (fsdp) plan.communication = static_cast<std::size_t>(fsdp_buffers(c.tied)) * bytes(2 * cut.largest_part + cut.largest_shard);
  const auto product = [&](index_t m, index_t k) { plan.scratch = std::max(plan.scratch, gemm_scratch(m, k, o.precision == Precision::bf16)); };
  for (const index_t k : {d, f / 2, qkv, f}) product(T, k);           // forward, and the gradients of inputs
  for (const index_t m : {qkv, d, f}) product(m, T);                  // of weights
  product(R, index_t{c.vocab}), product(index_t{c.vocab}, R);
  plan.scratch = std::max(plan.scratch, static_cast<std::size_t>(o.threads) * detail::whole_lines(flash_scratch(o.tokens, head_dim(c), true)));
  return plan;
}
template <StaticConfig C>
constexpr TrainingPlan training_plan(const TrainingPlanOptions& o = {}) { return training_plan(C{}, o); }

}  // namespace tinyllama
