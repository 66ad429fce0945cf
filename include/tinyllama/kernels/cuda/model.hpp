// A whole model as plain pointers, for kernels that compute a step alone. Host code.
#pragma once

#include <memory>
#include <vector>

#include "tinyllama/config/rope_layout.hpp"
#include "tinyllama/device/operands.hpp"

namespace tinyllama::cuda {

/// Weights in the device's memory and the model's sizes; everything that does not change from step to step.
struct ModelPointers {
  struct Layer {
    const float *attn_norm, *ffn_norm;  // [hidden]
    Linear qkv, o, gate_up, down;
  };
  int hidden, heads, kv_heads, ffn, vocab;
  float eps;
  RopeLayout rope;
  CacheShape cache;
  Matrix embedding;                     // [vocab, hidden]
  std::vector<Layer> layers;
  const float* final_norm;              // [hidden]
  Linear head;                          // [vocab, hidden]
  std::vector<double> frequencies;      // [head_dim / 2]
};

struct DecodeState;  // device/cuda_decode.cuh: plan and memory of the persistent kernel for one model

}  // namespace tinyllama::cuda
