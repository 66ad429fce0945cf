// What training asks of a device beside the operations of Device: gradients as functions, and the concept that lists them.
#pragma once

#include "tinyllama/device/cpu_training.hpp"
#include "tinyllama/device/device.hpp"

namespace tinyllama {

/// T rows; d[x] is the gradient of the loss by x. Every function here is found by the device's type.
template <class D>
concept TrainingDevice = Device<D> && requires(D& dev, View<float, dyn, dyn> out, View<const float, dyn, dyn> in, float* vector, const float* values,
                                               std::span<const std::int32_t> ids, std::span<const Sequence> batch, const AdamwTask& adam) {
  gemm(dev, out, in, in, GemmOptions{});                                              // [M, N] (+)= [M, K] [N, K]^T
  flash_attention(dev, out, out, in, batch, HeadShape{}, GemmOptions{});              // [T, heads head_dim], lse [T, heads] from qkv
  flash_attention_backward(dev, out, in, in, in, in, batch, HeadShape{}, vector, GemmOptions{});
  rmsnorm_backward(dev, out, in, in, values, vector, 1e-5f, vector);                  // dx [T, n] +=, dgain [n] +=
  swiglu_backward(dev, out, out, in, in, in);                                         // [T, ffn]
  cross_entropy(dev, out, in, ids, values, vector);                                   // losses [T], gradient [T, vocab]
  embedding_backward(dev, out, ids, in);                                              // [vocab, hidden] +=
  adamw(dev, adam);
  { sum_of_squares(dev, values, index_t{}) } -> std::same_as<double>;
  fill(dev, vector, index_t{}, 0.0f);
  scale(dev, out, 1.0f);                                                              // [T, n] *=
  dropout(dev, out, in, 0.1f, std::uint64_t{});                                       // [T, n]
};

}  // namespace tinyllama
