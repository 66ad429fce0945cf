// Bytes that training needs, as constants: weights, gradients, moments, activations, scratch, on the CPU or a card.
#pragma once

#include <algorithm>
#include <type_traits>

#include "tinyllama/kernels/moments.hpp"
#include "tinyllama/model/training_activations.hpp"
#include "tinyllama/train/partition.hpp"

namespace tinyllama {

/// In what the products of training multiply; sums, weights and gradients are f32 with any. fp8, on a card alone: those of the layers' matrices in 8-bit
/// floats, e4m3 of weights and activations, e5m2 of gradients, with one scale a matrix that follows the step before; all else in bf16.
enum class Precision : std::uint8_t { f32, bf16, fp8 };

/// What the plan is for.
struct TrainingPlanOptions {
  index_t batch = 1;              ///< rows of a micro-batch
  index_t tokens = 2048;          ///< of each
  Checkpointing checkpointing = Checkpointing::selective;
  Precision precision = Precision::bf16;
  Moments moments = Moments::f32;
  index_t logits_rows = 0;        ///< 0: the device's choice
  int threads = 1;                ///< each has scratch of its own, on the CPU
  Sharding sharding = Sharding::none;
  int ranks = 1;                  ///< the plan is that of one of them
  Format wire = Format::f32;      ///< what gradients are on their way (ParallelOptions::wire)
};

/// In bytes. `weights`: in f32, and as products read them where that is another array. On a card CUDA's own memory (some 0.5 GB) and NCCL's (1.5 GB) come on top.
struct TrainingPlan {
  std::size_t weights = 0, gradients = 0, moments = 0, activations = 0, scratch = 0, communication = 0;
  constexpr std::size_t total() const { return weights + gradients + moments + activations + scratch + communication; }
};

/// The plan of training all weights on a device of type D.
template <TrainingDevice D = Cpu, Config C>
constexpr TrainingPlan training_plan(const C& c, const TrainingPlanOptions& o) {
  using A = typename D::activation;
  constexpr bool rounds = !std::is_same_v<A, float>;
  constexpr auto device = static_cast<const D*>(nullptr);
  const PartitionSizes cut = partition_sizes(c, o.ranks, std::max(cache_line, info(o.moments).block));
  const auto bytes = [](index_t n, std::size_t each = sizeof(float)) { return static_cast<std::size_t>(n) * each; };
  const bool zero1 = o.sharding == Sharding::zero1, fsdp = o.sharding == Sharding::fsdp, shards_values = fsdp || (zero1 && rounds);
  const index_t n = parameter_count(c), own = cut.own, T = o.batch * o.tokens, R = std::min(T, o.logits_rows > 0 ? o.logits_rows : default_logits_rows(device));
  TrainingPlan plan;
  plan.weights = bytes(shards_values ? own : n);
  if (rounds) plan.weights += (fsdp ? 0 : bytes(n, sizeof(A))) + (shards_values ? bytes(own, sizeof(A)) + bytes((2 * index_t{c.layers} + 1) * c.hidden) : 0);
  plan.gradients = bytes(fsdp ? own : n);
  plan.moments = 2 * moment_bytes(o.moments, zero1 || fsdp ? own : partition_sizes(c, 1, info(o.moments).block).own);
  plan.activations = training_buffer_bytes<D>(c, {T, R, o.checkpointing});
  plan.scratch = training_scratch(device, c, {T, o.tokens, R, o.threads, o.precision == Precision::bf16, o.precision == Precision::fp8, fsdp});
  if (zero1) plan.communication = bytes(own);
  if (fsdp) plan.communication = static_cast<std::size_t>(fsdp_buffers(c.tied)) * (bytes(cut.largest_part, sizeof(A) + sizeof(float)) + bytes(cut.largest_shard));
  plan.communication += wire_bytes(o.wire, o.sharding, cut.largest_part, default_bucket_bytes);
  return plan;
}
template <StaticConfig C, TrainingDevice D = Cpu>
constexpr TrainingPlan training_plan(const TrainingPlanOptions& o = {}) { return training_plan<D>(C{}, o); }

}  // namespace tinyllama
