// What training asks of a device beside the operations of Device: gradients as functions, and the concept that lists them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <vector>

#include "tinyllama/device/cpu_training.hpp"
#include "tinyllama/device/device.hpp"

namespace tinyllama {

/// T rows; d[x] is the gradient of the loss by x; A is D::activation. Every function here is found by the device's type. Pointers and views are of the device's
/// memory; spans of the host's, but for ids and targets.
template <class D>
concept TrainingDevice = Device<D> && requires(D& dev, View<typename D::activation, dyn, dyn> out, View<const typename D::activation, dyn, dyn> in, View<float, dyn, dyn> sums,
                                               View<const float, dyn, dyn> stream, typename D::activation* rounded, float* vector, const float* values,
                                               std::span<const std::int32_t> ids, std::int32_t* place, std::span<const Sequence> batch, const AdamwTask& adam, std::span<const AdamwRange> ranges, StepSums* totals) {
  gemm(dev, out, in, in, GemmOptions{});                                              // [M, N] (+)= [M, K] [N, K]^T
  gemm(dev, sums, in, in, GemmOptions{});
  flash_attention(dev, out, sums, in, batch, HeadShape{}, GemmOptions{});             // [T, heads head_dim], lse (T heads floats, in the device's order) from qkv
  flash_attention_backward(dev, out, in, in, in, stream, batch, HeadShape{}, vector, GemmOptions{});
  { flash_backward_floats(static_cast<const D*>(nullptr), index_t{}, HeadShape{}) } -> std::same_as<index_t>;  // of that vector
  rmsnorm_backward(dev, sums, out, in, stream, values, vector, 1e-5f, vector, out);   // dx [T, n] +=, dx rounded, dgain [n] +=, and the norm again
  swiglu_backward(dev, out, out, in, in, in, out);                                    // [T, ffn], and swiglu again
  cross_entropy(dev, out, in, ids, values, vector);                                   // losses [T], gradient [T, vocab]
  { id_rows_words(static_cast<const D*>(nullptr), index_t{}, index_t{}) } -> std::same_as<index_t>;
  id_rows(dev, place, ids, index_t{});                                                // so many words of the host's memory: rows of each id, as the next reads them
  { ids_on(dev, ids) } -> std::same_as<typename D::Batch>;                            // ids [T] on the device, for embedding
  embedding_backward(dev, sums, ids, place, stream);                                  // [vocab, hidden] +=, ids and their rows on the device
  adamw(dev, adam, ranges, rounded);                                                  // nothing, where the scale is NaN
  add_loss(dev, totals, values, values, index_t{});                                   // of losses and weights [n]: totals->loss +=
  add_squares(dev, totals, values, index_t{});                                        // of a gradient [n]: totals->squares +=
  clip(dev, totals, 1.0f);                                                            // norm and scale from the squares
  { magnitudes(dev) } -> std::same_as<std::span<float>>;                              // on the device, before adamw: of ranks the maximum
  round_to(dev, rounded, values, index_t{});                                          // [n]
  { sum_of_squares(dev, values, index_t{}) } -> std::same_as<double>;
  fill(dev, vector, index_t{}, 0.0f);
  scale(dev, out, 1.0f);                                                              // [T, n] *=
  scale(dev, sums, 1.0f);
  add(dev, out, in);                                                                  // [T, n] +=
  dropout(dev, out, in, 0.1f, std::uint64_t{});                                       // [T, n]
  { default_logits_rows(static_cast<const D*>(nullptr)) } -> std::same_as<index_t>;   // rows of logits at a time
  { training_scratch(static_cast<const D*>(nullptr), any_llama{}, TrainingWork{}) } -> std::same_as<std::size_t>;  // bytes that a pass takes beside its activations
};

/// Numbers of the host that work which may be recorded begins with: the ids of a pass, the learning rate of an update.
template <class D>
class StepInput {
 public:
  explicit StepInput(D&) {}
  /// Memory for the next ones, aligned for any number: the host writes them, work brings them. While `bytes` stay the same, so does the place.
  std::byte* begin(std::size_t bytes) { return own_.resize(bytes), own_.data(); }
  /// Work: they go to the device's memory at `to`.
  void bring(void* to) { std::memcpy(to, own_.data(), own_.size()); }

 private:
  std::vector<std::byte> own_;
};

/// Work that comes again step by step. A device may record what it was asked for and repeat it as one thing (device/cuda_recording.cuh); others do it anew each
/// time. `kind`: all that the work depends on beside numbers in the device's memory and where its arrays lie; `batch`: the sequences it works on, none for an
/// update. `new_weights`: they may differ from those of the work before. What the host remembers of its own work is done outside of it.
template <class D>
class Recording {
 public:
  template <class F>
  void run(D&, std::span<const std::uint64_t> /*kind*/, std::span<const Sequence>, bool /*new_weights*/, F&& work) { work(); }
  /// The arrays go.
  void clear() {}
};

}  // namespace tinyllama
