// The forward pass of inference, over any Device: blocks (model/block.hpp) between an embedding and a head, attention over a cache.
//
// T tokens of a batch (of one or many sequences) go through together; only attention knows the sequences apart.
//   x = E[ids];  x = block(x) for each layer;  logits = Whead rmsnorm(x)
#pragma once

#include <span>

#include "tinyllama/model/block.hpp"
#include "tinyllama/model/weights.hpp"
#include "tinyllama/model/workspace.hpp"

namespace tinyllama {

/// An observer that sees nothing: the default, which costs nothing. One of the caller's may have any of
///   void hidden(int layer, View<const float, dyn, dyn> x)                  // [T, hidden]: the residual stream behind each layer; -1: the embedding
///   void attention(int layer, const Sequence&, View<const float, dyn, dyn, dyn> p)  // [heads, tokens, position + tokens]: probabilities
struct NoObserver {};

/// Which rows of a step get logits.
enum class Logits : std::uint8_t { none, last, all };

namespace detail {
template <class O>
inline constexpr bool observes_hidden = requires(O& o, View<const float, dyn, dyn> x) { o.hidden(0, x); };
template <class O>
inline constexpr bool observes_attention = requires(O& o, const Sequence& s, View<const float, dyn, dyn, dyn> p) { o.attention(0, s, p); };
}  // namespace detail

/// One step: `ids` [T] of all sequences of `batch`, one after the other, through the model; keys and values go into the sequences' pages,
/// logits into work.logits(), [sequences, vocab] for Logits::last, [T, vocab] for Logits::all. Ids were checked against the vocabulary.
template <Config C, Device D, class Observer = NoObserver>
void forward(const Weights<C, D>& w, std::span<const std::int32_t> ids, std::span<const Sequence> batch, Workspace<C, D>& work, Logits want,
             Observer&& observer = {}) {
  using O = std::remove_reference_t<Observer>;
  using X = extents<C>;
  using A = typename D::activation;
  D& dev = *w.device;
  const C& c = w.config;
  const auto T = static_cast<index_t>(ids.size()), S = static_cast<index_t>(batch.size());
  const index_t q_columns = c.hidden, kv_columns = static_cast<index_t>(c.kv_heads) * head_dim(c);
  work.prepare(dev, c, T, want == Logits::none ? 0 : want == Logits::last ? S : T);

  const auto x = work.x(), n = work.normed(), y = work.projected();  // [T, hidden]
  const BlockActivations<C, A> a{x, n, work.qkv(), work.attended(), y, n, work.gate_up(), work.gated(), x};
  const RopeAngles angles{work.cos(), work.sin(), w.rope};
  const View<A, dyn, X::kv> k = columns(a.qkv, q_columns, q_columns + kv_columns);  // [T, kv_heads head_dim]
  const View<A, dyn, X::kv> v = columns(a.qkv, q_columns + kv_columns, q_columns + 2 * kv_columns);
  const View<A, dyn, X::q> q = columns(a.qkv, 0, q_columns);                        // [T, heads head_dim]

  const typename D::Batch step = dev.batch(ids, batch);
  [[maybe_unused]] typename D::Staging seen;  // what observers see
  dev.rope_angles(angles.cos, angles.sin, w.frequencies, step);
  dev.embedding(x, w.embedding, step);
  if constexpr (detail::observes_hidden<O>) observer.hidden(-1, dev.host(View<const float, dyn, dyn>(x), seen));

  for (int l = 0; l < c.layers; ++l) {
    const LayerWeights& layer = w.layers[static_cast<std::size_t>(l)];
    if (l == 0 || detail::observes_hidden<O>) dev.rmsnorm(n, x, layer.attn_norm, c.norm_eps);
    else dev.add_rmsnorm(n, x, y, layer.attn_norm, c.norm_eps);
    block_forward(dev, c, layer, a, angles, [&](auto attended, auto) {
      dev.store_kv(k, v, w.cache, l, step);
      dev.attention(attended, q, w.cache, l, step);
      if constexpr (detail::observes_attention<O>)
        for (const Sequence& s : batch) {
          const auto p = dev.attention_probabilities(q, w.cache, l, s);  // owned, [heads, tokens, position + tokens]
          observer.attention(l, s, View<const float, dyn, dyn, dyn>(p.data(), {c.heads, s.tokens, s.position + s.tokens}));
        }
    });
    if constexpr (detail::observes_hidden<O>) {
      dev.add(x, y);
      observer.hidden(l, dev.host(View<const float, dyn, dyn>(x), seen));
    }
  }

  if (want == Logits::none) return;
  if constexpr (detail::observes_hidden<O>) dev.rmsnorm(n, x, w.final_norm, c.norm_eps);
  else dev.add_rmsnorm(n, x, y, w.final_norm, c.norm_eps);
  if (want == Logits::all) return matmul(dev, work.logits(), n, w.head);
  dev.last_rows(work.selected(), n, step);
  matmul(dev, work.logits(), work.selected(), w.head);
}

}  // namespace tinyllama
