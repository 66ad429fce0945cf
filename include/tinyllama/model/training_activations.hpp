// What a training step keeps between forward and backward, in one arena; sized without memory, the same code is the plan.
#pragma once

#include <algorithm>
#include <cstdint>

#include "tinyllama/config/parameters.hpp"
#include "tinyllama/device/training.hpp"
#include "tinyllama/model/block.hpp"
#include "tinyllama/model/learned.hpp"
#include "tinyllama/tensor/arena.hpp"

namespace tinyllama {

/// What forward saves and backward computes again (arXiv 1604.06174).
///   none       everything is saved
///   selective  the two norms and swiglu are computed again: a pass over memory each, for 2 hidden + ffn floats a token and layer less
///   layer      only each block's input is saved; its forward pass runs again, a third more arithmetic
enum class Checkpointing : std::uint8_t { none, selective, layer };

/// How large a micro-batch is.
struct TrainingShape {
  index_t rows = 0;             ///< T: tokens
  index_t logits_rows = 0;      ///< R: rows of logits at a time
  Checkpointing checkpointing = Checkpointing::selective;
  index_t adapter_rank = 0;     ///< the largest; 0: none
  bool adapter_dropout = false;
  bool operator==(const TrainingShape&) const = default;
};

/// All but the blocks' activations.
template <Config C>
struct TrainingBuffers {
  View<float, dyn, dyn> final_normed;           // [T, hidden]
  View<float, dyn, dyn> logits;                 // [R, vocab], then their gradient
  View<float, dyn, dyn> cos, sin, opposite_sin; // [T, head_dim / 2]
  float *losses, *weights;                      // [T]
  BlockGradients<C> gradients;
  float* heads_kv;                              // [2, T, hidden]: d[K], d[V] of each query head
  AdapterWork adapters;
};

/// Takes a step's memory from the arena; `each(layer, BlockActivations<C>, lse [T, heads])` receives the layers' part.
template <Config C, class D, class Each>
constexpr TrainingBuffers<C> take_training_buffers(Arena<D>& arena, const C& c, const TrainingShape& s, Each&& each) {
  using M = View<float, dyn, dyn>;
  const index_t T = s.rows, d = c.hidden, n = c.ffn, qkv = d + 2 * static_cast<index_t>(c.kv_heads) * head_dim(c), half = head_dim(c) / 2;
  const auto matrix = [&](index_t rows, index_t columns) { return arena.template take<float, dyn, dyn>(rows, columns); };
  // What a pass over memory computes again, and what takes a product: of one layer at a time, or of each.
  struct Light { M normed, ffn_normed, gated; };
  struct Heavy { M qkv, attended, lse, mid, gate_up; };
  const auto light = [&] { return Light{matrix(T, d), matrix(T, d), matrix(T, n)}; };
  const auto heavy = [&] { return Heavy{matrix(T, qkv), matrix(T, d), matrix(T, index_t{c.heads}), matrix(T, d), matrix(T, 2 * n)}; };
  Light a = light();
  Heavy b = heavy();
  M x = matrix(T, d);
  for (int l = 0; l < c.layers; ++l) {
    if (l > 0 && s.checkpointing == Checkpointing::none) a = light();
    if (l > 0 && s.checkpointing != Checkpointing::layer) b = heavy();
    const M out = matrix(T, d);
    each(l, BlockActivations<C>{x, a.normed, b.qkv, b.attended, b.mid, a.ffn_normed, b.gate_up, a.gated, out}, b.lse);
    x = out;
  }
  const index_t wide = std::max(d, n), rank = s.adapter_rank;
  const auto vector = [&](index_t size) { return arena.template take<float, dyn>(size).data(); };
  return {matrix(T, d), matrix(s.logits_rows, index_t{c.vocab}), matrix(T, half), matrix(T, half), matrix(T, half), vector(T), vector(T),
          BlockGradients<C>{matrix(T, d), matrix(T, d), matrix(T, d), matrix(T, qkv), matrix(T, n), vector(T)}, vector(2 * T * d),
          AdapterWork{vector(rank && s.adapter_dropout ? T * wide : 0), vector(T * rank), vector(T * rank)}};
}

/// Bytes of it.
template <class D, Config C>
constexpr std::size_t training_buffer_bytes(const C& c, const TrainingShape& s) {
  Arena<D> sizing;
  take_training_buffers(sizing, c, s, [](int, const BlockActivations<C>&, View<float, dyn, dyn>) {});
  return sizing.peak();
}

}  // namespace tinyllama
