// What a training is told, and what it tells of a step.
#pragma once

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <type_traits>

#include "tinyllama/device/training.hpp"
#include "tinyllama/kernels/moments.hpp"
#include "tinyllama/train/adapters.hpp"
#include "tinyllama/train/partition.hpp"
#include "tinyllama/train/schedule.hpp"
#include "tinyllama/train/training_plan.hpp"

namespace tinyllama {

/// Which weights decay: all (the paper's repository), or the matrices but not the gains (the usual way).
enum class WeightDecay : std::uint8_t { matrices, all };

/// Training's options. Weights and gradients are f32; `precision` is that of the products.
struct TrainerOptions {
  float peak_lr = 4e-4f;                         ///< the learning rate, where there is no schedule
  std::optional<StagedSchedule> schedule = {};   ///< step n, counted from 1, runs at schedule.at(n)
  float beta1 = 0.9f, beta2 = 0.95f, eps = 1e-8f;
  float weight_decay = 0.1f;
  WeightDecay decay = WeightDecay::matrices;
  float clip = 1.0f;                             ///< of the gradient's global 2-norm; 0: none
  Precision precision = Precision::bf16;
  Moments moments = Moments::f32;                ///< how AdamW's averages are stored: 8, 4 or 2 bytes a weight for both
  Checkpointing checkpointing = Checkpointing::selective;
  index_t tokens = 0;                            ///< T of a row of the batch; 0: the context, or a shorter single row
  index_t micro_rows = 0;                        ///< rows of a micro-batch; 0: the whole batch at once
  index_t logits_rows = 0;                       ///< rows of logits at a time; 0: the device's choice
  std::uint64_t seed = 1;                        ///< of the initial weights, and of dropout
  std::optional<LoraOptions> lora = {};          ///< learn adapters; the weights stay as they are
};

/// What a step did.
struct StepReport {
  float loss = 0;            ///< mean over the targets that count
  float gradient_norm = 0;   ///< before clipping
  float lr = 0;
  std::int64_t targets = 0;  ///< that counted
  bool skipped = false;      ///< the gradient was not finite: weights and moments are as before
};

namespace detail {

/// The options of a trainer on devices of type D, with D's choices where they are left to it. Throws Error for one that is out of its range, or that D does not have.
template <class D, Config C>
TrainerOptions checked(TrainerOptions o, const C& config, Sharding sharding) {
  constexpr bool rounds = !std::is_same_v<typename D::activation, float>;
  check(describe(config), "config");
  if (head_stride(head_dim(config)) > max_head_stride)
    throw Error("trainer", "head dimension", "at most " + std::to_string(max_head_stride), std::to_string(head_dim(config)));
  if (o.lora) check(*o.lora, config);
  if (o.schedule) check(*o.schedule);
  const auto positive = [](std::string_view what, bool ok, float found) {
    if (!ok) throw Error("trainer", what, "in its range", std::to_string(found));
  };
  positive("learning rate", o.peak_lr >= 0 && std::isfinite(o.peak_lr), o.peak_lr);
  positive("beta1", o.beta1 >= 0 && o.beta1 < 1, o.beta1);
  positive("beta2", o.beta2 >= 0 && o.beta2 < 1, o.beta2);
  positive("eps", o.eps > 0, o.eps);
  positive("clip", o.clip >= 0, o.clip);
  positive("logits rows", o.logits_rows >= 0, static_cast<float>(o.logits_rows));
  if (o.logits_rows == 0) o.logits_rows = default_logits_rows(static_cast<const D*>(nullptr));
  if constexpr (!D::host_memory)
    if (!rounds || o.precision != Precision::fp8) o.precision = rounds ? Precision::bf16 : Precision::f32;
  if (o.precision == Precision::fp8 && (D::host_memory || o.lora))
    throw Error("trainer", "precision", "fp8 on a card of bf16, for all weights", D::host_memory ? "this device" : "adapters");
  if (static_cast<std::size_t>(o.moments) >= moment_formats.size()) throw Error("trainer", "moments", "f32, bf16 or int8", std::to_string(static_cast<int>(o.moments)));
  if (o.lora && sharding == Sharding::fsdp) throw Error("trainer", "sharding", "ddp or zero1 for adapters", "fsdp");
  return o;
}

}  // namespace detail
}  // namespace tinyllama
