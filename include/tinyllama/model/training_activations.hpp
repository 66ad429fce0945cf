// What a training step keeps between forward and backward, in one arena; sized without memory, the same code is the plan.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "tinyllama/config/parameters.hpp"
#include "tinyllama/device/training.hpp"
#include "tinyllama/model/block.hpp"
#include "tinyllama/model/learned.hpp"
#include "tinyllama/tensor/arena.hpp"

namespace tinyllama {

/// What forward saves and backward computes again (arXiv 1604.06174).
///   none       everything is saved
///   selective  the two norms and swiglu are computed again on backward's way: for 2 hidden + ffn elements a token and layer less
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
template <Config C, class A = float>
struct TrainingBuffers {
  View<A, dyn, dyn> final_normed;               // [T, hidden]
  View<A, dyn, dyn> logits;                     // [R, vocab], then their gradient
  View<float, dyn, dyn> cos, sin, opposite_sin; // [T, head_dim / 2]
  float* losses;                                // [T]
  std::int32_t* input;                          // what the host sends for a pass: TrainingInput
  BlockGradients<C, A> gradients;
  float* attention;                             // what its backward pass needs
  AdapterWork<A> adapters;
};

/// What the host sends for a pass, as 32-bit words from `at` on, on either side: ids, targets and the weights of their losses, [T] each; and the rows of each id, for
/// the embedding's gradient, as the device wants them.
struct TrainingInput {
  std::int32_t* at;
  index_t rows;  // T

  template <class D>
  static constexpr index_t words(index_t rows, index_t vocab) { return 3 * rows + id_rows_words(static_cast<const D*>(nullptr), rows, vocab); }
  std::span<std::int32_t> ids() const { return {at, static_cast<std::size_t>(rows)}; }
  std::span<std::int32_t> targets() const { return {at + rows, static_cast<std::size_t>(rows)}; }
  float* weights() const { return reinterpret_cast<float*>(at + 2 * rows); }
  std::int32_t* id_rows() const { return at + 3 * rows; }
};

/// A block's activations in training: what it adds apart, unless products write floats anyway.
template <Config C, class A>
using TrainingActivations = std::conditional_t<std::is_same_v<A, float>, BlockActivations<C, A>, ApartActivations<C, A>>;

/// Takes a step's memory from the arena; `each(layer, BlockActivations, lse [T, heads])` receives the layers' part.
template <Config C, class D, class Each, class A = typename D::activation>
constexpr TrainingBuffers<C, A> take_training_buffers(Arena<D>& arena, const C& c, const TrainingShape& s, Each&& each) {
  using M = View<A, dyn, dyn>;
  using F = View<float, dyn, dyn>;
  const index_t T = s.rows, d = c.hidden, n = c.ffn, qkv = d + 2 * static_cast<index_t>(c.kv_heads) * head_dim(c), half = head_dim(c) / 2;
  const auto matrix = [&](index_t rows, index_t columns) { return arena.template take<A, dyn, dyn>(rows, columns); };
  const auto floats = [&](index_t rows, index_t columns) { return arena.template take<float, dyn, dyn>(rows, columns); };
  // What a pass over memory computes again, and what takes a product: of one layer at a time, or of each.
  struct Light { M normed, ffn_normed, gated; };
  struct Heavy { M qkv, attended; F lse, mid; M gate_up; };
  const auto light = [&] { return Light{matrix(T, d), matrix(T, d), matrix(T, n)}; };
  const auto heavy = [&] { return Heavy{matrix(T, qkv), matrix(T, d), floats(T, index_t{c.heads}), floats(T, d), matrix(T, 2 * n)}; };
  Light a = light();
  Heavy b = heavy();
  const M added = std::is_same_v<A, float> ? M(nullptr, {0, 0}) : matrix(T, d);  // of all layers
  F x = floats(T, d);
  for (int l = 0; l < c.layers; ++l) {
    if (l > 0 && s.checkpointing == Checkpointing::none) a = light();
    if (l > 0 && s.checkpointing != Checkpointing::layer) b = heavy();
    const F out = floats(T, d);
    const BlockActivations<C, A> block{x, a.normed, b.qkv, b.attended, b.mid, a.ffn_normed, b.gate_up, a.gated, out};
    if constexpr (std::is_same_v<A, float>) each(l, block, b.lse);
    else each(l, ApartActivations<C, A>{block, added}, b.lse);
    x = out;
  }
  const index_t wide = std::max(d, n), rank = s.adapter_rank;
  const auto vector = [&](index_t size) { return arena.template take<float, dyn>(size).data(); };
  const auto row = [&](index_t size) { return arena.template take<A, dyn>(size).data(); };
  const F dx = floats(T, d);
  const M rounded = [&] {
    if constexpr (std::is_same_v<A, float>) return dx;
    else return matrix(T, d);
  }();
  return {matrix(T, d), matrix(s.logits_rows, index_t{c.vocab}), floats(T, half), floats(T, half), floats(T, half), vector(T),
          arena.template take<std::int32_t, dyn>(TrainingInput::words<D>(T, index_t{c.vocab})).data(),
          BlockGradients<C, A>{dx, rounded, matrix(T, d), matrix(T, d), matrix(T, qkv), matrix(T, n), vector(T)},
          vector(flash_backward_floats(static_cast<const D*>(nullptr), T, {c.heads, c.kv_heads, head_dim(c)})),
          AdapterWork<A>{row(rank && s.adapter_dropout ? T * wide : 0), row(T * rank), row(T * rank)}};
}

/// Bytes of it.
template <class D, Config C>
constexpr std::size_t training_buffer_bytes(const C& c, const TrainingShape& s) {
  Arena<D> sizing;
  take_training_buffers(sizing, c, s, [](int, const auto&, View<float, dyn, dyn>) {});
  return sizing.peak();
}

}  // namespace tinyllama
